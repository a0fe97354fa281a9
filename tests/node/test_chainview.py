from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from node.chainview import EscrowView
from node.tabs import Funds
from tallystick.chain.escrow import Purse, TabState
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Address, Amount, Seconds
from tests.node.world import PAYER, PROVIDER

KNOWN = Funds(Amount(3), Amount(5), Amount(7), known=True, thawing=Amount(2))


class FakeEscrow:
    """An escrow that says the same to everyone, until it is given trouble."""

    def __init__(self) -> None:
        self.asked = 0
        self.free = 7
        self.trouble: Callable[[], Awaitable[None]] | None = None

    async def purse(self, key: Address) -> Purse:
        self.asked += 1
        if self.trouble is not None:
            await self.trouble()
        return Purse(None, Amount(self.free + 2), Amount(2), Seconds(0))

    async def tab(self, payer: Address, provider: Address) -> TabState:
        assert provider == PROVIDER.address
        return TabState(Amount(3), Amount(5), Seconds(0))


async def away() -> None:
    """What a chain does that is not there."""
    raise Unavailable(Code.CHAIN_UNAVAILABLE, "no chain")


class World:
    """A view over the fake, with a clock of its own."""

    def __init__(self, **settings: Any) -> None:
        self.tick = 0.0
        self.escrow = FakeEscrow()
        self.view = EscrowView(self.escrow, PROVIDER.address, tick=lambda: self.tick, **settings)  # type: ignore[arg-type]


async def test_funds_are_what_the_chain_says() -> None:
    """Settled and reserved come from the tab, free money from the purse; what is thawing does not count."""
    assert await World().view.funds(PAYER.address) == KNOWN


async def test_an_answer_is_good_for_a_while() -> None:
    """Within a few seconds nobody asks twice; later the old answer is given while a new one is fetched."""
    world = World()
    await world.view.funds(PAYER.address)
    world.tick = 3.0
    await world.view.funds(PAYER.address)
    assert world.escrow.asked == 1
    world.tick, world.escrow.free = 4.0, 8
    assert (await world.view.funds(PAYER.address)).free == 7
    await asyncio.gather(*world.view._asking.values())
    assert (await world.view.funds(PAYER.address)).free == 8
    world.tick, world.escrow.free = 100.0, 9
    assert (await world.view.funds(PAYER.address)).free == 9


async def test_a_refresh_asks_now_but_not_too_often() -> None:
    """A refresh sees what is new, and one payer's refusals can't make the node hammer the chain."""
    world = World()
    await world.view.funds(PAYER.address)
    world.escrow.free = 8
    assert (await world.view.refresh(PAYER.address)).free == 7
    world.tick = 1.0
    assert (await world.view.refresh(PAYER.address)).free == 8
    assert world.escrow.asked == 2


async def test_one_question_at_a_time() -> None:
    """Many jobs of one payer at once are one question to the chain."""
    world = World()
    assert await asyncio.gather(*(world.view.funds(PAYER.address) for _ in range(10))) == [KNOWN] * 10
    assert world.escrow.asked == 1


async def test_an_outage_leaves_what_was_known() -> None:
    """While the chain is away the last answer stays good, and a stranger is unknown; afterwards the view recovers by itself."""
    world = World()
    await world.view.funds(PAYER.address)
    world.escrow.trouble, world.tick = away, 1_000.0
    assert await world.view.funds(PAYER.address) == KNOWN
    assert await world.view.funds(PROVIDER.address) == Funds()
    assert not world.view.reachable
    world.escrow.trouble, world.escrow.free, world.tick = None, 8, 1_006.0
    assert (await world.view.funds(PAYER.address)).free == 8
    assert world.view.reachable


async def test_a_chain_in_trouble_is_left_alone() -> None:
    """After a failure nobody waits for the chain for some seconds."""
    world = World()
    world.escrow.trouble = away
    for _ in range(5):
        assert await world.view.funds(PAYER.address) == Funds()
    assert world.escrow.asked == 1


async def test_a_silent_chain_is_not_waited_for() -> None:
    """A chain that takes a question and says nothing costs a job its patience, once."""
    world = World(patience=0.01)
    world.escrow.trouble = asyncio.Event().wait  # type: ignore[assignment]
    assert await world.view.funds(PAYER.address) == Funds()
    await world.view.close()


async def test_closing_stops_what_is_asked() -> None:
    """Nothing is left waiting after the end."""
    world = World()
    world.escrow.trouble = asyncio.Event().wait  # type: ignore[assignment]
    asking = asyncio.create_task(world.view.funds(PAYER.address))
    await asyncio.sleep(0)
    await world.view.close()
    assert (await asyncio.gather(asking, return_exceptions=True))[0].__class__ is asyncio.CancelledError
