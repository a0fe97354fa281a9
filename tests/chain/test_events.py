from __future__ import annotations

import asyncio

import pytest

from tallystick.chain.codec import load_abi, snake
from tallystick.chain.events import Deposited, Event, PurseOpened, Settled, follow_events, read_events
from tallystick.chain.rpc import Rpc
from tests.chain.world import DOLLAR, World, person

KEY, OWNER, PROVIDER = person("key"), person("owner"), person("provider")


def test_every_event_of_the_contract_is_a_class() -> None:
    """Names and fields of the facts are those of the contract's events, so that neither drifts."""
    classes = {cls.__name__: cls for cls in Event.__subclasses__()}
    events = {e.name: [snake(n) for n in e.names] for e in load_abi("Escrow").events.values() if e.name != "EIP712DomainChanged"}
    assert events.keys() == classes.keys()
    for name, fields in events.items():
        assert list(classes[name].__annotations__) == fields


async def test_facts_are_read_from_a_cursor(world: World, rpc: Rpc) -> None:
    """Each fact comes once, in order, with its place; the same cursor gives the same facts again."""
    start = world.deployment.block
    await world.purse(KEY, OWNER, 5 * DOLLAR)
    page = await read_events(rpc, world.deployment, start)
    assert [type(e) for e in page.events] == [PurseOpened, Deposited]
    assert page == await read_events(rpc, world.deployment, start)
    assert page.events[0].at < page.events[1].at
    await world.settle(await world.sender(PROVIDER), world.row(KEY, PROVIDER.address, DOLLAR))
    rest = await read_events(rpc, world.deployment, page.cursor)
    assert [type(e) for e in rest.events] == [Settled]
    nothing = await read_events(rpc, world.deployment, rest.cursor)
    assert (nothing.events, nothing.cursor) == ((), rest.cursor)


async def test_a_fact_is_final_after_its_confirmations(world: World, rpc: Rpc) -> None:
    """With three confirmations a fact appears when three blocks stand on its own."""
    start = await rpc.block_number() + 1
    await world.escrow.set_fee(world.deployer, 7)
    for _ in range(3):
        assert not (await read_events(rpc, world.deployment, start, confirmations=3)).events
        await rpc.request("evm_mine")
    assert len((await read_events(rpc, world.deployment, start, confirmations=3)).events) == 1


async def test_long_ranges_come_in_pages(world: World, rpc: Rpc) -> None:
    """A reader that is far behind reads a bounded number of blocks at a time."""
    start, found = await rpc.block_number() + 1, list[Event]()
    for bps in range(5):
        await world.escrow.set_fee(world.deployer, bps)
    cursor = start
    for _ in range(3):
        page = await read_events(rpc, world.deployment, cursor, span=2)
        assert len(page.events) <= 2
        cursor, found = page.cursor, [*found, *page.events]
    assert len(found) == 5


async def test_following_waits_for_news(world: World, rpc: Rpc) -> None:
    """A follower yields what is there and then what comes."""
    start = await rpc.block_number() + 1
    await world.escrow.set_fee(world.deployer, 1)
    pages = follow_events(rpc, world.deployment, start, interval=0.01)
    first = await asyncio.wait_for(anext(pages), 2)
    waiting = asyncio.ensure_future(anext(pages))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await world.escrow.set_fee(world.deployer, 2)
    second = await asyncio.wait_for(waiting, 2)
    assert [len(p.events) for p in (first, second)] == [1, 1]
    assert second.cursor > first.cursor


async def test_other_contracts_say_nothing_here(world: World, rpc: Rpc) -> None:
    """Transfers of the token and events of another market are not facts of this one."""
    other = await World.make(rpc)
    start = await rpc.block_number() + 1
    await other.escrow.set_fee(other.deployer, 1)
    world.forget_nonces()
    await world.give(OWNER.address, 1)
    assert not (await read_events(rpc, world.deployment, start)).events


@pytest.mark.parametrize("name", ["Escrow", "TestUSD"])
def test_abis_are_loaded_once(name: str) -> None:
    """Reading the interface is not repeated for every call."""
    assert load_abi(name) is load_abi(name)
