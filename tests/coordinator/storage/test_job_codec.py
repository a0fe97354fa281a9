"""Jobs as bytes: read back whole, and small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.ports import AttemptRecord, JobRecord
from coordinator.storage.job_codec import dump_job, load_job
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.jobs import State
from tallystick.protocol.types import Amount, JobId
from tests.coordinator.harness import PAYER, START, make_ask, make_order, make_receipt, make_terms, person, unchecked

ANN, BOB = person("ann"), person("bob")
JOB = JobId(b"\x01" * 16)
TERMS = make_terms(make_ask(ANN), JOB)
ORDER = make_order(TERMS, ANN.address)
ATTEMPT = AttemptRecord(unchecked(ORDER), TERMS, State.COMPLETED, delivered=True)
RECORD = JobRecord(JOB, PAYER.address, State.COMPLETED, START, START + 9, (ATTEMPT,))
FLAGS = ("delivered", "cancelled", "unseen", "hedged", "outrun")


def test_every_state_is_read_back() -> None:
    """Of the job and of its attempts."""
    for state in State:
        record = replace(RECORD, state=state, finished_at=None, attempts=(replace(ATTEMPT, state=state),))
        assert load_job(dump_job(record, {})).record == record


@given(st.text(), st.sets(st.sampled_from(FLAGS)), st.integers(0, 1 << 62))
def test_an_attempt_is_read_back(reason: str, flags: set[str], at: int) -> None:
    """With any reason, any flags and any time."""
    changed: dict[str, Any] = {name: name in flags for name in FLAGS}
    attempts = (ATTEMPT, replace(ATTEMPT, reason=reason, **changed))
    record = replace(RECORD, created_at=at, finished_at=at, attempts=attempts)
    assert load_job(dump_job(record, {})).record == record


@given(st.integers(0, (1 << 96) - 1), st.integers(1, (1 << 63) - 1))
def test_receipts_are_read_back(total: int, seq: int) -> None:
    """With the largest amounts."""
    receipt = make_receipt(ANN, ORDER, TERMS, seq=seq, cumulative_cost=Amount(total))
    receipts = {ANN.address: (Signed(receipt.message, receipt.signature), Amount(total))}
    doc = load_job(dump_job(RECORD, receipts))
    assert dict(doc.receipts) == receipts
    assert doc.record == RECORD


def test_a_job_with_its_receipt_is_small() -> None:
    """An ordinary job takes well under a kilobyte."""
    receipt = make_receipt(ANN, ORDER, TERMS)
    assert len(dump_job(RECORD, {ANN.address: (unchecked(receipt), Amount(20))})) < 600


def test_other_bytes_are_refused() -> None:
    """A newer version, or half a document, is no job."""
    data = dump_job(RECORD, {})
    with pytest.raises(ValueError, match="expected version 1, got 2"):
        load_job(b"\x02" + data[1:])
    with pytest.raises(ValueError, match="stored job: expected"):
        load_job(data[:-1])
