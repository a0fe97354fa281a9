from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from node.coordinator.state_recovery import StateRecovery
from node.domain.tabs import CreditLimits, Funds, StoredTab, Tabs
from node.storage.store import SqlStore
from node.testing.memory import MemoryLink, MemoryStore
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import NO_JOB, Kind, dumps
from tests.node.harness import COORDINATOR, DOMAIN, NOW, PAYER, PROVIDER, Client, signer
from tests.node.storage.test_store import finish, open_store

FIRST, SECOND = MemoryLink(COORDINATOR.address), MemoryLink(signer("second").address)
URLS = {COORDINATOR.address: "ws://first/v1/node", signer("second").address: "ws://second/v1/node"}


@dataclass
class World:
    """A node's state recovery beside two coordinators."""

    store: SqlStore
    tabs: Tabs = field(default_factory=lambda: Tabs(CreditLimits()))
    first: MemoryLink = field(default_factory=lambda: MemoryLink(COORDINATOR.address))
    second: MemoryLink = field(default_factory=lambda: MemoryLink(signer("second").address))
    finished: int = 0

    async def recovery(self, *without: str) -> StateRecovery:
        """Returns the recovery of a node that starts on this state."""

        def finish() -> None:
            self.finished += 1

        return StateRecovery(
            self.store,
            self.tabs,
            domain=DOMAIN,
            provider=PROVIDER.address,
            completed=await self.store.completed_recoveries(),
            required=URLS.values(),
            skipped=without,
            url_of=lambda link: URLS[link.coordinator],
            on_complete=finish,
            now=lambda: NOW,
        )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Returns a new state."""
    store = open_store(tmp_path)
    await store.start()
    yield World(store)
    await store.close()


async def answer(recovery: StateRecovery, link: MemoryLink, *late_receipts: LateReceipt, more: bool = False) -> None:
    """Delivers a coordinator's answer."""
    if (link.coordinator, URLS[link.coordinator]) not in recovery._requested_after:
        recovery.connected(link)
    recovery.page_received(link, dumps({"receipts": [receipt.to_json() for receipt in late_receipts], "more": more}))
    await asyncio.gather(*recovery._tasks)


async def receipts(count: int) -> list[LateReceipt]:
    """Returns the receipts of one tab, in order."""
    other, client = MemoryStore(), Client()
    records = [await finish(other, client, seq) for seq in range(count)]
    return [LateReceipt(record.receipt, record.matched.order, record.matched.terms) for record in records]


async def test_nothing_is_offered_before_all_have_answered(world: World) -> None:
    """One coordinator's answer is not enough, even for itself; after the last one all get offers. That is stored on disk."""
    recovery = await world.recovery()
    for link in (world.first, world.second):
        recovery.connected(link)
        assert [kind for kind, _, _ in link.frames] == [Kind.RECALL]
    await answer(recovery, world.first)
    assert not recovery.is_complete(world.first.coordinator)
    assert recovery.unanswered == (URLS[world.second.coordinator],)
    await answer(recovery, world.second)
    assert recovery.is_complete(world.first.coordinator)
    assert recovery.is_complete(world.second.coordinator)
    assert world.finished == 2
    again = await world.recovery()
    again.connected(world.first)
    assert again.is_complete(world.first.coordinator)
    assert len(world.first.payloads(NO_JOB, Kind.RECALL)) == 1


async def test_a_skipped_coordinator_gets_nothing(world: World) -> None:
    """The other coordinators get offers; a skipped one does too, as soon as it has answered."""
    recovery = await world.recovery(URLS[world.second.coordinator])
    await answer(recovery, world.first)
    assert recovery.is_complete(world.first.coordinator)
    assert not recovery.is_complete(world.second.coordinator)
    await answer(recovery, world.second)
    assert recovery.is_complete(world.second.coordinator)


async def test_another_account_at_a_known_address_must_answer_first(world: World) -> None:
    """The answer of one account does not count for another account at the same URL."""
    recovery = await world.recovery()
    await answer(recovery, world.first)
    await answer(recovery, world.second)
    other = MemoryLink(signer("an heir").address)
    URLS[other.coordinator] = URLS[world.first.coordinator]
    try:
        recovery.connected(other)
        assert other.payloads(NO_JOB, Kind.RECALL)
        assert not recovery.is_complete(other.coordinator)
        assert recovery.is_complete(world.second.coordinator)
    finally:
        del URLS[other.coordinator]


async def test_a_tab_continues_from_the_highest_recovered_number(world: World) -> None:
    """In any order of answers, no number is signed again; pages are requested one after the other."""
    first, second, third = await receipts(3)
    recovery = await world.recovery()
    await answer(recovery, world.first, second, more=True)
    assert world.first.payloads(NO_JOB, Kind.RECALL) == [dumps({"after": after}) for after in ("", PAYER.address)]
    await answer(recovery, world.first)
    await answer(recovery, world.second, third, first)
    tab = world.tabs.account(PAYER.address).tab
    assert (tab.seq, tab.cumulative) == (3, 120)
    (row,) = await world.store.tabs(NOW)
    assert (row.seq, row.cumulative) == (3, 120)


async def test_pages_must_advance(world: World) -> None:
    """Each page must contain later payers than the previous one; the same page again ends the link."""
    (late_receipt,) = await receipts(1)
    recovery = await world.recovery()
    await answer(recovery, world.first, late_receipt, more=True)
    with pytest.raises(BadMessage, match="after"):
        await answer(recovery, world.first, late_receipt, more=True)
    recovery.connected(world.first)
    await answer(recovery, world.first, late_receipt)
    assert recovery.unanswered == (URLS[world.second.coordinator],)


async def test_foreign_receipts_are_ignored(world: World) -> None:
    """A changed receipt and a receipt of another provider change nothing, and the answer still counts."""
    (late_receipt,) = await receipts(1)
    forged = replace(late_receipt, receipt=replace(late_receipt.receipt, message=replace(late_receipt.receipt.message, seq=99)))
    recovery = await world.recovery(*URLS.values())
    await answer(recovery, world.first, forged)
    assert world.tabs.account(PAYER.address).tab.seq == 0
    assert recovery.is_complete(world.first.coordinator)
    with pytest.raises(BadMessage):
        recovery.page_received(world.second, dumps({"receipts": []}))


@pytest.mark.parametrize("seen", ["settled", "claimed", "admitted"])
async def test_nothing_is_offered_on_a_stale_state(world: World, seen: str) -> None:
    """If the chain paid, or this node claimed, more than the record, nothing is offered, and `problem` says why, until a receipt
    closes the gap.
    """
    changed: list[bool] = []
    row = StoredTab(PAYER.address, 1, Amount(40), Amount(40), NOW + 86_400, last_order_at=NOW)
    if seen == "claimed":
        world.tabs = Tabs(CreditLimits(), [replace(row, claimed=Amount(80))])
    else:
        world.tabs = Tabs(CreditLimits(), [row])
    world.tabs.on_stale_state = lambda: changed.append(True)
    recovery = await world.recovery()
    await answer(recovery, world.first)
    await answer(recovery, world.second)
    paid = Funds(settled=Amount(80), known=True)
    if seen == "settled":
        world.tabs.observe(PAYER.address, replace(paid, settled=Amount(40)))
        assert recovery.is_complete(world.first.coordinator), "all that was earned was paid"
        world.tabs.observe(PAYER.address, paid)
    elif seen == "admitted":
        from tests.node.domain.test_tabs import order

        with pytest.raises(Exception, match="its state was lost"):
            world.tabs.admit(order(1_000), Amount(1), paid, NOW)
    assert not recovery.is_complete(world.first.coordinator)
    assert "older than what this key has signed" in recovery.problem
    second = (await receipts(2))[1]
    world.tabs.merge_recovered(second.receipt.message, second.order.message)
    assert recovery.is_complete(world.first.coordinator)
    assert len(changed) == (1 if seen == "claimed" else 2)


async def test_unrequested_pages_are_ignored(world: World) -> None:
    """Only a requested page is stored."""
    recovery = await world.recovery()
    (late_receipt,) = await receipts(1)
    page = dumps({"receipts": [late_receipt.to_json()], "more": True})
    recovery.page_received(world.first, page)
    assert recovery._tasks == set()
    recovery.connected(world.first)
    for _ in range(50):
        recovery.page_received(world.first, page)
    assert len(recovery._tasks) == 1
    await asyncio.gather(*recovery._tasks)
    assert [kind for kind, _, _ in world.first.frames] == [Kind.RECALL] * 2


async def test_one_replica_is_asked_and_the_next_one_if_it_is_lost(world: World) -> None:
    """Replicas of one coordinator share one recovery. If the one that was asked is lost, another is asked from the beginning."""
    first, second = await receipts(1), MemoryLink(COORDINATOR.address)
    recovery = await world.recovery(URLS[world.second.coordinator])
    recovery.connected(world.first)
    recovery.connected(second)
    assert (len(world.first.frames), len(second.frames)) == (1, 0)
    recovery.page_received(second, dumps({"receipts": [], "more": False}))
    assert not recovery._tasks, "a page of a replica that was not asked"
    recovery.disconnected(world.first)
    assert second.payloads(NO_JOB, Kind.RECALL) == [dumps({"after": ""})]
    recovery.page_received(world.first, dumps({"receipts": [], "more": False}))
    assert not recovery._tasks
    recovery.page_received(second, dumps({"receipts": [first[0].to_json()], "more": False}))
    await asyncio.gather(*recovery._tasks)
    assert recovery.is_complete(COORDINATOR.address)
    assert world.tabs.account(PAYER.address).tab.seq == first[0].receipt.message.seq
    third = MemoryLink(COORDINATOR.address)
    recovery.connected(third)
    assert not third.frames
    for link in (second, third):
        recovery.disconnected(link)


async def test_a_replica_that_was_lost_between_two_pages(world: World) -> None:
    """The page that it sent is kept; the rest comes from the other replica."""
    late = await receipts(1)
    second = MemoryLink(COORDINATOR.address)
    recovery = await world.recovery(URLS[world.second.coordinator])
    recovery.connected(world.first)
    recovery.connected(second)
    recovery.page_received(world.first, dumps({"receipts": [late[0].to_json()], "more": True}))
    recovery.disconnected(world.first)
    await asyncio.gather(*recovery._tasks)
    assert len(world.first.payloads(NO_JOB, Kind.RECALL)) == 1
    assert second.payloads(NO_JOB, Kind.RECALL) == [dumps({"after": ""})]
    assert not recovery.is_complete(COORDINATOR.address)
    recovery.page_received(second, dumps({"receipts": [], "more": False}))
    await asyncio.gather(*recovery._tasks)
    assert recovery.is_complete(COORDINATOR.address)
