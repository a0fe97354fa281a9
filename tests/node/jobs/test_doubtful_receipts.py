"""Receipts of a killed process that no coordinator has confirmed: which of them are voided, and what waits for that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from node.domain.order_admission import MatchedOrder
from node.domain.tabs import CreditLimits, Tabs
from node.jobs.doubtful_receipts import CONNECT_SECONDS, DECISION_SECONDS, DoubtfulReceipts
from node.ports import ReceiptRecord
from node.testing.memory import MemoryLink, MemoryStore
from tallystick.protocol.errors import BadReceipt, Code, Refusal, TallyError, Unavailable, Undelivered
from tallystick.protocol.types import Amount, JobId
from tests.node.harness import COORDINATOR, NOW, PAYER, Client, signer
from tests.node.storage.test_store import finish

UNDELIVERED = Undelivered("the last chunk never came")
OTHER = signer("another coordinator")


@dataclass
class World:
    """A node that starts again after three receipts of 40 units each, and what its doubtful receipts told it."""

    store: MemoryStore
    tabs: Tabs
    receipts: DoubtfulReceipts
    records: list[ReceiptRecord]
    link: MemoryLink = field(default_factory=lambda: MemoryLink(COORDINATOR.address))
    clock: list[float] = field(default_factory=lambda: [0.0])
    decided: asyncio.Event = field(default_factory=asyncio.Event)
    voided: list[MatchedOrder] = field(default_factory=list)
    kept: list[JobId] = field(default_factory=list)
    unpaid: list[tuple[str, Amount]] = field(default_factory=list)

    def job(self, number: int) -> JobId:
        """The job of a receipt by its number."""
        return self.records[number - 1].matched.job

    def refuse(self, number: int, error: TallyError = UNDELIVERED) -> bool:
        """The coordinator refuses a receipt."""
        return self.receipts.refused(self.link, self.job(number), error)

    @property
    def tab(self) -> tuple[int, int]:
        """The number of the tab's last receipt, and its total."""
        tab = self.tabs.account(PAYER.address).tab
        return tab.seq, tab.cumulative


async def start(count: int = 3, coordinator: str = COORDINATOR.address) -> World:
    """A node that starts with unconfirmed receipts."""
    store, client, clock = MemoryStore(), Client(), [0.0]
    records = [await finish(store, client, seq, coordinator=coordinator) for seq in range(count)]
    tabs = Tabs(CreditLimits(), await store.tabs(NOW))
    receipts = DoubtfulReceipts(store, tabs, await store.doubtful_receipts(), lambda: clock[0])
    world = World(store, tabs, receipts, records, clock=clock)
    receipts.on_decided = world.decided.set
    receipts.on_voided = world.voided.extend
    receipts.on_kept = lambda _link, job, _error: world.kept.append(job)
    receipts.on_unpaid = lambda endpoint, cost: world.unpaid.append((endpoint, cost))
    return world


async def test_the_last_receipts_that_were_refused_are_voided() -> None:
    """Once the coordinator has decided about all. Meanwhile nothing is taken from it, and the tab is not claimed."""
    world = await start()
    assert world.receipts.connected(world.link)
    assert world.refuse(3)
    world.receipts.acknowledged(world.link, world.job(1))
    assert (world.receipts.pending, world.receipts.is_decided(COORDINATOR.address)) == (True, False)
    assert (world.receipts.concern(PAYER.address), world.receipts.concern(OTHER.address)) == (True, False)
    assert world.tab == (3, 120)
    assert world.refuse(2)
    await world.decided.wait()
    assert (world.receipts.pending, world.receipts.concern(PAYER.address)) == (False, False)
    assert world.receipts.is_decided(COORDINATOR.address)
    assert world.tab == (3, 40)
    assert [matched.job for matched in world.voided] == [world.job(2), world.job(3)]
    assert (world.unpaid, world.kept) == ([(world.link.endpoint, 80)], [])
    assert not world.receipts.connected(world.link)


async def test_a_receipt_below_one_that_was_confirmed_is_kept() -> None:
    """The payer has a later total that contains it."""
    world = await start()
    for number in (1, 2):
        assert world.refuse(number)
    world.receipts.acknowledged(world.link, world.job(3))
    await world.decided.wait()
    assert (world.tab, world.voided, world.unpaid) == ((3, 120), [], [])
    assert world.kept == [world.job(1), world.job(2)]


async def test_only_those_after_the_last_confirmed_one_are_voided() -> None:
    """A gap ends the row."""
    world = await start()
    assert world.refuse(1)
    assert world.refuse(3)
    world.receipts.acknowledged(world.link, world.job(2))
    await world.decided.wait()
    assert (world.tab, world.kept) == ((3, 80), [world.job(1)])
    assert [matched.job for matched in world.voided] == [world.job(3)]


@pytest.mark.parametrize("error", [BadReceipt("another fault"), Refusal(Code.UNKNOWN_JOB, "never heard of it")])
async def test_other_refusals_void_nothing(error: TallyError) -> None:
    """A provider that delivered collects with its own signature, whatever the coordinator says."""
    world = await start(1)
    assert not world.refuse(1, error)
    await world.decided.wait()
    assert (world.tab, world.voided, world.kept) == ((1, 40), [], [])


async def test_receipts_of_this_process_are_not_its_concern() -> None:
    """They can be sent with the end of their answers again."""
    world = await start(1)
    assert not world.receipts.refused(world.link, JobId(bytes(16)), UNDELIVERED)
    world.receipts.acknowledged(world.link, JobId(bytes(16)))
    other = MemoryLink(OTHER.address)
    assert not world.receipts.refused(other, world.job(1), UNDELIVERED)
    assert not world.receipts.connected(other)
    assert world.receipts.is_decided(OTHER.address)
    assert world.receipts.pending


async def test_a_store_that_fails_voids_nothing() -> None:
    """The receipt is kept, as it was before."""
    world = await start(1)
    world.store.fault = Unavailable(Code.DATABASE_UNAVAILABLE, "the disk is full")
    assert world.refuse(1)
    await world.decided.wait()
    assert (world.tab, world.kept, world.voided) == ((1, 40), [world.job(1)], [])


async def test_a_coordinator_that_does_not_decide_is_not_waited_for() -> None:
    """Whether it is away, or connected and silent, and however often it connects. Then nothing is voided any more."""
    world = await start(1)
    assert world.receipts.pending
    assert world.receipts.connected(world.link)
    world.clock[0] += DECISION_SECONDS - 1
    assert world.receipts.connected(world.link)
    assert world.receipts.pending
    world.clock[0] += 1
    assert not world.receipts.connected(world.link)
    assert not world.receipts.pending
    assert not world.receipts.concern(PAYER.address)
    assert not world.refuse(1)
    await world.decided.wait()
    assert (world.tab, world.voided) == ((1, 40), [])


async def test_a_coordinator_that_comes_late_decides_nothing() -> None:
    """The tabs have been claimed since."""
    world = await start(1)
    world.clock[0] = CONNECT_SECONDS
    assert not world.receipts.pending
    assert not world.receipts.connected(world.link)
    assert not world.refuse(1)
    await world.decided.wait()
    assert world.tab == (1, 40)


async def test_a_receipt_that_is_refused_twice_is_dealt_with_once() -> None:
    """It was sent twice. The receipt at no cost that replaced it must not count as refused."""
    world = await start(1)
    assert world.refuse(1)
    assert world.refuse(1)
    await world.decided.wait()
    assert world.refuse(1)
    assert (world.tab, len(world.voided), world.kept) == ((1, 0), 1, [])


async def test_an_acknowledgement_is_believed_after_a_refusal() -> None:
    """Another replica of the coordinator has the receipt."""
    world = await start(2)
    assert world.refuse(2)
    world.receipts.acknowledged(world.link, world.job(2))
    world.receipts.acknowledged(world.link, world.job(1))
    await world.decided.wait()
    assert (world.tab, world.voided) == ((2, 80), [])


@pytest.mark.parametrize("connects", [True, False])
async def test_silence_is_noticed(connects: bool) -> None:
    """What was held back for a coordinator goes on by itself."""
    world = await start(1)
    world.receipts.start()
    if connects:
        world.receipts.connected(world.link)
    async with asyncio.timeout(DECISION_SECONDS + 1 if connects else CONNECT_SECONDS + 1):
        await world.decided.wait()
