from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from node.chain import escrow_view
from node.chain.escrow_view import EscrowView
from node.domain.tabs import Funds
from tallystick.chain.escrow import EscrowRules, Purse, TabState
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Address, Amount, Seconds
from tests.node.harness import PAYER, PROVIDER

KNOWN = Funds(Amount(3), Amount(5), Amount(7), known=True, thawing=Amount(2))


class FakeEscrow:
    """An escrow that says the same to everyone, until it is given trouble."""

    def __init__(self) -> None:
        self.asked = 0
        self.free = 7
        self.release_at = 0
        self.waits = (86_400, 86_400)
        self.rate, self.rates_asked = 150, 0
        self.before_read: Callable[[], Awaitable[None]] | None = None

    async def purse(self, key: Address) -> Purse:
        self.asked += 1
        if self.before_read is not None:
            await self.before_read()
        return Purse(None, Amount(self.free + 2), Amount(2), Seconds(0))

    async def tab(self, payer: Address, provider: Address) -> TabState:
        assert provider == PROVIDER.address
        return TabState(Amount(3), Amount(5), Seconds(self.release_at))

    async def rules(self) -> EscrowRules:
        return EscrowRules(*self.waits, 7 * 86_400, Amount(1), PROVIDER.address)

    async def read(self, function: str, *arguments: object) -> tuple[object, ...]:
        assert function == "account"
        self.rates_asked += 1
        if self.before_read is not None:
            await self.before_read()
        return 0, arguments[0], self.rate


async def away() -> None:
    """What a chain does that is not there."""
    raise Unavailable(Code.CHAIN_UNAVAILABLE, "no chain")


class World:
    """A view over the fake, with a clock of its own."""

    def __init__(self, **settings: Any) -> None:
        self.tick = 0.0
        self.escrow = FakeEscrow()
        self.view = EscrowView(self.escrow, PROVIDER.address, clock=lambda: self.tick, **settings)  # type: ignore[arg-type]


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
    await asyncio.gather(*world.view._funds._reads.values(), return_exceptions=True)
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
    world.escrow.before_read, world.tick = away, 1_000.0
    assert await world.view.funds(PAYER.address) == KNOWN
    assert await world.view.funds(PROVIDER.address) == Funds()
    assert not world.view.reachable
    world.escrow.before_read, world.escrow.free, world.tick = None, 8, 1_006.0
    assert (await world.view.funds(PAYER.address)).free == 8
    assert world.view.reachable


async def test_a_chain_in_trouble_is_left_alone() -> None:
    """After a failure nobody waits for the chain for some seconds."""
    world = World()
    world.escrow.before_read = away
    for _ in range(5):
        assert await world.view.funds(PAYER.address) == Funds()
    assert world.escrow.asked == 1


async def test_a_silent_chain_is_not_waited_for() -> None:
    """A chain that takes a question and says nothing costs a job its patience, once."""
    world = World(timeout=0.01)
    world.escrow.before_read = asyncio.Event().wait  # type: ignore[assignment]
    assert await world.view.funds(PAYER.address) == Funds()
    await world.view.close()


async def test_closing_stops_what_is_asked() -> None:
    """Nothing is left waiting after the end."""
    world = World()
    world.escrow.before_read = asyncio.Event().wait  # type: ignore[assignment]
    asking = asyncio.create_task(world.view.funds(PAYER.address))
    await asyncio.sleep(0)
    await world.view.close()
    assert (await asyncio.gather(asking, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_a_reservation_under_a_release_is_no_security() -> None:
    """Once a release runs, ripe or not, nothing counts as reserved; that it is on its way out is told."""
    for release_at in (1, 1 << 40):
        world = World()
        world.escrow.release_at = release_at
        assert await world.view.funds(PAYER.address) == replace(KNOWN, reserved=Amount(0), releasing=Amount(5))


async def test_nothing_old_is_believed_where_payers_wait_for_seconds_only() -> None:
    """With waits of 8 s an answer is used for 2 s and no longer, also where an older one would do elsewhere."""
    for waits in ((8, 86_400), (86_400, 8)):
        world = World(stale=60.0, fresh=3.0)
        world.escrow.waits = waits
        await world.view.funds(PAYER.address)
        world.escrow.free = 8
        world.tick = 2.0
        assert (await world.view.funds(PAYER.address)).free == 7
        world.tick = 2.1
        assert (await world.view.funds(PAYER.address)).free == 8


async def test_a_silent_chain_keeps_no_reservation_for_ever() -> None:
    """Of a chain that fell silent, a reservation counts for half the time in which it can't be taken back, and not a second more:
    then only what was settled is known.
    """
    world = World(refresh_interval=0.0)
    world.escrow.waits = (86_400, 200)
    await world.view.funds(PAYER.address)
    world.escrow.before_read, world.tick = away, 100.0
    assert await world.view.funds(PAYER.address) == KNOWN
    world.tick = 100.1
    assert await world.view.funds(PAYER.address) == Funds(settled=Amount(3))
    assert await world.view.refresh(PAYER.address) == Funds(settled=Amount(3))


async def test_the_age_of_an_answer_counts_from_the_question() -> None:
    """An answer that took long is as old as its question: what it says may have been read at once."""
    world = World()
    world.escrow.waits = (86_400, 8)

    async def slow() -> None:
        world.tick += 2.5

    world.escrow.before_read = slow
    await world.view.funds(PAYER.address)
    world.escrow.before_read, world.escrow.free = None, 8
    assert (await world.view.funds(PAYER.address)).free == 8


async def test_a_thaw_of_more_than_there_is() -> None:
    """What thaws is never more than what is there."""
    world = World()
    world.escrow.free = -2
    assert await world.view.funds(PAYER.address) == replace(KNOWN, free=Amount(0), thawing=Amount(0))


async def test_a_coordinators_rate_costs_few_reads() -> None:
    """The registered rate is asked for once in five minutes; while the chain is away, the last one is told."""
    world = World()
    for _ in range(5):
        assert await world.view.rate(PROVIDER.address) == 150
    assert world.escrow.rates_asked == 1
    world.escrow.rate, world.tick = 200, 301.0
    assert await world.view.rate(PROVIDER.address) == 200
    world.escrow.before_read, world.tick = away, 1_000.0
    for _ in range(5):
        assert await world.view.rate(PROVIDER.address) == 200
        assert await world.view.rate(PAYER.address) is None
    assert world.escrow.rates_asked == 3


async def test_every_time_is_counted_from_the_last_answer_and_to_its_end() -> None:
    """At the very end of each time the old answer still holds, and right after it no more; whatever the clock says at first."""
    world = World(fresh=1.0, stale=10.0, refresh_interval=0.5, pause=5.0)
    world.escrow.waits = (86_400, 86_400)
    world.tick = 1_000.0
    await world.view.funds(PAYER.address)
    world.escrow.free, world.tick = 8, 1_000.5
    assert (await world.view.refresh(PAYER.address)).free == 7
    world.tick = 1_001.0
    await world.view.funds(PAYER.address)
    assert not world.view._funds._reads
    world.escrow.before_read, world.tick = away, 1_010.0
    assert (await world.view.funds(PAYER.address)).free == 7
    assert world.view._funds._reads, "and is asked for meanwhile"
    await asyncio.gather(*world.view._funds._reads.values(), return_exceptions=True)
    world.escrow.before_read, world.tick = None, 1_014.9
    assert (await world.view.refresh(PAYER.address)).free == 7, "the chain is left alone"
    world.tick = 1_015.0
    assert (await world.view.refresh(PAYER.address)).free == 8
    world.escrow.before_read, world.tick = away, 1_015.0 + 43_200
    assert (await world.view.refresh(PAYER.address)).known
    world.tick += 6
    assert not (await world.view.refresh(PAYER.address)).known


async def test_a_rate_is_asked_for_again_after_its_time_and_not_before() -> None:
    """To the second, whatever the clock says at first."""
    world = World()
    for tick, asked in ((1_000.0, 1), (1_300.0, 1), (1_300.5, 2)):
        world.tick = tick
        await world.view.rate(PROVIDER.address)
        assert world.escrow.rates_asked == asked


async def test_strangers_never_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many payers the last that were asked after are remembered."""
    monkeypatch.setattr(escrow_view, "_CACHED_ACCOUNTS", 2)
    world = World()
    for number in range(1, 4):
        await world.view.funds(Address(f"0x{number:040x}"))
        assert len(world.view._funds) == min(number, 2)
