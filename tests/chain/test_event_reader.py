from __future__ import annotations

from collections.abc import Callable

import pytest

from tallystick.chain.event_reader import DeepReorg, EventPage, read_events
from tallystick.chain.events import Deposited, Event, FeeSet, PurseOpened, Settled
from tallystick.chain.rpc import Rpc, RpcError
from tallystick.protocol.errors import PeerError, Unavailable
from tests.chain.faulty_proxy import Fault, Proxy
from tests.chain.harness import DOLLAR, World, person

KEY, OWNER, PROVIDER = person("key"), person("owner"), person("provider")


async def test_facts_are_read_from_a_cursor(world: World, rpc: Rpc) -> None:
    """Each event is read once, in order, with its position; the same cursor gives the same events again."""
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
    """With three confirmations, an event is reported after three blocks on top of its own."""
    start = await rpc.block_number() + 1
    await world.escrow.set_fee(world.deployer, 7)
    for _ in range(3):
        assert not (await read_events(rpc, world.deployment, start, confirmations=3)).events
        await rpc.request("evm_mine")
    assert len((await read_events(rpc, world.deployment, start, confirmations=3)).events) == 1


async def test_long_ranges_come_in_pages(world: World, rpc: Rpc) -> None:
    """A reader that is far behind reads a bounded number of blocks per page."""
    start, events = await rpc.block_number() + 1, list[Event]()
    for bps in range(5):
        await world.escrow.set_fee(world.deployer, bps)
    cursor = start
    for _ in range(3):
        page = await read_events(rpc, world.deployment, cursor, span=2)
        assert len(page.events) <= 2
        cursor, events = page.cursor, [*events, *page.events]
    assert len(events) == 5


async def test_other_contracts_say_nothing_here(world: World, rpc: Rpc) -> None:
    """The token's transfers and events of another market are ignored."""
    other = await World.make(rpc)
    start = await rpc.block_number() + 1
    await other.escrow.set_fee(other.deployer, 1)
    world.forget_nonces()
    await world.give(OWNER.address, 1)
    assert not (await read_events(rpc, world.deployment, start)).events


# -------------------------------------------------------------------------------------------------- chains that change their mind


async def _set(world: World, *rates: int) -> None:
    for bps in rates:
        await world.escrow.set_fee(world.deployer, bps)


async def _mine(rpc: Rpc, blocks: int) -> None:
    for _ in range(blocks):
        await rpc.request("evm_mine")


def _rates(page: EventPage) -> list[int]:
    return [event.bps for event in page.events if isinstance(event, FeeSet)]


async def _back(world: World, mark: str) -> str:
    """Reverts the blocks after a snapshot. Returns the new snapshot."""
    assert await world.rpc.request("evm_revert", mark)
    world.forget_nonces()
    return str(await world.rpc.request("evm_snapshot"))


async def test_events_removed_within_the_depth_are_never_reported(either: World) -> None:
    """With three confirmations, an event whose block is replaced after two is never reported; its replacement is reported
    once.
    """
    rpc, start = either.rpc, await either.rpc.block_number() + 1
    mark, seen = await rpc.request("evm_snapshot"), list[int]()
    cursor, tip = start, ""

    async def look() -> None:
        nonlocal cursor, tip
        page = await read_events(rpc, either.deployment, cursor, after=tip, confirmations=3)
        cursor, tip = page.cursor, page.tip
        seen.extend(_rates(page))

    await _set(either, 1)
    for blocks in (2, 0):
        await _mine(rpc, blocks)
        await look()
    mark = await _back(either, mark)
    await look()
    await _set(either, 2)
    await look()
    await _mine(rpc, 3)
    for _ in range(2):
        await look()
    assert seen == [2]


async def test_a_reorg_below_the_depth_is_reported(either: World) -> None:
    """If final blocks are replaced, reading from the stored cursor and tip raises an error that names the block."""
    rpc, start = either.rpc, await either.rpc.block_number() + 1
    mark = await rpc.request("evm_snapshot")
    await _set(either, 1)
    await _mine(rpc, 2)
    page = await read_events(rpc, either.deployment, start, confirmations=2)
    assert _rates(page) == [1]
    await _back(either, mark)
    await rpc.request("evm_increaseTime", 60)
    behind = await read_events(rpc, either.deployment, page.cursor, after=page.tip, confirmations=2)
    assert (behind.events, behind.cursor, behind.tip) == (
        (),
        page.cursor,
        page.tip,
    )  # the chain is shorter than before, so nothing is final
    await _set(either, 3)
    await _mine(rpc, 5)
    with pytest.raises(DeepReorg, match="dropped block") as caught:
        await read_events(rpc, either.deployment, page.cursor, after=page.tip, confirmations=2)
    assert (caught.value.block, caught.value.retry, isinstance(caught.value, PeerError)) == (page.cursor - 1, False, True)
    again = await read_events(rpc, either.deployment, start)
    assert _rates(again) == [3]


async def test_a_real_reorg_of_a_few_blocks(anvil_url: str) -> None:
    """After a reorganization by anvil, events above the depth move, those below stay, and none is reported twice."""
    rpc = Rpc(anvil_url)
    world = await World.make(rpc)
    start = await rpc.block_number() + 1
    await _set(world, 1)
    await _mine(rpc, 3)
    first = await read_events(rpc, world.deployment, start, confirmations=3)
    await _set(world, 2)
    await rpc.request("anvil_reorg", 2, [])
    world.forget_nonces()
    await _mine(rpc, 4)
    second = await read_events(rpc, world.deployment, first.cursor, after=first.tip, confirmations=3)
    await _set(world, 3)
    await _mine(rpc, 3)
    third = await read_events(rpc, world.deployment, second.cursor, after=second.tip, confirmations=3)
    assert [_rates(page) for page in (first, second, third)] == [[1], [], [3]]
    await rpc.request("anvil_reorg", 8, [])
    with pytest.raises(DeepReorg):
        await read_events(rpc, world.deployment, third.cursor, after=third.tip, confirmations=3)
    await rpc.close()


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.CUT, Fault.BROKEN, Fault.RATE_LIMIT, Fault.GARBAGE], ids=lambda f: f.name)
async def test_reading_over_a_failing_connection(either: World, proxy: Proxy, through: Rpc, fault: Fault) -> None:
    """A failing connection goes unnoticed or raises Unavailable; the cursor does not move, and no event is lost."""
    start = await either.rpc.block_number() + 1
    await _set(either, 1, 2)
    proxy.plan("eth_getLogs", fault, fault, fault)
    with pytest.raises(Unavailable):
        await read_events(through, either.deployment, start)
    assert _rates(await read_events(through, either.deployment, start)) == [1, 2]


async def test_a_node_that_is_behind_loses_nothing(either: World, proxy: Proxy, through: Rpc) -> None:
    """No event is missed if the node that reports the last block is ahead of the one that returns the logs."""
    start = await either.rpc.block_number() + 1
    await _set(either, 1)
    proxy.answers["eth_blockNumber"] = hex(start + 5)
    page = await read_events(through, either.deployment, start)
    assert (page.events, page.cursor) == ((), start)
    proxy.answers.clear()
    assert _rates(await read_events(through, either.deployment, start)) == [1]


async def test_a_chain_that_changes_while_it_is_read(either: World, proxy: Proxy, through: Rpc) -> None:
    """Logs between two different versions of the last block are discarded."""
    start = await either.rpc.block_number() + 1
    await _set(either, 1)
    proxy.answers["eth_getBlockByNumber"] = {"hash": "0x" + "11" * 32, "number": "0x1", "timestamp": "0x1"}
    proxy.alter_from = 2
    page = await read_events(through, either.deployment, start)
    assert (page.events, page.cursor) == ((), start)


async def test_pages_shrink_for_limited_nodes(either: World, proxy: Proxy, through: Rpc) -> None:
    """If a node returns logs of few blocks at a time, the reader asks for fewer until it gets an answer."""
    start = await either.rpc.block_number() + 1
    await _set(either, *range(8))
    proxy.most_blocks = 3
    rates, cursor = list[int](), start
    while (page := await read_events(through, either.deployment, cursor)).cursor != cursor:
        rates, cursor = [*rates, *_rates(page)], page.cursor
    assert rates == list(range(8))
    proxy.most_blocks = 0
    await _set(either, 9)
    with pytest.raises(RpcError, match="range"):
        await read_events(through, either.deployment, cursor)


async def test_a_reader_continues_after_any_restart(either: World) -> None:
    """With any page size, and any number of restarts from the stored cursor, the events are those of one reading."""
    start = await either.rpc.block_number() + 1
    await _set(either, *range(6))
    whole = await read_events(either.rpc, either.deployment, start)
    for span in (1, 2, 5):
        cursor, tip, events = start, "", list[Event]()
        while cursor < whole.cursor:
            pages = [await read_events(either.rpc, either.deployment, cursor, after=tip, span=span) for _ in range(2)]
            assert pages[0] == pages[1]
            cursor, tip, events = pages[0].cursor, pages[0].tip, [*events, *pages[0].events]
        assert tuple(events) == whole.events
        assert tip == whole.tip


@pytest.mark.parametrize("logs", [None, 5, [5], [{}], [{"address": 5}], "spoiled"], ids=str)
async def test_malformed_logs(world: World, proxy_of_world: Proxy, logs: object) -> None:
    """Any malformed logs raise Unavailable or are read as events, and the reader does not move on."""
    start = await world.rpc.block_number() + 1
    await _set(world, 1)
    if logs == "spoiled":
        wanted = {"address": world.deployment.escrow, "fromBlock": hex(start)}
        (log,) = await world.rpc.request("eth_getLogs", wanted)
        malformed = [{"data": "0x"}, {"data": "zz"}, {"topics": log["topics"][:1]}, {"blockNumber": None}, {"logIndex": "x"}]
    else:
        log, malformed = {}, [{}]
    rpc = Rpc(proxy_of_world.url)
    for change in malformed:
        proxy_of_world.answers["eth_getLogs"] = [log | change] if log else logs
        with pytest.raises(Unavailable):
            await read_events(rpc, world.deployment, start)
    proxy_of_world.answers["eth_getLogs"] = [log | {"address": world.deployment.escrow, "removed": True}]
    assert not (await read_events(rpc, world.deployment, start)).events
    await rpc.close()


@pytest.fixture
def proxy_of_world(chain_url: str, proxies: Callable[[str], Proxy]) -> Proxy:
    """A proxy in front of the embedded chain."""
    return proxies(chain_url)
