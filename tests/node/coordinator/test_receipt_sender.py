from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from node.coordinator import receipt_sender as courier_module
from node.coordinator.receipt_sender import ReceiptSender
from node.testing.memory import MemoryLink, MemoryStore
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, loads
from tests.node.harness import COORDINATOR, NOW, Client
from tests.node.storage.test_store import finish


@asynccontextmanager
async def running(sender: ReceiptSender) -> AsyncIterator[ReceiptSender]:
    """Runs a receipt sender until the end of the block."""
    task = asyncio.create_task(sender.run())
    try:
        async with asyncio.timeout(60):
            yield sender
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_open_receipts_are_sent_on_every_welcome() -> None:
    """After a reconnection every receipt that was not confirmed is sent again, as it was signed; confirmed ones are not."""
    store, client = MemoryStore(), Client()
    records = [await finish(store, client, seq) for seq in range(3)]
    async with running(ReceiptSender(store, now=lambda: NOW)) as sender:
        first = MemoryLink(COORDINATOR.address)
        sender.connected(first)
        for record in records:
            raw = await first.until(Kind.LATE_RECEIPT, record.matched.job)
            late_receipt = LateReceipt.from_json(loads(raw, "receipt"))
            assert late_receipt.receipt.signature == record.receipt.signature
            assert late_receipt.order.signature == record.matched.order.signature
        sender.acknowledged(first, records[0].matched.job)
        sender.disconnected(first)
        second = MemoryLink(COORDINATOR.address)
        sender.connected(second)
        await second.until(Kind.LATE_RECEIPT, records[2].matched.job)
        assert not second.payloads(records[0].matched.job)
        assert second.payloads(records[1].matched.job)


async def test_a_refused_receipt_is_not_sent_again() -> None:
    """A receipt that the coordinator refuses for good is not sent again."""
    store, client = MemoryStore(), Client()
    records = await finish(store, client)
    async with running(ReceiptSender(store, now=lambda: NOW)) as sender:
        link = MemoryLink(COORDINATOR.address)
        sender.connected(link)
        await link.until(Kind.LATE_RECEIPT, records.matched.job)
        sender.refused(link, records.matched.job, Refusal(Code.UNKNOWN_JOB, "never heard of it"))
        await sender.save_acknowledgements()
        assert not await store.unacknowledged(link.coordinator, NOW + 1, 0, 10)


async def test_receipts_are_sent_again_without_an_answer() -> None:
    """A receipt that stays unconfirmed on an open link is sent again after a while; a fresh one is left alone."""
    store, client = MemoryStore(), Client()
    old = await finish(store, client, at=NOW - 10)
    fresh = await finish(store, client, 1, at=NOW)
    async with running(ReceiptSender(store, resend_seconds=0.01, now=lambda: NOW)) as sender:
        link = MemoryLink(COORDINATOR.address)
        sender.connected(link)
        await link.until(Kind.LATE_RECEIPT, old.matched.job, 3)
        assert len(link.payloads(fresh.matched.job)) == 1


async def test_many_receipts_are_sent_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Receipts that are never confirmed do not keep later ones from being sent."""
    monkeypatch.setattr(courier_module, "PAGE_SIZE", 2)
    store, client = MemoryStore(), Client()
    records = [await finish(store, client, seq) for seq in range(5)]
    async with running(ReceiptSender(store, now=lambda: NOW)) as sender:
        link = MemoryLink(COORDINATOR.address)
        sender.connected(link)
        for record in records:
            await link.until(Kind.LATE_RECEIPT, record.matched.job)


async def test_a_coordinator_that_confirms_nothing_is_not_sent_everything_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round sends a bounded number of receipts, and the next round continues after them, so each receipt has its turn."""
    monkeypatch.setattr(courier_module, "PAGE_SIZE", 2)
    monkeypatch.setattr(courier_module, "MAX_PAGES", 2)
    store, client = MemoryStore(), Client()
    records = [await finish(store, client, seq) for seq in range(6)]
    sender, link = ReceiptSender(store, now=lambda: NOW), MemoryLink(COORDINATOR.address)
    sent: list[int] = []
    for _ in range(4):
        await sender._send(link, NOW + 1)
        sent.append(len(link.frames))
    assert sent == [4, 6, 10, 12]
    assert all(len(link.payloads(record.matched.job)) == 2 for record in records)


async def test_receipts_that_were_never_sent_leave_at_once() -> None:
    """A receipt that is made while a link is up, beside its job, does not wait for the next round."""
    store, client = MemoryStore(), Client()
    async with running(ReceiptSender(store, resend_seconds=3_600, now=lambda: NOW)) as sender:
        link = MemoryLink(COORDINATOR.address)
        sender.connected(link)
        await asyncio.sleep(0.05)
        records = await finish(store, client, at=NOW)
        sender.resend_now()
        await link.until(Kind.LATE_RECEIPT, records.matched.job)


async def test_a_full_disk_delays_acknowledgements_only() -> None:
    """If a confirmation cannot be stored, the receipt sender continues."""
    store, client = MemoryStore(), Client()
    records = await finish(store, client)
    link = MemoryLink(COORDINATOR.address)
    sender = ReceiptSender(store, now=lambda: NOW)
    store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    sender.acknowledged(link, records.matched.job)
    await sender.save_acknowledgements()
    store.fault = None
    sender.acknowledged(link, records.matched.job)
    await sender.save_acknowledgements()
    assert store.acknowledged_jobs == {records.matched.job}


async def test_acknowledgements_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that confirms what never was fills no memory; receipts that it then fails to confirm are sent again."""
    monkeypatch.setattr(courier_module, "MAX_UNSAVED", 3)
    store, link = MemoryStore(), MemoryLink(COORDINATOR.address)
    sender = ReceiptSender(store)
    for number in range(5):
        sender.acknowledged(link, JobId(bytes([number]) * 16))
    await sender.save_acknowledgements()
    assert len(store.acknowledged_jobs) == 3
    sender.acknowledged(link, JobId(bytes([9]) * 16))
    await sender.save_acknowledgements()
    assert len(store.acknowledged_jobs) == 4


async def test_replicas_share_the_receipts_of_their_coordinator() -> None:
    """A further replica gets nothing again; what a lost one may have had goes to the one that is left, at once."""
    store, client = MemoryStore(), Client()
    record = await finish(store, client, at=NOW)
    async with running(ReceiptSender(store, resend_seconds=3_600, now=lambda: NOW)) as sender:
        first, second = MemoryLink(COORDINATOR.address), MemoryLink(COORDINATOR.address)
        sender.connected(first)
        await first.until(Kind.LATE_RECEIPT, record.matched.job)
        sender.connected(second)
        later = await finish(store, client, 1, at=NOW)
        sender.resend_now()
        await first.until(Kind.LATE_RECEIPT, later.matched.job)
        assert not second.frames
        sender.disconnected(first)
        await second.until(Kind.LATE_RECEIPT, record.matched.job)
        await second.until(Kind.LATE_RECEIPT, later.matched.job)
        sender.acknowledged(second, record.matched.job)
        sender.acknowledged(second, later.matched.job)
        await sender.save_acknowledgements()
        assert not await store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)


async def test_the_loss_of_a_replica_that_was_not_written_to() -> None:
    """Its jobs' receipts, which it may not have stored, go to the replica that is left."""
    store, client = MemoryStore(), Client()
    async with running(ReceiptSender(store, resend_seconds=3_600, now=lambda: NOW)) as sender:
        first, second = MemoryLink(COORDINATOR.address), MemoryLink(COORDINATOR.address)
        sender.connected(first)
        sender.connected(second)
        record = await finish(store, client, at=NOW)
        sender.disconnected(second)
        await first.until(Kind.LATE_RECEIPT, record.matched.job)
        sender.disconnected(first)
        assert not sender._links


async def test_replicas_that_do_not_take_a_lost_ones_receipts_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the other replicas do not know that one is gone they confirm nothing: the receipts come again, ever less often."""
    monkeypatch.setattr(courier_module, "RETRY_SECONDS", 0.01)
    store, client = MemoryStore(), Client()
    async with running(ReceiptSender(store, resend_seconds=3_600, now=lambda: NOW)) as sender:
        first, second = MemoryLink(COORDINATOR.address), MemoryLink(COORDINATOR.address)
        sender.connected(first)
        sender.connected(second)
        record = await finish(store, client, at=NOW)
        sender.disconnected(second)
        await first.until(Kind.LATE_RECEIPT, record.matched.job, 4)
        assert sender._pauses[COORDINATOR.address] > 0.015
        sender.acknowledged(first, record.matched.job)
        await sender.save_acknowledgements()
        while sender._pauses:  # noqa: ASYNC110 - a round that sends nothing tells nobody
            await asyncio.sleep(0.005)
        sent = len(first.frames)
        other = await finish(store, client, 1, at=NOW)
        sender.resend_now()
        await first.until(Kind.LATE_RECEIPT, other.matched.job)
        assert len(first.payloads(record.matched.job)) == sent
        sender.disconnected(first)
        assert not sender._pauses
