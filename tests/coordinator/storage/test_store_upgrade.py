"""What release 0.1 stored is read: orders, terms and receipts as JSON."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.ports import AttemptRecord, JobRecord
from coordinator.storage.store import Store
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.types import Amount, JobId
from tests.coordinator.harness import PAYER, START, make_ask, make_order, make_receipt, make_terms, person, unchecked

ANN, BOB = person("ann"), person("bob")
JOB = JobId(b"\x01" * 16)


@pytest.mark.parametrize("state", [State.COMPLETED, State.RUNNING])
async def test_jobs_and_receipts_of_an_older_release_are_read(tmp_path: Path, state: State) -> None:
    """Also by the queries that start from a tab, and by the start that ends open jobs."""
    attempts, docs = [], []
    for provider, ended in ((ANN, State.FAILED), (BOB, state)):
        terms = make_terms(make_ask(provider), JOB)
        attempts.append(AttemptRecord(unchecked(make_order(terms, provider.address)), terms, ended, "because"))
        order = attempts[-1].order.to_json()
        docs.append({"order": order, "terms": terms.to_json(), "state": ended.value, "reason": "because"})
    receipt = make_receipt(BOB, make_order(attempts[1].terms, BOB.address), attempts[1].terms)
    store = Store(f"sqlite:///{tmp_path}/coordinator.db")
    await store.start()
    store.enqueue_job(JobRecord(JOB, PAYER.address, state, START, START, tuple(attempts)))
    await store.put_receipt(JOB, receipt, Amount(20))
    await store.close()
    with closing(sqlite3.connect(tmp_path / "coordinator.db")) as database:
        database.execute("UPDATE jobs SET attempts_doc = ?", (json.dumps(docs),))
        database.execute("UPDATE receipts SET receipt_doc = ?", (receipt.dumps(),))
        database.commit()
    store = Store(f"sqlite:///{tmp_path}/coordinator.db")
    await store.start()
    await store.load_state(START + 5, START)
    known = await store.job(JOB)
    assert known is not None
    assert known.receipts == {BOB.address: unchecked(receipt)}
    assert [(attempt.order, attempt.terms) for attempt in known.record.attempts] == [(a.order, a.terms) for a in attempts]
    assert known.record.state is (State.COMPLETED if state is State.COMPLETED else State.FAILED)
    late = LateReceipt(unchecked(receipt), attempts[1].order, attempts[1].terms)
    assert await store.receipts_of(PAYER.address, BOB.address, 5) == [late]
    assert await store.last_receipts(BOB.address, "", 5) == [late]
    await store.close()
