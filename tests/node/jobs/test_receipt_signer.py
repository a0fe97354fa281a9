"""Receipts of one payer are signed ahead of the disk, and no number ever leaves with two contents.

A model of the store writes, fails, or loses its answer, in any order of events. Cancelled jobs and crashes come in between.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from node.domain.order_admission import AdmittedJob
from node.domain.tabs import CreditLimits, Funds, StoredTab, Tabs
from node.jobs.receipt_signer import ReceiptSigner
from node.ports import JobStore, ReceiptRecord, TabConflict
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import ZERO_HASH, Address, Amount
from tests.node.harness import DOMAIN, NOW, PROVIDER, Client, admitted, make_asks, signer

ASK = make_asks().current[0]
CREDIT = CreditLimits(total=Amount(10**12), per_payer=Amount(10**12), new_payer=Amount(10**12), new_payers_per_day=Amount(10**12))
FAULT = Unavailable(Code.DATABASE_UNAVAILABLE, "disk full")


@dataclass
class ModelStore:
    """A JobStore that compares and writes in order, when the test says so."""

    tabs: dict[Address, tuple[int, int]] = field(default_factory=dict)
    receipts: dict[Address, list[Receipt]] = field(default_factory=dict)
    queue: deque[tuple[ReceiptRecord, asyncio.Future[None]]] = field(default_factory=deque)

    def begin(self, _admitted: AdmittedJob, _at: int) -> asyncio.Future[None]:
        """See ports.JobStore."""
        raise NotImplementedError

    def record_receipt(self, record: ReceiptRecord) -> asyncio.Future[None]:
        """See ports.JobStore."""
        future = asyncio.get_running_loop().create_future()
        self.queue.append((record, future))
        return future

    record_refusal = record_receipt

    def write(self, *, fails: bool = False, answer_lost: bool = False) -> None:
        """Writes what is first in the queue. `fails`: nothing is written; `answer_lost`: it is, and is reported as failed."""
        record, future = self.queue.popleft()
        receipt = record.receipt.message
        seq, total = self.tabs.get(receipt.payer, (0, 0))
        if fails:
            future.set_exception(FAULT)
        elif (receipt.seq - 1, receipt.cumulative_cost - receipt.cost) != (seq, total):
            future.set_exception(TabConflict(seq, Amount(total)))
        else:
            self.tabs[receipt.payer] = receipt.seq, receipt.cumulative_cost
            self.receipts.setdefault(receipt.payer, []).append(receipt)
            if answer_lost:
                future.set_exception(FAULT)
            else:
                future.set_result(None)

    def stored_tabs(self, ceilings: dict[Address, int]) -> list[StoredTab]:
        """Returns the tabs as a process reads them when it starts."""
        return [
            StoredTab(payer, seq, Amount(total), Amount(ceilings[payer]), NOW + 86_400)
            for payer, (seq, total) in self.tabs.items()
        ]


@dataclass
class Node:
    """The part of a node that signs receipts, and its running jobs."""

    store: ModelStore
    tabs: Tabs
    jobs: set[asyncio.Task[Any]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.signer = ReceiptSigner(
            signer=PROVIDER, domain=DOMAIN, tabs=self.tabs, store=cast(JobStore, self.store), now=lambda: NOW
        )


class Receipts(RuleBasedStateMachine):
    """Jobs of two payers that end at any time, on a store that fails at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = ModelStore()
        self.clients = [Client(signer(f"payer {number}")) for number in range(2)]
        self.node = Node(self.store, Tabs(CREDIT))
        self.left: dict[tuple[Address, int], Verified[Receipt]] = {}
        """Receipts that left the node, by payer and seq."""
        self.cancelled = False
        """Whether a job was cancelled in this process. Daemons do that only as they end."""

    def teardown(self) -> None:
        """Ends the jobs that still wait."""
        for _ in range(len(self.store.queue)):
            self.store.write()
        self._settle()
        self.loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    def _settle(self) -> None:
        async def rounds() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        self._run(rounds())

    @rule(payer=st.integers(0, 1), output=st.integers(0, 100))
    def job_ends(self, payer: int, output: int) -> None:
        """A job of a payer ends with some output."""
        placed = self.clients[payer].order(ASK)
        funds = Funds(free=Amount(10**12), known=True)
        try:
            self.node.tabs.admit(placed.order.message, placed.terms.max_cost, funds, NOW)
        except Refusal as error:
            if error.code is Code.UNAUTHORISED_TAB and self.cancelled:
                return  # cancelled jobs hold their caps until the process ends, though their receipts were stored after all
            raise
        node, job = self.node, admitted(placed)

        async def run() -> None:
            order_stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            order_stored.set_result(None)
            usage = Usage(0, 0, output)
            receipt = await node.signer.sign_for_job(job, order_stored, usage, Outcome.COMPLETED, ZERO_HASH)
            if receipt is None:
                node.tabs.drop(job.payer, job.max_cost)
                return
            check_receipt(job.order, job.terms, receipt.message)
            number = receipt.message.payer, receipt.message.seq
            assert number not in self.left, "two receipts with one number left"
            self.left[number] = receipt

        async def start() -> asyncio.Task[None]:
            return asyncio.create_task(run())

        task = self._run(start())
        node.jobs.add(task)
        self._settle()

    @precondition(lambda self: self.store.queue)
    @rule(count=st.integers(1, 4))
    def store_writes(self, count: int) -> None:
        """A transaction succeeds."""
        for _ in range(min(count, len(self.store.queue))):
            self.store.write()
        self._settle()

    @precondition(lambda self: self.store.queue)
    @rule(count=st.integers(1, 4))
    def store_fails(self, count: int) -> None:
        """A transaction fails and writes nothing."""
        for _ in range(min(count, len(self.store.queue))):
            self.store.write(fails=True)
        self._settle()

    @precondition(lambda self: self.store.queue)
    @rule()
    def answer_is_lost(self) -> None:
        """A transaction is written, but reported as failed."""
        self.store.write(answer_lost=True)
        self._settle()

    @precondition(lambda self: any(not job.done() for job in self.node.jobs))
    @rule(data=st.data())
    def job_is_cancelled(self, data: st.DataObject) -> None:
        """A job is cancelled while its receipt waits for the store: the receipt does not leave, but may be stored."""
        waiting = sorted((job for job in self.node.jobs if not job.done()), key=lambda job: job.get_name())
        data.draw(st.sampled_from(waiting)).cancel()
        self.cancelled = True
        self._settle()

    @rule()
    def process_is_killed(self) -> None:
        """All that was not stored is gone; the next process starts from the store."""
        for job in self.node.jobs:
            job.cancel()
        self.store.queue.clear()
        self._settle()
        ceilings = {client.payer.address: client.ceiling for client in self.clients}
        self.cancelled = False
        self.node = Node(self.store, Tabs(CREDIT, self.store.stored_tabs(ceilings)))

    @invariant()
    def what_left_is_stored(self) -> None:
        """Each receipt that left is stored unchanged, and the stored receipts of a payer follow each other without a gap."""
        for payer, receipts in self.store.receipts.items():
            total = 0
            for seq, receipt in enumerate(receipts, 1):
                total += receipt.cost
                assert (receipt.seq, receipt.cumulative_cost) == (seq, total)
                other = self.left.get((payer, seq))
                assert other is None or other.message == receipt
        for payer, seq in self.left:
            assert len(self.store.receipts[payer]) >= seq

    @invariant()
    def memory_follows_the_store(self) -> None:
        """The tab in memory never runs ahead of the store."""
        for payer, (seq, total) in self.store.tabs.items():
            tab = self.node.tabs.account(payer).tab
            assert (tab.seq, tab.cumulative) <= (seq, total)
        for client in self.clients:
            address = client.payer.address
            if address not in self.store.tabs:
                assert self.node.tabs.account(address).tab.seq == 0


Receipts.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestReceipts = Receipts.TestCase


class Signing:
    """A payer's jobs on a model store, for the tests of single cases."""

    def __init__(self) -> None:
        self.store, self.tabs, self.client = ModelStore(), Tabs(CREDIT), Client()
        self.node = Node(self.store, self.tabs)
        self.payer = self.client.payer.address

    async def end_job(self) -> asyncio.Task[Verified[Receipt] | None]:
        """Ends a job of 40 base units, and returns its receipt once it is queued for the store."""
        placed = self.client.order(ASK)
        self.tabs.admit(placed.order.message, placed.terms.max_cost, Funds(free=Amount(10**12), known=True), NOW)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stored.set_result(None)
        queued = len(self.store.queue)
        job = admitted(placed)

        async def end() -> Verified[Receipt] | None:
            usage = Usage(0, 0, 100)
            receipt = await self.node.signer.sign_for_job(job, stored, usage, Outcome.COMPLETED, ZERO_HASH)
            if receipt is None:
                self.tabs.drop(job.payer, job.max_cost)
            return receipt

        task = asyncio.create_task(end())
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(self.store.queue) == queued + 1
        return task


async def test_receipts_are_signed_ahead_of_the_store() -> None:
    """Receipts of one payer do not wait for each other: one transaction can store all of them, and each waits for it."""
    at = Signing()
    jobs = [await at.end_job() for _ in range(5)]
    assert [record.receipt.message.seq for record, _ in at.store.queue] == [1, 2, 3, 4, 5]
    assert not any(job.done() for job in jobs)
    for _ in jobs:
        at.store.write()
    receipts = [await job for job in jobs]
    assert [receipt.message.cumulative_cost for receipt in receipts if receipt] == [40, 80, 120, 160, 200]
    account = at.tabs.account(at.payer)
    assert (account.tab.seq, account.tab.cumulative, account.tab.in_flight) == (5, 200, 0)


async def test_receipts_that_build_on_a_failed_one_fail_with_it() -> None:
    """The first failed write takes all later ones of its payer with it; the next receipt gets the first free number."""
    at = Signing()
    first, second, third = [await at.end_job() for _ in range(3)]
    at.store.write()
    at.store.write(fails=True)
    assert await first is not None
    assert await second is None
    next_job = await at.end_job()  # while the third is still queued
    assert at.store.queue[-1][0].receipt.message.seq == 2
    at.store.write()
    at.store.write()
    assert await third is None
    receipt = await next_job
    assert receipt is not None
    assert (receipt.message.seq, receipt.message.cumulative_cost) == (2, 80)
    assert at.tabs.account(at.payer).tab.seq == 2


@pytest.mark.parametrize("others", [0, 2])
async def test_a_stored_receipt_that_was_reported_as_failed(others: int) -> None:
    """If the store kept a receipt whose write seemed to fail, its number is not signed again."""
    at = Signing()
    jobs = [await at.end_job() for _ in range(1 + others)]
    at.store.write(answer_lost=True)
    assert await jobs[0] is None
    for _ in range(others):
        at.store.write()
    assert all([await job is not None for job in jobs[1:]])
    next_job = await at.end_job()
    at.store.write()
    receipt = await next_job
    if not others:  # learns it from the store's comparison
        assert receipt is None
        next_job = await at.end_job()
        at.store.write()
        receipt = await next_job
    assert receipt is not None
    assert receipt.message.seq == len(at.store.receipts[at.payer]) == 2 + others
    assert at.tabs.account(at.payer).tab.seq == 2 + others


async def test_a_cancelled_job_cancels_no_write() -> None:
    """A receipt that is queued is stored, even if its job is cancelled meanwhile; the tab continues after it."""
    at = Signing()
    cancelled, other = await at.end_job(), await at.end_job()
    cancelled.cancel()
    await asyncio.wait({cancelled})
    at.store.write()
    at.store.write()
    receipt = await other
    assert receipt is not None
    assert receipt.message.seq == at.tabs.account(at.payer).tab.seq == 2
    assert at.tabs.account(at.payer).tab.in_flight == 0


async def test_a_receipt_waits_for_its_order() -> None:
    """A receipt is not signed before its order is stored, and never if that failed."""
    at = Signing()
    placed = at.client.order(ASK)
    stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    signing = asyncio.create_task(
        at.node.signer.sign_for_job(admitted(placed), stored, Usage(0, 0, 1), Outcome.COMPLETED, ZERO_HASH)
    )
    for _ in range(5):
        await asyncio.sleep(0)
    assert not at.store.queue
    stored.set_exception(FAULT)
    assert await signing is None
    assert not at.store.queue
