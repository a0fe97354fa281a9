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
from tests.virtual_time import on_virtual_time

KNOWN = Funds(Amount(3), Amount(5), Amount(7), known=True, thawing=Amount(2))


class FakeEscrow:
    """An escrow with the same state for every query. `before_read` can delay or fail a read."""

    def __init__(self) -> None:
        self.asked = 0
        self.free = 7
        self.release_at = 0
        self.waits = (86_400, 86_400)
        self.rate, self.rates_asked = 150, 0
        self.before_read: Callable[[], Awaitable[None]] | None = None

    async def purse(self, key: Address, *, block: str = "latest") -> Purse:  # a fake has one block
        self.asked += 1
        if self.before_read is not None:
            await self.before_read()
        return Purse(None, Amount(self.free + 2), Amount(2), Seconds(0))

    async def tab(self, payer: Address, provider: Address, *, block: str = "latest") -> TabState:
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
    """Fails as a chain does that cannot be reached."""
    raise Unavailable(Code.CHAIN_UNAVAILABLE, "no chain")


class World:
    """A view over the fake escrow, with a clock of its own."""

    def __init__(self, **settings: Any) -> None:
        self.tick = 0.0
        self.escrow = FakeEscrow()
        self.view = EscrowView(self.escrow, PROVIDER.address, clock=lambda: self.tick, **settings)  # type: ignore[arg-type]


async def test_funds_are_read_from_the_chain() -> None:
    """Settled and reserved amounts come from the tab, free money from the purse; thawing money does not count."""
    assert await World().view.funds(PAYER.address) == KNOWN


async def test_an_answer_is_good_for_a_while() -> None:
    """Within a few seconds the cached answer is used; later it is returned while a new one is fetched."""
    world = World()
    await world.view.funds(PAYER.address)
    world.tick = 3.0
    await world.view.funds(PAYER.address)
    assert world.escrow.asked == 1
    world.tick, world.escrow.free = 4.0, 8
    assert (await world.view.funds(PAYER.address)).free == 7
    await asyncio.gather(*world.view._funds._reads.values(), return_exceptions=True)
    assert (await world.view.funds(PAYER.address)).free == 8
    world.tick, world.escrow.free = 700.0, 9
    assert (await world.view.funds(PAYER.address)).free == 9


async def test_a_refresh_asks_now_but_not_too_often() -> None:
    """A refresh reads new values, and one payer's refusals cannot cause many reads of the chain."""
    world = World()
    await world.view.funds(PAYER.address)
    world.escrow.free = 8
    assert (await world.view.refresh(PAYER.address)).free == 7
    world.tick = 1.0
    assert (await world.view.refresh(PAYER.address)).free == 8
    assert world.escrow.asked == 2


async def test_one_question_at_a_time() -> None:
    """Concurrent jobs of one payer share one read of the chain."""
    world = World()
    assert await asyncio.gather(*(world.view.funds(PAYER.address) for _ in range(10))) == [KNOWN] * 10
    assert world.escrow.asked == 1


async def test_an_outage_leaves_what_was_known() -> None:
    """While the chain is away, the last answer stays valid and an unknown payer stays unknown; afterwards the view recovers."""
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
    """For some seconds after a failure, nobody waits for the chain."""
    world = World()
    world.escrow.before_read = away
    for _ in range(5):
        assert await world.view.funds(PAYER.address) == Funds()
    assert world.escrow.asked == 1


@on_virtual_time
async def test_a_silent_chain_is_not_waited_for() -> None:
    """If the chain accepts a read and never answers, a job waits for the time limit once."""
    world = World(timeout=0.01)
    world.escrow.before_read = asyncio.Event().wait  # type: ignore[assignment]
    assert await world.view.funds(PAYER.address) == Funds()
    await world.view.close()


async def test_closing_cancels_reads() -> None:
    """After the end no read is running."""
    world = World()
    world.escrow.before_read = asyncio.Event().wait  # type: ignore[assignment]
    asking = asyncio.create_task(world.view.funds(PAYER.address))
    await asyncio.sleep(0)
    await world.view.close()
    assert (await asyncio.gather(asking, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_a_reservation_under_a_release_is_no_security() -> None:
    """During a release, ready or not, nothing counts as reserved, and the view reports the release."""
    for release_at in (1, 1 << 40):
        world = World()
        world.escrow.release_at = release_at
        assert await world.view.funds(PAYER.address) == replace(KNOWN, reserved=Amount(0), releasing=Amount(5))


async def test_nothing_old_is_believed_where_payers_wait_for_seconds_only() -> None:
    """With waits of 8 s, an answer is used for at most 2 s, although it would be used for longer with longer waits."""
    for waits in ((8, 86_400), (86_400, 8)):
        world = World(stale=60.0, fresh=3.0)
        world.escrow.waits = waits
        await world.view.funds(PAYER.address)
        world.escrow.free = 8
        world.tick = 2.0
        assert (await world.view.funds(PAYER.address)).free == 7
        world.tick = 2.1
        assert (await world.view.funds(PAYER.address)).free == 8


async def test_a_payer_that_was_idle_does_not_wait() -> None:
    """Where payers wait for hours, an answer of ten minutes is used while a new one is read; an older one is not."""
    world = World()
    world.escrow.waits = (86_400, 86_400)
    await world.view.funds(PAYER.address)
    world.escrow.free = 8
    world.tick = 600.0
    assert (await world.view.funds(PAYER.address)).free == 7
    await asyncio.gather(*world.view._funds._reads.values())
    assert (await world.view.funds(PAYER.address)).free == 8
    world.escrow.free = 9
    world.tick += 600.1
    assert (await world.view.funds(PAYER.address)).free == 9


async def test_a_silent_chain_keeps_no_reservation_for_ever() -> None:
    """If the chain stops answering, a reservation counts for half the time in which it cannot be taken back, to the second.
    Afterwards only the settled amount is known.
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
    """The age of a slow answer counts from its request, because the value may have been read at once."""
    world = World()
    world.escrow.waits = (86_400, 8)

    async def slow() -> None:
        world.tick += 2.5

    world.escrow.before_read = slow
    await world.view.funds(PAYER.address)
    world.escrow.before_read, world.escrow.free = None, 8
    assert (await world.view.funds(PAYER.address)).free == 8


async def test_a_thaw_of_more_than_there_is() -> None:
    """The thawing amount never exceeds the purse."""
    world = World()
    world.escrow.free = -2
    assert await world.view.funds(PAYER.address) == replace(KNOWN, free=Amount(0), thawing=Amount(0))


async def test_a_coordinators_rate_costs_few_reads() -> None:
    """The registered rate is read once in five minutes; while the chain is away, the last rate is returned."""
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
    """An answer is valid up to and including the end of each period and not afterwards, from any initial clock value."""
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
    """Each period is exact to the second, from any initial clock value."""
    world = World()
    for tick, asked in ((1_000.0, 1), (1_300.0, 1), (1_300.5, 2)):
        world.tick = tick
        await world.view.rate(PROVIDER.address)
        assert world.escrow.rates_asked == asked


async def test_strangers_never_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the given number of payers is remembered, those queried last."""
    monkeypatch.setattr(escrow_view, "_CACHED_ACCOUNTS", 2)
    world = World()
    for number in range(1, 4):
        await world.view.funds(Address(f"0x{number:040x}"))
        assert len(world.view._funds) == min(number, 2)
