"""Records about orders without a receipt: how much was delivered, and how missing deliveries are counted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import Connection

from tallystick.client.ledger import open_orders
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.open_orders import OrderKey, read_delivery
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState, OrderState, deployment_id, orders, tabs
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import (
    MAX_UNDELIVERED_QUARTERS,
    QUARTERS_CUT_SHORT,
    QUARTERS_DELIVERED,
    QUARTERS_UNDELIVERED,
    Delivery,
    UndeliveredCharge,
)
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import ZERO_HASH, Address, Hash, JobId
from tests.client.parties import ALICE, BOB, DOMAIN, NOW_S, PAYER, bill, take

PART = Delivery(200, 50, ZERO_HASH, finished=False)
WHOLE_ANSWER = replace(PART, response_bytes=90, finished=True)
UNKNOWN = Hash(b"\5" * 32)


T = TypeVar("T")


class Harness:
    """A ledger whose functions are called one at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    async def do(self, work: Callable[[Connection], T]) -> T:
        """Runs a function in one transaction."""
        return await self.ledger._database.write(work)

    async def read_delivery(
        self, job: JobId, placed: PlacedOrder, seen: Delivery | None = None, outcome: Outcome = Outcome.COMPLETED
    ) -> Delivery | None:
        """Returns the delivery against which a receipt of this order is checked."""
        receipt = bill(placed, outcome=outcome)
        return await self.do(lambda c: read_delivery(c, job, receipt, seen))

    async def undelivered(self, provider: Address = ALICE.address) -> int:
        """Counted quarters of an answer."""
        return (await self.ledger.tab(DOMAIN, provider, NOW_S)).undelivered_quarters

    async def block_reason(self, provider: Address = ALICE.address) -> str:
        """Returns the reason why a provider gets no orders."""
        return (await self.ledger.tab(DOMAIN, provider, NOW_S)).blocked_reason


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield Harness(ledger)
    await ledger.close()


def _tab_key(provider: Address = ALICE.address) -> dict[str, object]:
    return {"of_deployment_id": deployment_id(DOMAIN), "of_payer": PAYER.address, "of_provider": provider}


async def test_a_delivery_is_stored_for_its_order_only(harness: Harness) -> None:
    """The latest partial delivery is stored until the whole answer has arrived; no later part replaces the whole one."""
    job, (placed,) = await take(harness.ledger)
    other, (beside,) = await take(harness.ledger)
    longer = replace(PART, response_bytes=60)
    for arrived, kept in ((PART, PART), (longer, longer), (WHOLE_ANSWER, WHOLE_ANSWER), (PART, WHOLE_ANSWER)):
        await harness.do(partial(open_orders.store_deliveries, job=job, deliveries={placed.order.digest: arrived}))
        assert await harness.read_delivery(job, placed) == kept
    assert await harness.read_delivery(other, beside) is None
    assert await harness.read_delivery(job, placed, PART) == PART, "what the reader itself saw comes first"


async def test_an_order_with_a_receipt_keeps_its_state(harness: Harness) -> None:
    """A late word that its provider had it, or what arrived of its answer, changes nothing."""
    job, (placed,) = await take(harness.ledger)
    receipt = ALICE.signer.sign(bill(placed), DOMAIN)
    assert await harness.ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, WHOLE_ANSWER, NOW_S)) is None
    stored = (
        orders.select().with_only_columns(orders.c.state, orders.c.delivered_doc).where(orders.c.digest == placed.order.digest)
    )
    before = await harness.do(lambda c: c.execute(stored).one())
    assert before.state == OrderState.RECORDED.value
    await harness.do(partial(open_orders.mark_dispatched, job=job, digests=[placed.order.digest]))
    await harness.do(partial(open_orders.store_deliveries, job=job, deliveries={placed.order.digest: PART}))
    assert await harness.do(lambda c: c.execute(stored).one()) == before


async def test_orders_without_a_stored_delivery(harness: Harness) -> None:
    """An order that was never dispatched has an empty delivery; that of an open or dispatched order is unknown."""
    job, (matched, unmatched) = await take(harness.ledger, ALICE, BOB)
    assert await harness.read_delivery(job, matched) is None
    await harness.ledger.end_job(job, JobState.FAILED, "gone", NOW_S, matched=[matched.order.digest])
    assert await harness.read_delivery(job, matched) is None
    nothing = await harness.read_delivery(job, unmatched)
    assert nothing is not None
    assert (nothing.response_bytes, nothing.finished, nothing.bounded) == (0, False, False)
    stranger = replace(matched, order=replace(matched.order, digest=UNKNOWN))
    assert await harness.read_delivery(job, stranger) is None


async def test_a_cancel_counts_for_its_own_job(harness: Harness) -> None:
    """A receipt may say client_cancelled if this job was cancelled, whichever process reads it; no other outcome is affected."""
    job, (placed,) = await take(harness.ledger)
    other, (beside,) = await take(harness.ledger)
    await harness.ledger.mark_cancelled(job)
    cancelled, claims = replace(PART, cancelled=True), Outcome.CLIENT_CANCELLED
    assert await harness.read_delivery(job, placed, PART, claims) == cancelled
    assert await harness.read_delivery(job, placed, PART) == PART
    assert await harness.read_delivery(job, placed, None, claims) is None
    assert await harness.read_delivery(other, beside, PART, claims) == PART
    assert await harness.read_delivery(other, beside, cancelled, claims) == cancelled
    assert await harness.read_delivery(JobId(bytes(16)), placed, PART, claims) == PART


async def test_a_process_becomes_the_reader_of_one_job(harness: Harness) -> None:
    """Other jobs keep their readers, and only jobs in the ledger have one."""
    job, _ = await take(harness.ledger)
    other, _ = await take(harness.ledger)
    await harness.do(lambda c: open_orders.set_reader(c, job, "another"))
    query = orders.select().with_only_columns(orders.c.job, orders.c.reader)
    readers = dict(await harness.do(lambda c: [tuple(row) for row in c.execute(query)]))
    assert readers[job] == "another"
    assert readers[other] == harness.ledger._process.name
    await harness.ledger.end_job(other, JobState.CANCELLED, "", NOW_S)
    states = [await harness.do(partial(open_orders.job_state, job=each)) for each in (job, other, JobId(bytes(16)))]
    assert states == [JobState.OPEN, JobState.CANCELLED, None]


async def test_the_last_count_of_an_order_replaces_earlier_ones(harness: Harness) -> None:
    """A second count for an order replaces its first one; unknown orders are counted each time."""
    job, (placed,) = await take(harness.ledger)
    await take(harness.ledger, BOB)
    for quarters, order, total in (
        (QUARTERS_UNDELIVERED, placed.order.digest, 4),
        (QUARTERS_UNDELIVERED, placed.order.digest, 4),
        (QUARTERS_CUT_SHORT, placed.order.digest, 1),
        (QUARTERS_UNDELIVERED, UNKNOWN, 5),
        (QUARTERS_DELIVERED, placed.order.digest, 3),
    ):
        counting = partial(
            open_orders.count_undelivered,
            tab_key=_tab_key(),
            order=OrderKey(job, order),
            quarters=quarters,
            reason="x",
            delivery=None,
            now=NOW_S,
        )
        await harness.do(counting)
        assert await harness.undelivered() == total
    assert await harness.undelivered(BOB.address) == 0


async def test_a_provider_is_blocked_at_the_limit(harness: Harness) -> None:
    """Below the limit a provider is not blocked. The first reason stays, and other providers, payers and deployments are
    unaffected.
    """
    await take(harness.ledger, ALICE, BOB)

    def others(c: Connection) -> None:
        row = {
            "accepted": 0,
            "total": 0,
            "total_order_seq": 0,
            "ceiling": 0,
            "order_seq": 0,
            "blocked_reason": "",
            "undelivered_quarters": 5,
        }
        c.execute(
            tabs.insert(),
            [
                row | {"deployment_id": deployment_id(DOMAIN), "payer": BOB.address, "provider": ALICE.address},
                row | {"deployment_id": "1:0x" + "11" * 20, "payer": PAYER.address, "provider": ALICE.address},
            ],
        )

    await harness.do(others)
    for quarters, reason, blocked in (
        (-1, "no credit", False),
        (MAX_UNDELIVERED_QUARTERS - 1, "nearly", False),
        (1, "job 7", True),
        (QUARTERS_UNDELIVERED, "job 8", True),
        (-1, "late", True),
    ):
        await harness.do(partial(open_orders.add_undelivered, tab_key=_tab_key(), quarters=quarters, reason=reason))
        assert bool(await harness.block_reason()) is blocked
    assert await harness.block_reason() == "it charged for 3 or more answers that did not arrive; the last: job 7"
    assert await harness.undelivered() == MAX_UNDELIVERED_QUARTERS + QUARTERS_UNDELIVERED - 1
    rest = [(row.blocked_reason, row.undelivered_quarters) for row in await harness.do(lambda c: c.execute(tabs.select()).all())]
    assert sorted(rest)[:3] == [("", 0), ("", 5), ("", 5)]
    await harness.do(lambda c: open_orders.reset_undelivered(c, PAYER.address, ALICE.address))
    counted = sorted(row.undelivered_quarters for row in await harness.do(lambda c: c.execute(tabs.select()).all()))
    assert counted == [0, 0, 0, 5], "forgiven in every deployment, by this payer alone"
    await harness.do(lambda c: open_orders.add_undelivered(c, _tab_key(BOB.address), QUARTERS_CUT_SHORT, "x"))
    await harness.do(lambda c: open_orders.reset_undelivered(c, PAYER.address, ALICE.address))
    assert await harness.undelivered(BOB.address) == QUARTERS_CUT_SHORT


async def test_a_refused_receipt_leaves_its_order_counting(harness: Harness) -> None:
    """The order stays dispatched, its delivery is stored, and the answer counts as not delivered; other orders are unchanged."""
    job, (placed, beside) = await take(harness.ledger, ALICE, BOB)
    complaint = UndeliveredCharge("its last chunk never came")
    for seen, kept in ((None, None), (PART, PART), (None, PART)):
        refusing = partial(
            open_orders.refuse_receipt,
            tab_key=_tab_key(),
            order=OrderKey(job, placed.order.digest),
            delivery=seen,
            error=complaint,
            now=NOW_S,
        )
        await harness.do(refusing)
        assert await harness.read_delivery(job, placed) == kept
        assert await harness.undelivered() == QUARTERS_UNDELIVERED
    rows = await harness.do(lambda c: c.execute(orders.select()).all())
    states = {row.digest: row.state for row in rows}
    assert states == {
        placed.order.digest: OrderState.DISPATCHED.value,
        beside.order.digest: OrderState.OPEN.value,
    }
