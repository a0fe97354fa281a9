"""Totals of a payer's tabs that other replicas may have raised."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from coordinator.domain.exposure import Exposure
from coordinator.jobs import payer_totals as module
from coordinator.jobs.payer_totals import HINT_SECONDS, RELOAD_SECONDS, PayerTotals
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.types import Address, Amount
from tests.coordinator.harness import Clock, person

ANN, PAYER, OTHER = (person(name).address for name in ("ann", "payer", "other"))


class Database:
    """Tabs as they are stored, and who was looked up."""

    def __init__(self) -> None:
        self.total, self.settled, self.reads, self.down = 50, 20, list[Address](), False

    async def load(self, payer: Address) -> Iterable[tuple[Address, Amount, Amount]]:
        if self.down:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "away")
        self.reads.append(payer)
        return [(ANN, Amount(self.total), Amount(self.settled))]


async def test_totals_only_rise() -> None:
    """What is read raises the tab as it is counted here, and never lowers it."""
    clock, database, exposure = Clock(), Database(), Exposure()
    totals = PayerTotals(exposure, database.load, clock.tick)
    for total, settled, expected in ((50, 20, (50, 20)), (40, 10, (50, 20)), (60, 30, (60, 30))):
        database.total, database.settled = total, settled
        await totals.refresh(PAYER)
        tab = exposure.known(PAYER, ANN)
        assert tab is not None
        assert (tab.cumulative, tab.settled) == expected
        clock.seconds += RELOAD_SECONDS


async def test_one_read_in_a_while() -> None:
    """A payer is read once in RELOAD_SECONDS, each payer for itself, and after `forget` again."""
    clock, database = Clock(), Database()
    totals = PayerTotals(Exposure(), database.load, clock.tick)
    for payer in (PAYER, PAYER, OTHER, PAYER):
        await totals.refresh(payer)
    assert database.reads == [PAYER, OTHER]
    clock.seconds += RELOAD_SECONDS - 0.1
    await totals.refresh(PAYER)
    assert len(database.reads) == 2
    clock.seconds += 0.1
    await totals.refresh(PAYER)
    totals.forget()
    await totals.refresh(OTHER)
    assert database.reads == [PAYER, OTHER, PAYER, OTHER]


async def test_a_failed_read_is_repeated() -> None:
    """An error counts as no read."""
    database = Database()
    totals = PayerTotals(Exposure(), database.load, Clock().tick)
    database.down = True
    with pytest.raises(Unavailable):
        await totals.refresh(PAYER)
    database.down = False
    await totals.refresh(PAYER)
    assert database.reads == [PAYER]


async def test_remembered_payers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many payers, those that were read longest ago are forgotten."""
    monkeypatch.setattr(module, "MAX_PAYERS", 2)
    database = Database()
    totals = PayerTotals(Exposure(), database.load, Clock().tick)
    payers = [person(str(number)).address for number in range(3)]
    for payer in (*payers, payers[2], payers[1], payers[0]):
        await totals.refresh(payer)
    assert database.reads == [*payers, payers[0]]


async def test_a_hint_makes_the_next_read_sooner() -> None:
    """A payer of whom a notice came is read HINT_SECONDS after its last read, once for all notices; nobody else is."""
    clock, database = Clock(), Database()
    totals = PayerTotals(Exposure(), database.load, clock.tick)
    totals.hint(PAYER)
    assert totals._hinted == set(), "it has not come yet"
    for payer in (PAYER, OTHER):
        await totals.refresh(payer)
    for _ in range(3):
        totals.hint(PAYER)
    clock.seconds += HINT_SECONDS - 0.1
    await totals.refresh(PAYER)
    assert database.reads == [PAYER, OTHER]
    clock.seconds += 0.1
    for payer in (PAYER, OTHER, PAYER):
        await totals.refresh(payer)
    assert database.reads == [PAYER, OTHER, PAYER]
    clock.seconds += HINT_SECONDS
    await totals.refresh(PAYER)
    assert len(database.reads) == 3


async def test_a_hint_outlives_a_failed_read() -> None:
    """A read that failed is repeated with the next job."""
    clock, database = Clock(), Database()
    totals = PayerTotals(Exposure(), database.load, clock.tick)
    await totals.refresh(PAYER)
    totals.hint(PAYER)
    clock.seconds, database.down = clock.seconds + HINT_SECONDS, True
    with pytest.raises(Unavailable):
        await totals.refresh(PAYER)
    database.down = False
    await totals.refresh(PAYER)
    assert database.reads == [PAYER, PAYER]


async def test_jobs_of_one_payer_share_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many jobs at once cause one read; a hint that comes while it goes on causes another one later."""
    clock, database, started, done = Clock(), Database(), asyncio.Event(), asyncio.Event()

    async def load(payer: Address) -> Iterable[tuple[Address, Amount, Amount]]:
        result = await database.load(payer)
        started.set()
        await done.wait()
        return result

    monkeypatch.setattr(module, "MAX_PAYERS", 1)
    totals = PayerTotals(Exposure(), load, clock.tick)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        done.set()
        await totals.refresh(PAYER)
        done.clear()
        started.clear()
        clock.seconds += RELOAD_SECONDS
        for _ in range(5):
            group.create_task(totals.refresh(PAYER))
        await started.wait()
        totals.hint(PAYER)
        done.set()
    assert database.reads == [PAYER, PAYER]
    clock.seconds += HINT_SECONDS
    await totals.refresh(PAYER)
    assert len(database.reads) == 3
    totals.hint(PAYER)
    await totals.refresh(OTHER)
    assert totals._hinted == set(), "the payer is forgotten"


async def test_what_a_payer_has_in_flight_at_several_replicas() -> None:
    """Each replica admits the purse once, and no more; once the receipts are stored, every replica refuses the next job."""
    purse, stored = Amount(100), dict[Address, Amount]()

    async def load(_payer: Address) -> Iterable[tuple[Address, Amount, Amount]]:
        return [(provider, total, Amount(0)) for provider, total in stored.items()]

    clock, replicas = Clock(), [Exposure() for _ in range(3)]
    readers = [PayerTotals(exposure, load, clock.tick) for exposure in replicas]
    providers = [person(f"provider {number}").address for number in range(3)]
    for exposure, reader, provider in zip(replicas, readers, providers, strict=True):
        await reader.refresh(PAYER)
        exposure.admit(PAYER, provider, purse, purse)
        for other in providers:
            with pytest.raises(Refusal, match="what is owed"):
                exposure.admit(PAYER, other, Amount(1), purse)
    assert sum(exposure.in_flight for exposure in replicas) == 3 * purse
    for exposure, provider in zip(replicas, providers, strict=True):
        stored[provider] = purse
        exposure.release(PAYER, provider, purse)
    for reader in readers:
        reader.hint(PAYER)
    clock.seconds += HINT_SECONDS
    for exposure, reader in zip(replicas, readers, strict=True):
        await reader.refresh(PAYER)
        assert exposure._uncovered[PAYER] == 3 * purse
        with pytest.raises(Refusal, match="what is owed"):
            exposure.admit(PAYER, ANN, Amount(1), purse)
