"""One suite for all stores. PostgreSQL is tested if TALLYSTICK_TEST_POSTGRES names a database."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest

from coordinator.domain.reputation import ProviderRecord
from coordinator.domain.speeds import SpeedRecord
from coordinator.ports import (
    AttemptRecord,
    ClaimStore,
    Cursor,
    JobRecord,
    JobStore,
    ResponseStore,
    Settlement,
    StoredResponse,
    TabStore,
)
from coordinator.storage.memory import MemoryStore
from coordinator.storage.store import ROOM_CHECK_INTERVAL, Store
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Order, Receipt
from tallystick.protocol.types import Address, Amount, JobId
from tests.coordinator.harness import (
    PAYER,
    START,
    make_ask,
    make_claim,
    make_order,
    make_receipt,
    make_terms,
    person,
    unchecked,
)
from tests.postgres import POSTGRES, empty_database

MOST = Amount((1 << 96) - 1)
ANN, BOB = person("ann"), person("bob")
JOB, OTHER = JobId(b"\x01" * 16), JobId(b"\xff" * 16)


class AnyStore(JobStore, TabStore, ResponseStore, ClaimStore, Protocol):
    """All ports that a store implements."""


Reopen = Callable[[], Awaitable[AnyStore]]


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Reopen]:
    """Opens the store, or closes and reopens it."""
    if request.param == "memory":
        memory = MemoryStore()

        async def same() -> AnyStore:
            return memory

        yield same
        return
    if request.param == "postgres" and not POSTGRES:
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    url = f"sqlite:///{tmp_path}/coordinator.db" if request.param == "sqlite" else await empty_database()
    opened: list[Store] = []

    async def again() -> AnyStore:
        if opened:
            await opened.pop().close()
        opened.append(Store(url, segment_jobs=2))
        await opened[0].start()
        return opened[0]

    yield again
    for store in opened:
        await store.close()


@pytest.fixture
async def store(reopen: Reopen) -> AnyStore:
    """An empty store."""
    return await reopen()


def _attempt(provider: Signer, job: JobId = JOB, state: State = State.MATCHED, reason: str = "") -> AttemptRecord:
    ask = make_ask(provider)
    terms = make_terms(ask, job)
    return AttemptRecord(unchecked(make_order(terms, provider.address)), terms, state, reason)


def _record(*attempts: AttemptRecord, job: JobId = JOB, state: State = State.MATCHED, created_at: int = START) -> JobRecord:
    listed = attempts or (_attempt(ANN, job),)
    return JobRecord(job, PAYER.address, state, created_at, None if state is State.MATCHED else created_at + 9, listed)


def _receipt(provider: Signer = ANN, job: JobId = JOB, **changes: object) -> Verified[Receipt]:
    terms = make_terms(make_ask(provider), job)
    return make_receipt(provider, make_order(terms, provider.address), terms, **changes)


async def _known(store: JobStore, job: JobId = JOB) -> JobRecord:
    known = await store.job(job)
    assert known is not None
    return known.record


# Jobs and receipts


async def test_an_unknown_job(store: AnyStore) -> None:
    """A job that was never stored is unknown."""
    assert await store.job(JOB) is None


async def test_a_noted_job_is_read_back_whole(store: AnyStore) -> None:
    """A stored job is read back whole, with the order and terms of each attempt and any text in it."""
    reason = "quotes ' \" and \x00 and \N{SNOWMAN} and \\u0000"
    record = _record(_attempt(ANN, state=State.FAILED, reason=reason), _attempt(BOB))
    store.enqueue_job(record)
    assert await _known(store) == record


async def test_what_was_noted_is_seen_at_once(store: AnyStore) -> None:
    """A read sees all earlier queued writes, so the end of a job is never missed."""
    for state in (State.MATCHED, State.COMPLETED):
        store.enqueue_job(_record(state=state))
        assert (await _known(store)).state is state


async def test_a_terminal_state_stays(store: AnyStore) -> None:
    """A terminal state is never replaced."""
    ended = _record(state=State.EXPIRED)
    store.enqueue_job(_record())
    store.enqueue_job(ended)
    store.enqueue_job(_record())
    store.enqueue_job(_record(state=State.COMPLETED))
    await store.put_receipt(JOB, _receipt(), Amount(20), _record(state=State.COMPLETED))
    assert await _known(store) == ended


async def test_a_receipt_with_the_end_of_its_job(store: AnyStore) -> None:
    """A receipt and its job's final state are stored together."""
    store.enqueue_job(_record())
    await store.put_receipt(JOB, _receipt(), Amount(20), _record(state=State.COMPLETED))
    known = await store.job(JOB)
    assert known is not None
    assert (known.record.state, known.receipt) == (State.COMPLETED, unchecked(_receipt()))


async def test_a_late_receipt_leaves_the_job_alone(store: AnyStore) -> None:
    """A receipt without a state does not change its job."""
    store.enqueue_job(_record(state=State.FAILED))
    await store.put_receipt(JOB, _receipt(), Amount(20))
    known = await store.job(JOB)
    assert known is not None
    assert (known.record.state, known.receipt) == (State.FAILED, unchecked(_receipt()))


async def test_the_first_receipt_of_an_attempt_stays(store: AnyStore) -> None:
    """Storing a receipt again changes nothing, and another one does not replace it."""
    store.enqueue_job(_record())
    for receipt in (_receipt(), _receipt(), _receipt(seq=2)):
        await store.put_receipt(JOB, receipt, Amount(20))
    known = await store.job(JOB)
    assert known is not None
    assert known.receipts == {ANN.address: unchecked(_receipt())}


async def test_each_attempt_has_its_receipt(store: AnyStore) -> None:
    """Receipts of two providers for one job are both stored; the job's receipt is that of the latest attempt."""
    store.enqueue_job(_record(_attempt(ANN), _attempt(BOB)))
    for provider in (ANN, BOB):
        await store.put_receipt(JOB, _receipt(provider), Amount(20))
    known = await store.job(JOB)
    assert known is not None
    assert set(known.receipts) == {ANN.address, BOB.address}
    assert known.receipt == unchecked(_receipt(BOB))


async def test_the_largest_numbers(store: AnyStore, reopen: Reopen) -> None:
    """Totals of 96 bits and seqs of 63 bits are stored exactly and compared as numbers."""
    for job, total in ((JOB, MOST), (OTHER, Amount(9))):
        receipt = _receipt(job=job, seq=(1 << 63) - 1, cumulative_cost=MOST)
        await store.put_receipt(job, receipt, total, _record(job=job, state=State.COMPLETED))
    recalled = await (await reopen()).load_state(START, START)
    assert recalled.totals == {(PAYER.address, ANN.address): MOST}
    assert all(isinstance(total, Amount) for total in recalled.totals.values())


# State recovery


async def test_recent_jobs_are_recalled(store: AnyStore, reopen: Reopen) -> None:
    """A new process loads the jobs created since a time, that second included, and no older ones."""
    store.enqueue_job(_record(state=State.COMPLETED))
    store.enqueue_job(_record(job=OTHER, state=State.COMPLETED, created_at=START - 1))
    store = await reopen()
    assert (await store.load_state(START + 5, START)).jobs == (JOB,)
    assert set((await store.load_state(START + 5, START - 1)).jobs) == {JOB, OTHER}


async def test_each_tabs_highest_total_is_recalled(store: AnyStore, reopen: Reopen) -> None:
    """A tab's total is the highest of its receipts, in any order of arrival; tabs do not mix."""
    for number, total in enumerate((999, 1_000, 20)):
        job = JobId(bytes([number] * 16))
        await store.put_receipt(job, _receipt(), Amount(total), _record(job=job, state=State.COMPLETED))
    await store.put_receipt(OTHER, _receipt(BOB), Amount(7), _record(_attempt(BOB), job=OTHER, state=State.COMPLETED))
    recalled = await (await reopen()).load_state(START, START)
    assert recalled.totals == {(PAYER.address, ANN.address): 1_000, (PAYER.address, BOB.address): 7}


async def test_open_jobs_are_ended(store: AnyStore, reopen: Reopen) -> None:
    """Jobs that a former process left open end as failed, with the reason; ended jobs are not changed."""
    store.enqueue_job(_record(_attempt(ANN, state=State.FAILED, reason="away"), _attempt(BOB)))
    ended = _record(_attempt(ANN, OTHER, State.CANCELLED), job=OTHER, state=State.CANCELLED)
    store.enqueue_job(ended)
    store = await reopen()
    await store.load_state(START + 99, START)
    record = await _known(store)
    assert (record.state, record.finished_at) == (State.FAILED, START + 99)
    assert [(a.state, a.reason) for a in record.attempts] == [
        (State.FAILED, "away"),
        (State.FAILED, "the coordinator was restarted"),
    ]
    assert await _known(store, OTHER) == ended


async def test_an_end_that_nobody_saw_is_corrected_once(store: AnyStore, reopen: Reopen) -> None:
    """A receipt's end replaces the failure that a restart assumed, also on disk; a seen or a corrected end stays."""
    store.enqueue_job(_record())
    seen = _record(_attempt(ANN, OTHER, State.FAILED, "away"), job=OTHER, state=State.FAILED)
    store.enqueue_job(seen)
    store = await reopen()
    await store.load_state(START + 99, START)
    failed = await _known(store)
    for state in (State.COMPLETED, State.CANCELLED):
        attempt = replace(failed.attempts[0], state=state, reason="told")
        late = replace(failed, state=state, attempts=(attempt,))
        await store.put_receipt(late.job, _receipt(), Amount(5), late)
        if state is State.COMPLETED:
            corrected = late
    end = replace(seen, state=State.COMPLETED, attempts=(replace(seen.attempts[0], state=State.COMPLETED),))
    await store.put_receipt(OTHER, _receipt(job=OTHER), Amount(6), end)
    for _ in range(2):
        assert (await _known(store), await _known(store, OTHER)) == (corrected, seen)
        store = await reopen()
        assert (await store.load_state(START + 200, START)).totals == {(PAYER.address, ANN.address): 6}


async def test_what_an_attempt_relayed_is_kept(store: AnyStore, reopen: Reopen) -> None:
    """The flags delivered and cancelled are read back as stored; the end of an attempt that a process left open is unseen."""
    marked = replace(_attempt(ANN, state=State.FAILED), delivered=True, cancelled=True)
    store.enqueue_job(_record(marked, _attempt(BOB)))
    store = await reopen()
    assert (await _known(store)).attempts[0] == marked
    await store.load_state(START + 99, START)
    assert [(a.delivered, a.cancelled, a.unseen) for a in (await _known(store)).attempts] == [
        (True, True, False),
        (False, False, True),
    ]


async def test_what_providers_are_known_for_is_kept(store: AnyStore, reopen: Reopen) -> None:
    """The newest record of each provider is loaded exactly."""
    store.enqueue_provider_records({ANN.address: ProviderRecord(1.0, 0.1, 2), BOB.address: ProviderRecord(1 / 3, 7.25, 9)})
    measured = {(ANN.address, "m"): SpeedRecord(1 / 3, 2.5, 7.0, 4, 5), (ANN.address, "n"): SpeedRecord()}
    store.enqueue_provider_records({ANN.address: ProviderRecord(2.0, 0.1 + 0.2, 3)}, measured)
    store.enqueue_provider_records({}, {(ANN.address, "n"): SpeedRecord(outputs=1)})
    recalled = await (await reopen()).load_state(START, START)
    assert recalled.speeds == measured | {(ANN.address, "n"): SpeedRecord(outputs=1)}
    assert recalled.records == {ANN.address: ProviderRecord(2.0, 0.1 + 0.2, 3), BOB.address: ProviderRecord(1 / 3, 7.25, 9)}


async def test_an_empty_store_recalls_nothing(store: AnyStore) -> None:
    """The first start loads nothing."""
    recalled = await store.load_state(START, 0)
    assert (recalled.jobs, recalled.totals) == ((), {})


async def test_closing_keeps_what_was_noted(store: AnyStore, reopen: Reopen) -> None:
    """A close writes the queue."""
    record = _record(state=State.COMPLETED)
    store.enqueue_job(record)
    assert await _known(await reopen()) == record


async def test_the_last_receipt_of_each_tab(store: AnyStore) -> None:
    """Returns a provider's last receipts by payer, in pages, with order and terms; not those of another provider."""
    payers = sorted((person(name) for name in ("p", "q", "r")), key=lambda payer: payer.address)
    last: list[LateReceipt] = []
    for number, payer in enumerate(payers):
        for seq in (1, 2, 10):
            for provider in (ANN, BOB):
                job = JobId(bytes([number, seq, provider is BOB]) + bytes(13))
                terms = make_terms(make_ask(provider), job)
                order = make_order(terms, provider.address, payer)
                receipt = make_receipt(provider, order, terms, seq=seq, cumulative_cost=Amount(1_000 * seq))
                attempt = AttemptRecord(unchecked(order), terms, State.COMPLETED)
                record = JobRecord(job, payer.address, State.COMPLETED, START, START, (attempt,))
                await store.put_receipt(job, receipt, Amount(1_000 * seq), record)
                if (seq, provider) == (10, ANN):
                    last.append(LateReceipt(unchecked(receipt), unchecked(order), terms))
    assert await store.last_receipts(ANN.address, "", 10) == last
    assert await store.last_receipts(ANN.address, "", 2) == last[:2]
    assert await store.last_receipts(ANN.address, payers[1].address, 2) == last[2:]
    assert await store.last_receipts(person("nobody").address, "", 10) == []
    first, *others = await store.receipts_of(payers[1].address, ANN.address, 2)
    assert first == last[1], "highest total first, not by digits"
    assert [late_receipt.receipt.message.seq for late_receipt in others] == [2]
    assert len(await store.receipts_of(payers[1].address, ANN.address, 9)) == 3
    assert await store.receipts_of(person("nobody").address, ANN.address, 9) == []


# Answers


async def test_answers_outlive_a_process(store: AnyStore, reopen: Reopen) -> None:
    """A stored response is there for the next process, until it is too old or replaced."""
    first, second = (
        StoredResponse(job, b"\x05" * 32, bytes(range(256)), START + n, PAYER.address) for n, job in enumerate((JOB, OTHER))
    )
    await store.put_response(first, since=START, max_bytes=10_000)
    await store.put_response(second, since=START, max_bytes=10_000)
    store = await reopen()
    assert [await store.response(stored.job, START) for stored in (first, second)] == [first, second]
    assert await store.response(JOB, START + 1) is None, "too old to be given"
    await store.put_response(replace(second, frames=b"anew"), since=START + 1, max_bytes=10_000)
    assert await store.response(JOB, START) is None, "too old to be kept"
    assert await store.response(OTHER, START) == replace(second, frames=b"anew")


async def test_a_payers_flood_of_answers_does_not_push_out_another_payers(store: AnyStore) -> None:
    """When the space is used up, the payer that holds most loses its oldest responses; others lose nothing."""
    paid = StoredResponse(JOB, bytes(32), bytes(900), START, PAYER.address)
    await store.put_response(paid, since=0, max_bytes=5_000)
    flood = [JobId(number.to_bytes(16, "big")) for number in range(1, 4 * ROOM_CHECK_INTERVAL)]
    for number, job in enumerate(flood):
        await store.put_response(
            StoredResponse(job, bytes(32), bytes(1_000), START + number, ANN.address), since=0, max_bytes=5_000
        )
    assert await store.response(JOB, 0) == paid
    kept = [job for job in flood if await store.response(job, 0) is not None]
    assert kept == flood[-len(kept) :]
    assert 4 <= len(kept) < 4 + ROOM_CHECK_INTERVAL


# Claims and settlements


def _order(provider: Signer = ANN, **changes: object) -> Verified[Order]:
    return make_order(make_terms(make_ask(provider), JOB), provider.address, **changes)  # type: ignore[arg-type]


async def test_claims_wait_in_order(store: AnyStore, reopen: Reopen) -> None:
    """Claims stay pending, oldest first, until they are closed, over a restart too."""
    claims = [make_claim(ANN, (_order(), seq, 20 * seq)) for seq in (1, 2, 3)]
    for claim in claims:
        await store.put_claim(claim, START)
    store = await reopen()
    pending = await store.pending_claims(2)
    assert [each.request for each in pending] == claims[:2]
    await store.close_claims([each.id for each in pending], "0x01")
    assert [each.request for each in await store.pending_claims(9)] == claims[2:]


async def test_providers_take_turns(store: AnyStore) -> None:
    """The oldest claim of each provider comes before the second of any; skipped providers are left out."""
    claims = [make_claim(ANN, (_order(), seq, 20 * seq)) for seq in (1, 2, 3)]
    claims += [make_claim(BOB, (_order(BOB), seq, 20 * seq)) for seq in (1, 2)]
    for claim in claims:
        await store.put_claim(claim, START)
    turns = [0, 3, 1, 4, 2]
    assert [each.request for each in await store.pending_claims(9)] == [claims[turn] for turn in turns]
    assert [each.request for each in await store.pending_claims(3)] == [claims[turn] for turn in turns[:3]]
    assert [each.request for each in await store.pending_claims(9, [ANN.address])] == claims[3:]


async def test_so_many_claims_of_a_provider_wait_and_no_more(store: AnyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim beyond the limit is refused, a pending one may come again, and claims closed without a transaction make room."""
    for module in ("coordinator.storage.memory", "coordinator.storage.store"):
        monkeypatch.setattr(f"{module}.WAITING_CLAIMS", 2)
    claims = [make_claim(ANN, (_order(), seq, 20 * seq)) for seq in range(1, 6)]
    for claim in claims[:2]:
        await store.put_claim(claim, START)
    with pytest.raises(Unavailable) as caught:
        await store.put_claim(claims[2], START)
    assert caught.value.code is Code.RATE_LIMITED
    await store.put_claim(claims[1], START)
    await store.put_claim(make_claim(BOB, (_order(BOB), 1, 20)), START)
    first, _, second = await store.pending_claims(9)
    await store.close_claims([first.id], "0x01")
    await store.close_claims([second.id], "nothing owed")
    await store.put_claim(claims[3], START)
    await store.forget_settlements()
    waiting = [each.request for each in await store.pending_claims(9, [BOB.address])]
    assert waiting == [claims[0], claims[3]], "what was sent is sent again where the chain took it back"


async def test_a_claim_that_comes_again_waits_once(store: AnyStore) -> None:
    """The same claim is stored once however often it arrives, and becomes pending again after it was closed."""
    claim = make_claim(ANN, (_order(), 1, 20))
    await store.put_claim(claim, START)
    await store.put_claim(claim, START + 1)
    (pending,) = await store.pending_claims(9)
    await store.close_claims([pending.id], "0x01")
    assert await store.pending_claims(9) == []
    await store.put_claim(claim, START + 2)
    assert await store.pending_claims(9) == [pending]


async def test_closing_nothing(store: AnyStore) -> None:
    """Closing no claims, or closed claims, is no error."""
    await store.put_claim(make_claim(ANN, (_order(), 1, 20)), START)
    (pending,) = await store.pending_claims(9)
    for ids in ([], [pending.id], [pending.id]):
        await store.close_claims(ids, "nothing owed")
    assert await store.pending_claims(9) == []


def _settlement(settled: int, payer: Address = PAYER.address, block: int = 7) -> Settlement:
    return Settlement(payer, ANN.address, Amount(settled), "0x" + "ab" * 32, block)


async def test_settlements_and_cursor_are_kept_together(store: AnyStore, reopen: Reopen) -> None:
    """Settlements and the cursor are stored together."""
    assert await store.cursor() is None
    assert await store.settlement(PAYER.address, ANN.address) is None
    await store.put_settlements([_settlement(MOST)], Cursor(8, "0xcd"))
    store = await reopen()
    assert await store.cursor() == Cursor(8, "0xcd")
    settlement = await store.settlement(PAYER.address, ANN.address)
    assert settlement == _settlement(MOST)
    assert settlement is not None
    assert isinstance(settlement.settled, Amount)


async def test_the_last_settlement_of_a_tab_stands(store: AnyStore) -> None:
    """Later settlements replace earlier ones, within one page too; repeating a page changes nothing."""
    page = [_settlement(10), _settlement(5, BOB.address), _settlement(30, block=8)]
    for _ in range(2):
        await store.put_settlements(page, Cursor(9))
        assert await store.settlement(PAYER.address, ANN.address) == _settlement(30, block=8)
        assert await store.settlement(BOB.address, ANN.address) == _settlement(5, BOB.address)
    await store.put_settlements([], Cursor(12, "0xab"))
    assert await store.cursor() == Cursor(12, "0xab")


async def test_forgetting_settlements(store: AnyStore, reopen: Reopen) -> None:
    """After a deep reorganisation everything is read again and sent claims are pending again; refused ones are not."""
    sent, refused = (make_claim(ANN, (_order(), seq, 20 * seq)) for seq in (1, 2))
    for claim, tx in ((sent, "0x" + "ab" * 32), (refused, "nothing owed")):
        await store.put_claim(claim, START)
        (pending,) = await store.pending_claims(9)
        await store.close_claims([pending.id], tx)
    await store.put_settlements([_settlement(10)], Cursor(9, "0xab"))
    await store.forget_settlements()
    store = await reopen()
    assert (await store.cursor(), await store.settlement(PAYER.address, ANN.address)) == (None, None)
    assert [claim.request for claim in await store.pending_claims(9)] == [sent]


# Databases only


async def test_a_database_that_does_not_answer() -> None:
    """A database that cannot be reached raises Unavailable at the start, and the store can still be closed."""
    store = Store("postgresql+asyncpg://nobody@127.0.0.1:1/nothing")
    with pytest.raises(Unavailable, match="database"):
        await store.start()
    await store.close()


async def test_a_closed_store_refuses(tmp_path: Path) -> None:
    """A closed store refuses all writes, with an error that says so."""
    store = Store(f"sqlite:///{tmp_path}/coordinator.db")
    await store.start()
    await store.close()
    with pytest.raises(Unavailable, match="closed") as caught:
        store.enqueue_job(_record())
    assert caught.value.code is Code.DATABASE_UNAVAILABLE
    with pytest.raises(Unavailable):
        await store.put_receipt(JOB, _receipt(), Amount(1))
    with pytest.raises(Unavailable):
        await store.job(JOB)


async def test_what_was_stored_survives_a_kill(tmp_path: Path) -> None:
    """When a write returns, its data is on disk: a copy of the files, as a crash would leave them, has it all."""
    store = Store(f"sqlite:///{tmp_path}/coordinator.db")
    await store.start()
    store.enqueue_job(_record())
    await store.put_receipt(JOB, _receipt(), Amount(20), _record(state=State.COMPLETED))
    await store.put_claim(make_claim(ANN, (_order(), 1, 20)), START)
    await asyncio.to_thread(shutil.copytree, tmp_path, tmp_path.with_name("crashed"))
    await store.close()
    settlement = Store(f"sqlite:///{tmp_path.with_name('crashed')}/coordinator.db")
    await settlement.start()
    known = await settlement.job(JOB)
    assert known is not None
    assert (known.record.state, known.receipt) == (State.COMPLETED, unchecked(_receipt()))
    assert len(await settlement.pending_claims(9)) == 1
    await settlement.close()


async def test_one_bad_write_does_not_take_others_with_it(tmp_path: Path) -> None:
    """Writes that share a transaction with a failing one are stored."""
    store = Store(f"sqlite:///{tmp_path}/coordinator.db")
    await store.start()
    good, bad = _record(), replace(_record(), job=OTHER, created_at=1 << 70)
    store.enqueue_job(bad)
    store.enqueue_job(good)
    assert await _known(store) == good
    assert await store.job(OTHER) is None
    await store.close()


@pytest.mark.skipif(os.name != "posix", reason="the lock on a file is POSIX's")
async def test_a_second_coordinator_does_not_end_the_firsts_jobs(tmp_path: Path) -> None:
    """While a coordinator uses a database, a second one neither starts on it nor ends its open jobs."""
    url = f"sqlite:///{tmp_path}/coordinator.db"
    first, second = Store(url), Store(url)
    await first.start()
    terms = make_terms(make_ask(ANN), JOB)
    attempt = AttemptRecord(unchecked(make_order(terms, ANN.address)), terms, State.RUNNING)
    first.enqueue_job(JobRecord(JOB, PAYER.address, State.RUNNING, START, None, (attempt,)))
    with pytest.raises(Unavailable, match="runs a coordinator on the database"):
        await second.start()
    await second.close()
    known = await first.job(JOB)
    assert known is not None
    assert known.record.state is State.RUNNING
    await first.close()
    third = Store(url)
    await third.start()
    await third.load_state(START, 0)
    known = await third.job(JOB)
    assert known is not None
    assert known.record.state is State.FAILED
    await third.close()
