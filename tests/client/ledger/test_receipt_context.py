"""What the ledger reads around a receipt, in one statement, and what follows from it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tallystick.client.ledger import receipt_context
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.open_orders import OrderKey
from tallystick.client.ledger.receipt_context import MAX_PARSED, parse, read_context, remember
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState
from tallystick.client.ledger.tabs import tab_key
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.stored import load_signed, pack_signed
from tallystick.protocol.types import ZERO_HASH, Amount, Hash, JobId
from tests.client.parties import ALICE, BOB, DOMAIN, NOW_S, PAYER, bill, take

WHOLE = Delivery(200, 50, ZERO_HASH, finished=True)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger, in a process that has parsed no receipt yet."""
    receipt_context._parsed.clear()
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


async def _record(ledger: Ledger, job: JobId, placed: PlacedOrder, receipt: Receipt) -> None:
    signed = ALICE.signer.sign(receipt, DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, signed, WHOLE, NOW_S)) is None


async def _context(ledger: Ledger, job: JobId, digest: Hash, seq: int) -> Any:
    key = tab_key(DOMAIN, PAYER.address, ALICE.address)
    return await ledger._database.read(lambda c: read_context(c, key, OrderKey(job, digest), seq))


async def test_what_the_ledger_lacks_is_none(ledger: Ledger) -> None:
    """The tab of a first order has no receipts; a job and an order of another ledger are not there."""
    job, (placed, _) = await take(ledger, ALICE, BOB)
    context = await _context(ledger, job, placed.order.digest, 1)
    assert context.job_state == JobState.OPEN.value
    assert {context.of_order, context.same_seq, context.below, context.above} == {None}
    unknown = await _context(ledger, JobId(bytes(16)), placed.order.digest, 1)
    assert unknown.tab_id == context.tab_id
    assert (unknown.job_state, unknown.order_id) == (None, None)
    assert (await _context(ledger, job, Hash(bytes(32)), 1)).order_id is None


async def test_the_receipts_next_to_it(ledger: Ledger) -> None:
    """Of a tab's receipts, those with the next lower and the next higher seq, that with the seq, and that of the order."""
    jobs = [await take(ledger) for _ in range(5)]
    for number in (0, 1, 3, 4):
        job, (placed,) = jobs[number]
        await _record(ledger, job, placed, bill(placed, seq=number + 1, cumulative_cost=Amount(3 * (number + 1))))
    job, (placed,) = jobs[2]
    between = await _context(ledger, job, placed.order.digest, 3)
    assert (parse(between.below).seq, parse(between.above).seq, between.same_seq, between.of_order) == (2, 4, None, None)
    first, (first_placed,) = jobs[0]
    recorded = await _context(ledger, first, first_placed.order.digest, 1)
    assert (recorded.below, parse(recorded.above).seq) == (None, 2)
    assert recorded.same_seq == recorded.of_order


@pytest.mark.parametrize("same_process", [True, False])
async def test_a_receipt_is_compared_with_those_of_earlier_processes(ledger: Ledger, same_process: bool) -> None:
    """A total that contradicts the last receipt is refused, whether or not this process recorded that one."""
    first, (placed,) = await take(ledger)
    await _record(ledger, first, placed, bill(placed))
    if not same_process:
        receipt_context._parsed.clear()
    second, (other,) = await take(ledger)
    false = ALICE.signer.sign(bill(other, seq=2, cumulative_cost=Amount(7)), DOMAIN)
    error = await ledger.record_receipt(IncomingReceipt(DOMAIN, second, other, false, WHOLE, NOW_S))
    assert str(error).startswith("receipt.cumulativeCost: expected exactly 6 base units at seq 2")


async def test_delivered_answers_outweigh_those_that_were_cut(ledger: Ledger) -> None:
    """A whole answer subtracts a quarter from what its provider did not deliver, and nothing where nothing is counted."""
    cut, (placed,) = await take(ledger)
    short = Delivery(200, 50, ZERO_HASH, finished=False, cancelled=True)
    signed = ALICE.signer.sign(bill(placed, outcome=Outcome.CLIENT_CANCELLED), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, cut, placed, signed, short, NOW_S)) is None
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).undelivered_quarters == 1
    for seq in (2, 3):
        job, (other,) = await take(ledger)
        await _record(ledger, job, other, bill(other, seq=seq, cumulative_cost=Amount(3 * seq)))
        assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).undelivered_quarters == 0


async def test_parsed_receipts_are_bounded(ledger: Ledger) -> None:
    """The oldest ones are parsed again when they are needed."""
    _, (placed,) = await take(ledger)
    docs = []
    for number in range(MAX_PARSED + 1):
        signed = ALICE.signer.sign(bill(placed, seq=number + 1), DOMAIN)
        docs.append(pack_signed(signed))
        remember(docs[-1], signed.message)
    assert len(receipt_context._parsed) == MAX_PARSED
    assert docs[0] not in receipt_context._parsed
    assert parse(docs[0]) == load_signed(Receipt, docs[0]).message
