"""How the orders of a job are stored: what they share, and what a job costs to write."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.order_writes import NewJob
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.orders.signing import PlacedOrder, terms_for
from tallystick.client.receipts.delivery_check import Delivery
from tallystick.protocol.types import ZERO_HASH, JobId
from tests.client.parties import ALICE, BOB, DOMAIN, NOW_S, PAYER, bill, sign, take

WHOLE = Delivery(200, 50, ZERO_HASH, finished=True)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


async def _order_further(ledger: Ledger, job: JobId) -> list[PlacedOrder]:
    new = NewJob(DOMAIN, PAYER.address, job, "model", "/v1/chat/completions", b"k" * 32, NOW_S + 5)
    terms = terms_for(BOB.ask, job=job, commitment=ZERO_HASH, output_tokens=100, body_bytes=200)
    return await ledger.sign_further_orders(new, [(BOB.address, terms)], sign)


async def _record(ledger: Ledger, job: JobId, placed: PlacedOrder, **changes: Any) -> None:
    signed = ALICE.signer.sign(bill(placed, **changes), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, signed, WHOLE, NOW_S)) is None


async def _columns(ledger: Ledger, names: str) -> list[tuple[Any, ...]]:
    def read(c: Connection) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in c.exec_driver_sql(f"SELECT {names} FROM orders ORDER BY id")]

    return await ledger._database.read(read)


async def test_a_further_order_shares_what_the_job_has_in_its_first(ledger: Ledger) -> None:
    """Its reader and that it was cancelled; whatever the job's columns say, all of its orders say."""
    job, _ = await take(ledger)
    await ledger.mark_cancelled(job)
    assert len(await _order_further(ledger, job)) == 1
    shared = "job, workload, job_state, reason, created_at, finished_at, duration_ms, cancelled, asked_at, reader"
    first, further = await _columns(ledger, shared)
    assert first == further
    assert await _columns(ledger, "cancelled") == [(1,), (1,)]
    await ledger.end_job(job, JobState.LOST, "gone", NOW_S)
    first, further = await _columns(ledger, shared)
    assert first == further
    assert await _order_further(ledger, job) == []


async def test_a_job_of_several_orders_is_one_job(ledger: Ledger) -> None:
    """Lists of jobs have it once: open, ended, and while a receipt is outstanding."""
    job, (alice, bob) = await take(ledger, ALICE, BOB)
    other, _ = await take(ledger)
    await _order_further(ledger, job)
    assert await ledger.unresolved_jobs() == [job, other]
    assert [known.job for known in await ledger.latest_jobs(5)] == [other, job]
    assert [known.job for known in await ledger.latest_jobs(1)] == [other]
    await ledger.end_job(job, JobState.FAILED, "gone", NOW_S, matched=[alice.order.digest, bob.order.digest])
    assert await ledger.unresolved_jobs() == [other]
    assert await ledger.jobs_awaiting_receipts(NOW_S + 60, 60) == [job]
    (all_of_it,) = await ledger.spending(0, ())
    assert (all_of_it.requests, all_of_it.failed) == (1, 1)


async def test_a_receipt_ends_its_job_and_closes_the_other_orders(ledger: Ledger) -> None:
    """All of the job's rows say the same end; only the order of the receipt has it. Orders of other jobs stay open."""
    job, (placed, _) = await take(ledger, ALICE, BOB)
    await take(ledger)
    await _record(ledger, job, placed)
    states = [(OrderState.RECORDED.value, 1), (OrderState.CLOSED.value, None), (OrderState.OPEN.value, None)]
    assert await _columns(ledger, "state, receipt") == states
    completed = (JobState.COMPLETED.value, NOW_S)
    assert await _columns(ledger, "job_state, finished_at") == [completed, completed, (JobState.OPEN.value, None)]


async def test_a_job_costs_nine_statements(ledger: Ledger) -> None:
    """Four to sign its order, five to record its receipt: each costs more than the row that it writes."""
    first, (placed,) = await take(ledger)
    await _record(ledger, first, placed)
    statements: list[str] = []
    connection: Any = ledger._database._backend._writing.connection.dbapi_connection  # type: ignore[attr-defined]
    connection.set_trace_callback(statements.append)
    job, (placed,) = await take(ledger)
    signed = [statement for statement in statements if not statement.startswith(("BEGIN", "COMMIT", "PRAGMA"))]
    statements.clear()
    await _record(ledger, job, placed, seq=2, cumulative_cost=2 * bill(placed).cost)
    recorded = [statement for statement in statements if not statement.startswith(("BEGIN", "COMMIT", "PRAGMA"))]
    assert [statement.split()[0] for statement in signed] == ["SELECT", "UPDATE", "INSERT", "INSERT"]
    assert [statement.split()[0] for statement in recorded] == ["SELECT", "INSERT", "UPDATE", "INSERT", "UPDATE"]
