from __future__ import annotations

import asyncio

import pytest

from coordinator.chain import escrow_cache as module
from coordinator.chain.escrow_cache import EscrowCache
from tallystick.chain.escrow import Purse
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Address
from tests.coordinator.fake_escrow import FakeEscrow
from tests.coordinator.harness import PAYER, Clock, person, quiet

ANN = person("ann").address


class _SlowEscrow(FakeEscrow):
    """An escrow that answers only when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.gate.set()

    async def purse(self, key: Address, *, block: str = "latest") -> Purse:
        await self.gate.wait()
        return await super().purse(key, block=block)


def _make(ttl: float = 5) -> tuple[EscrowCache, _SlowEscrow, Clock]:
    escrow, clock = _SlowEscrow(), Clock()
    escrow.free[PAYER.address] = 100
    escrow.reserved[PAYER.address, ANN] = 30
    escrow.settled[PAYER.address, ANN] = 20
    return EscrowCache(escrow, ttl, clock.tick), escrow, clock


async def _free(funds: EscrowCache, *, fresh: bool = False) -> int:
    return (await funds.backing(PAYER.address, ANN, fresh=fresh)).free


async def test_the_chain_is_asked_once() -> None:
    """All figures of a pair come from one read, which serves while it is fresh."""
    funds, escrow, clock = _make()
    backing = await funds.backing(PAYER.address, ANN)
    assert (backing.free, backing.reserved, backing.settled) == (100, 30, 20)
    clock.seconds = 4.9
    await _free(funds)
    assert escrow.reads == 1


async def test_old_figures_serve_while_new_ones_are_read() -> None:
    """A known payer never waits for the chain: old figures serve while new ones are read."""
    funds, escrow, clock = _make()
    await _free(funds)
    escrow.free[PAYER.address] = 50
    clock.seconds = 5.1
    assert await _free(funds) == 100
    await quiet()
    assert await _free(funds) == 50
    assert escrow.reads == 2


async def test_a_fresh_answer_is_fresh() -> None:
    """A request for a fresh answer waits for it, however recent the known one is."""
    funds, escrow, _ = _make()
    await _free(funds)
    escrow.free[PAYER.address] = 50
    assert await _free(funds, fresh=True) == 50


async def test_concurrent_callers_share_a_read() -> None:
    """Many new jobs of one payer cause one read."""
    funds, escrow, _ = _make()
    assert await asyncio.gather(*(_free(funds) for _ in range(50))) == [100] * 50
    assert escrow.reads == 1


async def test_a_cancelled_caller_does_not_affect_others() -> None:
    """A read continues when one of the tasks that wait for it is cancelled."""
    funds, escrow, _ = _make()
    escrow.gate.clear()
    first, second = asyncio.create_task(_free(funds)), asyncio.create_task(_free(funds))
    await quiet()
    first.cancel()
    escrow.gate.set()
    assert await second == 100


async def test_a_chain_that_is_down() -> None:
    """While the chain is down, a known payer gets known figures; a stranger and a request for fresh figures get Unavailable."""
    funds, escrow, clock = _make()
    await _free(funds)
    escrow.down = True
    clock.seconds = 60
    assert await _free(funds) == 100
    await quiet()
    with pytest.raises(Unavailable) as caught:
        await _free(funds, fresh=True)
    assert caught.value.code is Code.CHAIN_UNAVAILABLE
    with pytest.raises(Unavailable):
        await funds.backing(person("stranger").address, ANN)
    escrow.down = False
    assert await _free(funds, fresh=True) == 100


async def test_a_chain_that_is_down_is_not_asked_by_every_job() -> None:
    """After a failure the chain is not read again while figures count as fresh."""
    funds, escrow, clock = _make()
    await _free(funds)
    escrow.down = True
    clock.seconds = 60
    for _ in range(20):
        assert await _free(funds) == 100
        await quiet()
    assert escrow.reads == 2


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs that were requested longest ago are forgotten first."""
    monkeypatch.setattr(module, "_CACHED_PAIRS", 3)
    funds, escrow, _ = _make()
    for number in range(5):
        await funds.backing(person(str(number)).address, ANN)
    assert len(funds._backings) == 3
    await funds.backing(person("4").address, ANN)
    assert escrow.reads == 5
    await funds.backing(person("0").address, ANN)
    assert escrow.reads == 6


async def test_closing_stops_reading() -> None:
    """After the close nothing is read, and no task is left running."""
    funds, escrow, _ = _make()
    escrow.gate.clear()
    waiting = asyncio.create_task(_free(funds))
    await quiet()
    await funds.close()
    await asyncio.gather(waiting, return_exceptions=True)
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("funds")] == []


async def test_stakes_are_read_once_a_minute() -> None:
    """A chain that is down raises Unavailable, and no stake is invented."""
    funds, escrow, clock = _make()
    escrow.stakes[ANN] = 7
    assert await asyncio.gather(*(funds.stake(ANN) for _ in range(3))) == [7, 7, 7]
    assert await funds.stake(ANN) == 7
    assert escrow.reads == 1
    escrow.stakes[ANN] = 0
    clock.seconds = 60.1
    assert await funds.stake(ANN) == 0
    escrow.down = True
    clock.seconds = 120.2
    with pytest.raises(Unavailable):
        await funds.stake(ANN)


@pytest.mark.parametrize("release_at", [1, 1_700_000_000, 1 << 40])
async def test_what_can_leave_is_no_security(release_at: int) -> None:
    """Funds that can leave count as nothing: a reservation under a release, and the part of the free balance that thaws."""
    funds, escrow, _ = _make()
    escrow.release_at[PAYER.address, ANN] = release_at
    escrow.thawing[PAYER.address] = 60
    backing = await funds.backing(PAYER.address, ANN)
    assert (backing.free, backing.reserved, backing.settled) == (40, 0, 20)


async def test_a_purse_that_thaws_whole_covers_nothing() -> None:
    """A purse that is being withdrawn whole covers no new job, and is still known."""
    funds, escrow, _ = _make()
    escrow.thawing[PAYER.address] = 100
    backing = await funds.backing(PAYER.address, ANN)
    assert (backing.free, backing.opened) == (0, True)
    assert not (await funds.backing(person("stranger").address, ANN)).opened


async def test_old_figures_do_not_serve_for_ever() -> None:
    """Figures 120 times older than `ttl` are read again before a job is admitted on them, if the chain answers."""
    funds, escrow, clock = _make()
    await _free(funds)
    escrow.free[PAYER.address] = 0
    clock.seconds = 599
    assert await _free(funds) == 100
    await quiet()
    escrow.free[PAYER.address] = 7
    clock.seconds += 600.1
    assert await _free(funds) == 7
    escrow.down = True
    clock.seconds += 600.1
    assert await _free(funds) == 7


async def test_a_stranger_costs_one_read() -> None:
    """A payer without a purse has no tab worth reading."""
    funds, escrow, _ = _make()
    await funds.backing(person("stranger").address, ANN)
    assert (escrow.reads, escrow.tab_reads) == (1, 0)
