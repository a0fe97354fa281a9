"""Retention: old jobs go, what is still needed stays, sums stay for ever, and the file stops growing."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.ledger import PAGE_SIZE, Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.repair import OrderEvidence, RecoveryResult
from tallystick.client.ledger.schema import JobState
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import ZERO_HASH, Amount, JobId
from tests.client.parties import ALICE, BOB, DOMAIN, NOW_S, PAYER, POLICY, Provider, bill, take

DAY = 86_400
KEEP = 2 * DAY
LATER = NOW_S + KEEP + POLICY.claim_seconds + 1
FINE = Delivery(200, 50, ZERO_HASH, finished=True)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


class Tab:
    """The receipts of a provider, one after the other."""

    def __init__(self, provider: Provider) -> None:
        self.provider, self.seq, self.total = provider, 0, 0

    def bill(self, placed: PlacedOrder) -> Verified[Receipt]:
        """The next receipt."""
        receipt = bill(placed)
        self.seq, self.total = self.seq + 1, self.total + receipt.cost
        return self.provider.signer.sign(replace(receipt, seq=self.seq, cumulative_cost=Amount(self.total)), DOMAIN)


async def complete(ledger: Ledger, tab: Tab, at: int = NOW_S) -> tuple[JobId, PlacedOrder, Verified[Receipt]]:
    """A job that ended with a receipt at this time."""
    job, (placed, *_) = await take(ledger, tab.provider, at=at)
    receipt = tab.bill(placed)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, FINE, at)) is None
    return job, placed, receipt


async def known(ledger: Ledger) -> set[JobId]:
    """The jobs in the ledger."""
    return {job.job for job in await ledger.latest_jobs(100)}


async def test_old_jobs_go_and_their_sums_stay(ledger: Ledger) -> None:
    """A job goes once it is old enough, with its receipt; the tab's newest receipt stays, and so do tab and spending."""
    tab = Tab(ALICE)
    first, (last, _, newest) = (await complete(ledger, tab))[0], await complete(ledger, tab)
    spent, account = await ledger.spending(0, ("day", "provider")), await ledger.tab(DOMAIN, ALICE.address, LATER)
    assert await ledger.forget_jobs(NOW_S + KEEP, KEEP) is False
    assert await known(ledger) == {first, last}
    assert await ledger.forget_jobs(LATER, KEEP) is False
    assert await known(ledger) == {last}
    assert [receipt.message for receipt in await ledger.receipts(DOMAIN, ALICE.address)] == [newest.message]
    assert await ledger.tab(DOMAIN, ALICE.address, LATER) == account
    assert [replace(row, latency_ms=None) for row in await ledger.spending(0, ("day", "provider"))] == [
        replace(row, latency_ms=None) for row in spent
    ]
    await complete(ledger, tab, LATER)
    assert (await ledger.tab(DOMAIN, ALICE.address, LATER)).accepted == account.accepted + 3


async def test_a_job_stays_while_its_orders_may_be_claimed(ledger: Ledger) -> None:
    """Even with a short retention, receipts are there for as long as a provider could claim more than they say."""
    tab = Tab(ALICE)
    (first, placed, _), (last, _, _) = await complete(ledger, tab), await complete(ledger, tab)
    claim_by = placed.order.message.claim_by
    await ledger.forget_jobs(claim_by - 1, 1)
    assert await known(ledger) == {first, last}
    await ledger.forget_jobs(claim_by, 1)
    assert await known(ledger) == {last}


async def test_what_is_not_settled_stays(ledger: Ledger) -> None:
    """Jobs whose end is unknown, orders without a receipt, and jobs with an idempotency key are never deleted."""
    tab = Tab(ALICE)
    running, _ = await take(ledger, ALICE)
    lost, _ = await take(ledger, ALICE)
    await ledger.end_job(lost, JobState.LOST, "gone", NOW_S)
    owing, (owed,) = await take(ledger, BOB)
    await ledger.end_job(owing, JobState.FAILED, "gone", NOW_S, matched=[owed.order.digest])
    keyed, _, _ = await complete(ledger, tab)
    await ledger.store_key(IdempotencyKey("k", "f", keyed, b"c" * 32, b"h", NOW_S), 0)
    refused, _ = await take(ledger, ALICE)
    await ledger.end_job(refused, JobState.FAILED, "busy", NOW_S)
    newest, _, _ = await complete(ledger, tab)
    await ledger.forget_jobs(LATER, KEEP)
    assert await known(ledger) == {running, lost, owing, keyed, newest}
    await ledger.forget_key("k")
    await ledger.forget_jobs(LATER, KEEP)
    assert await known(ledger) == {running, lost, owing, newest}


async def test_another_wallets_jobs_stay(ledger: Ledger, tmp_path: Path) -> None:
    """Only the jobs of the ledger's own payer go."""
    refused, _ = await take(ledger, ALICE)
    await ledger.end_job(refused, JobState.FAILED, "busy", NOW_S)
    other = await Ledger.open(tmp_path / "state.db", BOB.address)
    await other.forget_jobs(LATER, KEEP)
    await other.close()
    assert await known(ledger) == {refused}


async def test_each_write_deletes_a_bounded_number(ledger: Ledger) -> None:
    """The oldest jobs go first; the answer says whether there are more."""
    jobs = [(await take(ledger, ALICE))[0] for _ in range(3)]
    for job in jobs:
        await ledger.end_job(job, JobState.FAILED, "busy", NOW_S)
    assert await ledger.forget_jobs(LATER, KEEP, 2) is True
    assert await known(ledger) == {jobs[2]}
    assert await ledger.forget_jobs(LATER, KEEP, 2) is False
    assert await known(ledger) == set()


async def test_a_newer_job_hides_no_older_one(ledger: Ledger) -> None:
    """A job that began long ago and ended lately stays; one that both began and ended long ago goes, also behind it."""
    long, _ = await take(ledger, ALICE)
    old, _ = await take(ledger, ALICE)
    await ledger.end_job(long, JobState.FAILED, "slow", LATER - 1)
    await ledger.end_job(old, JobState.FAILED, "busy", NOW_S)
    await ledger.forget_jobs(LATER, KEEP)
    assert await known(ledger) == {long}


async def test_a_forgotten_order_is_not_taken_for_one_of_another_ledger(ledger: Ledger) -> None:
    """Recovery shows old receipts again: they raise no ceiling, and nobody is told that the wallet signs elsewhere too."""
    tab = Tab(ALICE)
    _, placed, receipt = await complete(ledger, tab)
    await complete(ledger, tab)
    await take(ledger, BOB)
    await ledger.forget_jobs(LATER, KEEP)
    before = await ledger.tab(DOMAIN, ALICE.address, LATER)
    shown = [OrderEvidence(placed.order, receipt)]
    assert await ledger.merge_proven(DOMAIN, ALICE.address, shown, Amount(0), LATER) == RecoveryResult()
    lie = ALICE.signer.sign(replace(receipt.message, cumulative_cost=placed.order.message.ceiling), DOMAIN)
    assert (
        await ledger.merge_proven(DOMAIN, ALICE.address, [OrderEvidence(placed.order, lie)], Amount(0), LATER) == RecoveryResult()
    )
    assert await ledger.tab(DOMAIN, ALICE.address, LATER) == before


async def test_the_file_stops_growing(ledger: Ledger, tmp_path: Path) -> None:
    """Once retention deletes as much as is added, no page is added any more."""
    tab, pages = Tab(ALICE), []
    for day in range(8):
        now = NOW_S + day * DAY
        for _ in range(60):
            await complete(ledger, tab, now)
        while await ledger.forget_jobs(now, KEEP):
            pass
        with closing(sqlite3.connect(tmp_path / "state.db")) as database:
            pages.append(database.execute("PRAGMA page_count").fetchone()[0])
            assert database.execute("PRAGMA page_size").fetchone() == (PAGE_SIZE,)
    assert pages[-1] <= pages[4] * 1.1  # the index of random job ids splits its pages now and then
    assert pages[4] > pages[0] * 1.3
    assert sum(row.requests for row in await ledger.spending(0, ())) == 8 * 60
