from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from node.domain.order_admission import MatchedOrder
from node.domain.tabs import Funds, StoredTab
from node.domain.usage_meter import make_receipt
from node.ports import ClaimableTab, CoordinatorHour, ReceiptRecord, TabConflict, WriteOff
from node.storage.schema import metadata
from node.storage.store import SqlStore
from node.testing.memory import MemoryStore
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Claim, ClaimRow, Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.tab import ProviderTab
from tallystick.protocol.types import Amount, Hash
from tests.node.harness import COORDINATOR, DOMAIN, NOW, PAYER, PROVIDER, Client, PlacedJob, admitted, make_asks, signer

ASK = make_asks().current[0]
Store = SqlStore | MemoryStore


def receipt_record(placed: PlacedJob, tab: ProviderTab, *, output: int = 100, at: int = NOW) -> ReceiptRecord:
    """Returns the end of a job as the runner stores it."""
    receipt = make_receipt(
        placed.order,
        placed.terms,
        tab,
        usage=Usage(0, 0, output),
        outcome=Outcome.COMPLETED,
        commitment=Hash(bytes(32)),
        finished_at=at,
    )
    return ReceiptRecord(admitted(placed), PROVIDER.sign(receipt, DOMAIN))


async def finish(
    store: Store, client: Client, seq: int = 0, *, at: int = NOW, total: int | None = None, **changes: object
) -> ReceiptRecord:
    """Stores one job from begin to receipt, on a tab that stands at `seq` jobs of 40 units, or at `total`."""
    placed = client.order(ASK, order_with=changes)
    await store.begin(admitted(placed), at)
    records = receipt_record(placed, ProviderTab(seq, Amount(40 * seq if total is None else total)), at=at)
    await store.record_receipt(records)
    return records


def open_store(folder: Path) -> SqlStore:
    """Returns the store of one node."""
    return SqlStore(f"sqlite:///{folder / 'node.db'}", PROVIDER.address, DOMAIN)


@pytest.fixture(params=["sql", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Provides both stores; implementations that pass the same tests are interchangeable."""
    if request.param == "memory":
        yield MemoryStore()
        return
    sql = open_store(tmp_path)
    await sql.start()
    yield sql
    await sql.close()


async def test_a_receipt_updates_its_tab(store: Store) -> None:
    """A receipt moves the tab to its seq and total; the highest claimable order is its cap."""
    client = Client()
    await finish(store, client)
    second = await finish(store, client, 1)
    (row,) = await store.tabs(NOW)
    assert row == StoredTab(PAYER.address, 2, Amount(80), second.matched.order.message.ceiling, NOW + 86_400, last_order_at=NOW)
    (expired,) = await store.tabs(NOW + 86_400)
    assert (expired.ceiling, expired.claim_by) == (0, 0)


async def test_a_receipt_must_follow_the_stored_tab(store: Store) -> None:
    """A receipt with a number or a total that does not follow the stored tab is not written, nor what builds on it."""
    client = Client()
    await finish(store, client)
    placed = [client.order(ASK) for _ in range(8)]
    for job in placed:
        await store.begin(admitted(job), NOW)
    wrong = [ProviderTab(0, Amount(0)), ProviderTab(2, Amount(40)), ProviderTab(1, Amount(41)), ProviderTab(1, Amount(39))]
    for job, tab in zip(placed[4:], wrong, strict=True):
        with pytest.raises(TabConflict) as caught:
            await store.record_receipt(receipt_record(job, tab))
        assert (caught.value.seq, caught.value.cumulative) == (1, 40)
    writes = [
        store.record_receipt(receipt_record(job, ProviderTab(seq, Amount(40 * seq))))
        for job, seq in zip(placed[:4], (1, 3, 4, 2), strict=True)  # the third is signed on top of one that is missing
    ]
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [isinstance(result, TabConflict) for result in results] == [False, True, True, False]
    (row,) = await store.tabs(NOW)
    assert (row.seq, row.cumulative) == (3, 120)
    assert len(await store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)) == 3


async def test_a_cancelled_write_is_written(store: Store) -> None:
    """Whoever waits for a receipt may stop waiting; the receipt and what follows it are stored."""
    client = Client()
    await finish(store, client)
    first, second = client.order(ASK), client.order(ASK)
    for placed in (first, second):
        await store.begin(admitted(placed), NOW)
    ignored = asyncio.ensure_future(asyncio.shield(store.record_receipt(receipt_record(first, ProviderTab(1, Amount(40))))))
    last = store.record_receipt(receipt_record(second, ProviderTab(2, Amount(80))))
    ignored.cancel()
    await last
    (row,) = await store.tabs(NOW)
    assert row.seq == 3


async def test_a_consumed_order_stays_consumed(store: Store) -> None:
    """Begun orders are remembered until their deadline; none begins twice."""
    client = Client()
    first, second = client.order(ASK), client.order(ASK)
    for placed in (first, second):
        await store.begin(admitted(placed), NOW)
    assert {digest for digest, _ in await store.consumed_orders(NOW)} == {first.order.digest, second.order.digest}
    assert await store.consumed_orders(NOW + 60) == []
    with pytest.raises(ValueError, match="begun"):
        await store.begin(admitted(first), NOW)


def refusal(placed: PlacedJob, tab: ProviderTab) -> ReceiptRecord:
    """Returns the end of a refused order."""
    ended = make_receipt(
        placed.order,
        placed.terms,
        tab,
        usage=Usage(0, 0, 0),
        outcome=Outcome.REFUSED,
        commitment=Hash(bytes(32)),
        finished_at=NOW,
    )
    return ReceiptRecord(MatchedOrder(placed.job, placed.order, placed.terms), PROVIDER.sign(ended, DOMAIN))


async def test_a_refused_order_backs_no_claim(store: Store) -> None:
    """A refused order advances its tab's seq, is consumed, and its receipt is sent like any other; neither claims nor jobs
    use it, whatever its cap.
    """
    client = Client()
    records = await finish(store, client)
    greedy = client.order(ASK, order_with={"ceiling": Amount(10**9), "max_fee_bps": 10_000})
    await store.record_refusal(refusal(greedy, ProviderTab(1, Amount(40))))
    (row,) = await store.tabs(NOW)
    assert (row.seq, row.cumulative, row.ceiling) == (2, 40, records.matched.order.message.ceiling)
    (tab,) = await store.claimable(NOW, 10)
    assert tab.order.digest == records.matched.order.digest
    assert greedy.order.digest in {digest for digest, _ in await store.consumed_orders(NOW)}
    assert greedy.job in {entry.job for entry in await store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)}
    begun = client.order(ASK)
    await store.begin(admitted(begun), NOW)
    with pytest.raises(ValueError, match="begun"):
        await store.record_refusal(refusal(begun, ProviderTab(2, Amount(40))))


async def test_unfinished_orders(store: Store) -> None:
    """Begun, claimable orders without a receipt are returned unchanged; all others are not."""
    client = Client()
    await finish(store, client)
    begun, expired = client.order(ASK), client.order(ASK, order_with={"claim_by": NOW + 10})
    for placed in (begun, expired):
        await store.begin(admitted(placed), NOW)
    refused = client.order(ASK)
    await store.record_refusal(refusal(refused, ProviderTab(1, Amount(40))))
    (left,) = await store.unfinished_orders(NOW + 10)
    assert (left.job, left.order.digest, left.terms) == (begun.job, begun.order.digest, begun.terms)
    assert left.order.verify(DOMAIN) == begun.order


async def test_coordinator_hours(store: Store) -> None:
    """Later totals of an hour replace earlier ones; a query names its first hour."""
    first, later = CoordinatorHour("a:443", 5, Amount(1), Amount(2)), CoordinatorHour("a:443", 6, Amount(10**20), Amount(4))
    for total in (replace(first, earned=Amount(0)), first, later):
        await store.record_coordinator_hour(total)
    assert sorted(await store.coordinator_hours(5), key=lambda row: row.hour) == [first, later]
    assert await store.coordinator_hours(6) == [later]


async def test_receipts_are_unacknowledged_until_confirmed(store: Store) -> None:
    """Receipts are returned page by page, as they were signed, until their coordinator has confirmed them."""
    client = Client()
    records = [await finish(store, client, seq, at=NOW + seq) for seq in range(5)]
    first = await store.unacknowledged(COORDINATOR.address, NOW + 4, 0, 3)
    rest = await store.unacknowledged(COORDINATOR.address, NOW + 4, 1, 3)
    assert [entry.job for entry in (*first, *rest)] == [record.matched.job for record in records[:4]]
    assert [entry.late_receipt.receipt.signature for entry in first] == [record.receipt.signature for record in records[:3]]
    assert first[0].late_receipt.receipt.verify(DOMAIN).message == records[0].receipt.message
    assert first[0].late_receipt.terms == records[0].matched.terms
    await store.acknowledge(COORDINATOR.address, [record.matched.job for record in records[:4]])
    (left,) = await store.unacknowledged(COORDINATOR.address, NOW + 100, 0, 10)
    assert left.job == records[4].matched.job
    assert await store.unacknowledged(signer("another").address, NOW + 100, 0, 10) == []


async def test_recovered_receipts(tmp_path: Path) -> None:
    """A recovered receipt updates the tab, can be claimed and needs no confirmation; completed recoveries are stored."""
    client = Client()
    other = MemoryStore()
    await finish(other, client)
    records = await finish(other, client, 1)
    store = open_store(tmp_path)
    await store.start()
    late_receipt = LateReceipt(records.receipt, records.matched.order, records.matched.terms)
    for _ in range(2):
        await store.record_recovered(records.receipt, records.matched.order, late_receipt)
    assert await store.completed_recoveries() == []
    for url in ("ws://a/v1/node", "ws://a/v1/node", "ws://b/v1/node"):
        await store.record_recovery_complete(COORDINATOR.address, url, NOW)
    await store.close()
    store = open_store(tmp_path)
    await store.start()
    assert await store.completed_recoveries() == [
        (COORDINATOR.address, "ws://a/v1/node"),
        (COORDINATOR.address, "ws://b/v1/node"),
    ]
    (row,) = await store.tabs(NOW)
    assert (row.seq, row.cumulative) == (2, 80)
    (tab,) = await store.claimable(NOW, 10)
    assert (tab.seq, tab.order.digest) == (2, records.matched.order.digest)
    assert await store.unacknowledged(COORDINATOR.address, NOW + 100, 0, 10) == []
    await store.close()


async def test_claimable_tabs(store: Store) -> None:
    """A tab is claimable while its receipts exceed the settled amount, with the highest live order and the waiting time."""
    client = Client()
    await finish(store, client)
    best = await finish(store, client, 1, at=NOW + 10, ceiling=Amount(1_000))
    await finish(store, client, 2, at=NOW + 20, ceiling=Amount(2_000), claim_by=NOW + 2_000)
    (tab,) = await store.claimable(NOW + 2_000, 10)
    assert (tab.seq, tab.cumulative, tab.due, tab.since) == (3, 120, 120, NOW)
    assert tab.order.digest == best.matched.order.digest
    assert tab.order.verify(DOMAIN).digest == tab.order.digest
    await store.record_funds(PAYER.address, Funds(Amount(100), Amount(7), known=True), NOW + 50)
    (tab,) = await store.claimable(NOW + 2_000, 10)
    assert (tab.due, tab.reserved, tab.since) == (20, 7, NOW + 50)
    await store.record_funds(PAYER.address, Funds(Amount(120), known=True), NOW + 60)
    assert await store.claimable(NOW + 2_000, 10) == []
    await finish(store, client, 3, at=NOW + 70)
    (tab,) = await store.claimable(NOW, 10)
    assert tab.since == NOW + 70


async def test_a_used_up_cap_claims_nothing(store: Store) -> None:
    """If the best order's cap is settled, nothing can be claimed, whatever the receipts say."""
    await finish(store, Client(), ceiling=Amount(30))
    (tab,) = await store.claimable(NOW, 10)
    assert tab.due == 30
    await store.record_funds(PAYER.address, Funds(Amount(30), known=True), NOW)
    assert await store.claimable(NOW, 10) == []


async def test_claims_are_stored(store: Store) -> None:
    """The next check knows the submitted claim and its time."""
    records = await finish(store, Client())
    row = ClaimRow(payer=PAYER.address, order_hash=records.matched.order.digest, seq=1, cumulative_cost=Amount(40))
    await store.record_claim(PROVIDER.sign(Claim(provider=PROVIDER.address, rows=(row,)), DOMAIN), NOW + 5)
    (tab,) = await store.claimable(NOW, 10)
    assert (tab.claimed_at, tab.claimed) == (NOW + 5, 40)


async def test_a_second_receipt_of_a_seq_is_never_stored(store: Store) -> None:
    """Two receipts with one number would cost the stake: the store accepts only the first, and the tab stays."""
    client = Client()
    await finish(store, client)
    placed = client.order(ASK)
    await store.begin(admitted(placed), NOW)
    with pytest.raises(TabConflict):
        await store.record_receipt(receipt_record(placed, ProviderTab(), output=50))
    (row,) = await store.tabs(NOW)
    assert (row.seq, row.cumulative) == (1, 40)


async def test_the_database_itself_refuses_a_second_receipt_of_a_seq(tmp_path: Path) -> None:
    """Even for another program, the database accepts only one receipt per payer and number."""
    store = open_store(tmp_path)
    await store.start()
    await finish(store, Client())
    await store.close()
    columns = "order_id, payer, seq, model, finished_at, outcome, input_tokens, output_tokens, cost, document"
    insert = f"INSERT INTO receipts ({columns}) SELECT {columns} FROM receipts"
    with sqlite3.connect(tmp_path / "node.db") as connection, pytest.raises(sqlite3.IntegrityError, match=r"receipts\.payer"):
        connection.execute(insert)


async def test_a_tab_never_goes_back(tmp_path: Path) -> None:
    """A receipt stored after a later recovered one does not move the tab back."""
    other, client = MemoryStore(), Client()
    records = [await finish(other, client, seq) for seq in range(3)]
    store = open_store(tmp_path)
    await store.start()
    for record in (records[2], records[0]):
        await store.record_recovered(
            record.receipt, record.matched.order, LateReceipt(record.receipt, record.matched.order, record.matched.terms)
        )
    (row,) = await store.tabs(NOW)
    assert (row.seq, row.cumulative) == (3, 120)
    await store.close()


async def test_no_cap_outlives_its_order(store: Store) -> None:
    """All ceilings are returned with their claimBy, highest first, without redundant ones."""
    client = Client()
    for ceiling, hours in ((500, 1), (400, 2), (300, 2), (200, 5), (200, 4), (450, 1)):
        await store.begin(admitted(client.order(ASK, order_with=_order(ceiling, hours))), NOW)
    await finish(store, client, ceiling=Amount(100), claim_by=NOW + 3_600 * 9)
    (row,) = await store.tabs(NOW)
    ceilings = [(row.ceiling, row.claim_by), *((ceiling.amount, ceiling.claim_by) for ceiling in row.lower_ceilings)]
    assert ceilings == [(Amount(ceiling), NOW + 3_600 * hours) for ceiling, hours in ((500, 1), (400, 2), (200, 5), (100, 9))]
    (row,) = await store.tabs(NOW + 3_600)
    assert (row.ceiling, row.claim_by, len(row.lower_ceilings)) == (400, NOW + 7_200, 2)


def _order(cap: int, hours: int) -> dict[str, object]:
    return {"ceiling": Amount(cap), "claim_by": NOW + 3_600 * hours}


async def test_a_debt_is_written_off_when_its_orders_have_expired(store: Store) -> None:
    """Debt is written off at the expiry of the last order that covers it, and less again after a settlement or a new order."""
    client = Client()
    await finish(store, client, ceiling=Amount(40), claim_by=NOW + 100)
    await finish(store, client, 1, ceiling=Amount(80), claim_by=NOW + 50)
    assert await store.write_off(NOW + 49) == []
    assert await store.write_off(NOW + 50) == [WriteOff(PAYER.address, Amount(40), 40)]
    assert await store.write_off(NOW + 99) == []
    assert await store.write_off(NOW + 100) == [WriteOff(PAYER.address, Amount(80), 40)]
    await store.record_funds(PAYER.address, Funds(Amount(30), known=True), NOW + 100)
    assert await store.write_off(NOW + 101) == [WriteOff(PAYER.address, Amount(50), -30)]
    await finish(store, client, 2, ceiling=Amount(120), claim_by=NOW + 500)
    assert await store.write_off(NOW + 102) == [WriteOff(PAYER.address, Amount(0), -50)]


async def test_everything_survives_reopening(tmp_path: Path) -> None:
    """A store that is closed and opened again knows tabs, taken orders, open receipts and claims."""
    client = Client()
    first = open_store(tmp_path)
    await first.start()
    records = await finish(first, client)
    begun = client.order(ASK)
    await first.begin(admitted(begun), NOW)
    await first.close()
    second = open_store(tmp_path)
    await second.start()
    (row,) = await second.tabs(NOW)
    assert (row.seq, row.cumulative) == (1, 40)
    assert {digest for digest, _ in await second.consumed_orders(NOW)} == {records.matched.order.digest, begun.order.digest}
    (open_receipt,) = await second.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)
    assert open_receipt.late_receipt.receipt.signature == records.receipt.signature
    assert len(await second.claimable(NOW, 10)) == 1
    await second.close()


async def test_the_state_of_another_key_is_not_used(tmp_path: Path) -> None:
    """Receipts of another key, chain or contract are not continued: the node says so and does not start."""
    store = open_store(tmp_path)
    await store.start()
    await store.close()
    url = f"sqlite:///{tmp_path / 'node.db'}"
    for provider, domain in ((PAYER.address, DOMAIN), (PROVIDER.address, replace(DOMAIN, chain_id=1))):
        with pytest.raises(BadMessage, match="belongs to"):
            await SqlStore(url, provider, domain).start()


async def test_huge_numbers_are_stored(tmp_path: Path) -> None:
    """A payer may sign any 96-bit ceiling and any 64-bit time; the store takes them."""
    store = open_store(tmp_path)
    await store.start()
    await finish(store, Client(), ceiling=Amount((1 << 96) - 1), claim_by=(1 << 64) - 1)
    (row,) = await store.tabs(NOW)
    assert row.ceiling == (1 << 96) - 1
    await store.close()


async def test_the_schema_is_the_migrations(tmp_path: Path) -> None:
    """The migrations create exactly the tables that the code names."""
    store = open_store(tmp_path)
    await store.start()
    await store.close()
    with sqlite3.connect(tmp_path / "node.db") as connection:
        records = {
            table: {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if table not in ("alembic_version", "schema_owner", "sqlite_sequence")
        }
    assert records == {table.name: {column.name for column in table.columns} for table in metadata.tables.values()}


async def test_the_last_receipts_of_a_tab_can_be_voided(store: Store) -> None:
    """Their numbers stay used, their cost leaves the total, and their orders have no receipt, until they get another one."""
    client = Client()
    records = [await finish(store, client, seq) for seq in range(3)]
    await store.acknowledge(COORDINATOR.address, [records[0].matched.job])
    doubtful = await store.doubtful_receipts()
    assert [(receipt.job, receipt.seq, receipt.before) for receipt in doubtful] == [
        (record.matched.job, seq, 40 * (seq - 1)) for seq, record in zip((2, 3), records[1:], strict=True)
    ]
    assert {(receipt.coordinator, receipt.payer) for receipt in doubtful} == {(COORDINATOR.address, PAYER.address)}
    orders = await store.void(PAYER.address, doubtful)
    assert [matched.job for matched in orders] == [record.matched.job for record in records[1:]]
    assert (await store.doubtful_receipts(), await store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)) == ([], [])
    (row,) = await store.tabs(NOW)
    assert (row.seq, row.cumulative) == (3, 40)
    assert [matched.job for matched in await store.unfinished_orders(NOW)] == [matched.job for matched in orders]
    (tab,) = await store.claimable(NOW, 10)
    assert (tab.seq, tab.cumulative) == (3, 40)

    for seq, matched in enumerate(orders, 3):
        tab_before = ProviderTab(seq, Amount(40))
        usage = Usage(0, 0, 0)
        free = make_receipt(
            matched.order,
            matched.terms,
            tab_before,
            usage=usage,
            outcome=Outcome.PROVIDER_ERROR,
            commitment=Hash(bytes(32)),
            finished_at=NOW,
        )
        await store.record_receipt(ReceiptRecord(matched, PROVIDER.sign(free, DOMAIN)))
    await finish(store, client, 5, total=40)
    (row,) = await store.tabs(NOW)
    assert (row.seq, row.cumulative) == (6, 80)
    assert await store.unfinished_orders(NOW) == []
    assert len(await store.unacknowledged(COORDINATOR.address, NOW + 1, 0, 10)) == 3
    assert len(await store.doubtful_receipts()) == 1


async def test_old_receipts_that_nobody_confirms_are_not_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads a bounded number of receipts, the newest, in their order."""
    monkeypatch.setattr("node.storage.voiding.MAX_DOUBTFUL", 2)
    store, client = open_store(tmp_path), Client()
    await store.start()
    for seq in range(4):
        await finish(store, client, seq)
    assert [receipt.seq for receipt in await store.doubtful_receipts()] == [3, 4]
    await store.close()


async def test_what_rests_on_a_receipt_keeps_it_from_being_voided(store: Store) -> None:
    """A later receipt, a claim or a payment does: a lower total after it would cost the stake, or contradict the chain."""
    client = Client()
    for seq in range(3):
        await finish(store, client, seq)
    first, second, third = await store.doubtful_receipts()
    assert await store.void(PAYER.address, [first, second]) == []
    assert await store.void(PAYER.address, [first, third]) == []
    assert await store.void(signer("nobody").address, [third]) == []
    (tab,) = await store.claimable(NOW, 10)
    await store.record_funds(PAYER.address, Funds(settled=Amount(81)), NOW)
    assert await store.void(PAYER.address, [third]) == []
    await store.record_funds(PAYER.address, Funds(settled=Amount(80)), NOW)
    await store.record_claim(_claim(tab, 80), NOW)
    assert [matched.job for matched in await store.void(PAYER.address, [third])] == [third.job]
    (left,) = await store.tabs(NOW)
    assert (left.seq, left.cumulative) == (3, 80)

    with pytest.raises(Unavailable, match="voided"):
        await store.record_claim(_claim(tab, 120), NOW)  # it was read before
    assert (await store.tabs(NOW))[0].claimed == 80


async def test_a_claim_keeps_a_receipt_from_being_voided(store: Store) -> None:
    """Also if a lower one followed, which was read before it."""
    client = Client()
    await finish(store, client, 0)
    await finish(store, client, 1)
    (tab,) = await store.claimable(NOW, 10)
    await store.record_claim(_claim(tab, 80), NOW)
    await store.record_claim(_claim(tab, 40), NOW)
    assert (await store.tabs(NOW))[0].claimed == 80
    assert await store.void(PAYER.address, (await store.doubtful_receipts())[1:]) == []


async def test_a_receipt_that_was_confirmed_meanwhile_is_not_voided(store: Store) -> None:
    """By another replica of its coordinator."""
    client = Client()
    record = await finish(store, client, 0)
    doubtful = await store.doubtful_receipts()
    await store.acknowledge(COORDINATOR.address, [record.matched.job])
    assert await store.void(PAYER.address, doubtful) == []


async def test_only_the_last_minutes_receipts_are_in_doubt(store: Store) -> None:
    """A coordinator that withholds its acknowledgements can refuse no more than that."""
    client = Client()
    for seq, at in enumerate((NOW - 120, NOW - 60, NOW - 59, NOW)):
        await finish(store, client, seq, at=at)
    assert [receipt.seq for receipt in await store.doubtful_receipts()] == [3, 4]


def _claim(tab: ClaimableTab, total: int) -> Signed[Claim]:
    row = ClaimRow(payer=PAYER.address, order_hash=tab.order.digest, seq=tab.seq, cumulative_cost=Amount(total))
    return PROVIDER.sign(Claim(provider=PROVIDER.address, rows=(row,)), DOMAIN)
