"""The stored match log: no gap, no second head of a size, and the same proofs from SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.domain.decision_log import MAX_DECISIONS
from coordinator.ports import LogRow
from coordinator.storage.log_store import FORGOTTEN_AT_ONCE, KEPT_HEADS, LogGap
from coordinator.storage.schema import decisions, log_heads
from coordinator.storage.store import Store
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.merkle import Edge, leaf_hash
from tallystick.protocol.messages import LogHead
from tests.coordinator.harness import COORDINATOR, DOMAIN
from tests.postgres import POSTGRES, empty_database


def rows(count: int) -> list[LogRow]:
    """The rows of a log with so many leaves."""
    edge = Edge()
    leaves = [b"%d" % number for number in range(count)]
    return [LogRow(place, 1_000 + place, b"".join(edge.append(leaf_hash(leaf))), leaf) for place, leaf in enumerate(leaves)]


def head(size: int) -> Signed[LogHead]:
    """A head of this size."""
    signed = COORDINATOR.sign(LogHead(coordinator=COORDINATOR.address, size=size, root=leaf_hash(b""), signed_at=size), DOMAIN)
    return Signed(signed.message, signed.signature)


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty store."""
    if request.param == "postgres" and not POSTGRES:
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    opened = Store(await empty_database() if request.param == "postgres" else f"sqlite:///{tmp_path}/coordinator.db")
    await opened.start()
    yield opened
    await opened.close()


async def test_what_was_appended_is_loaded(store: Store) -> None:
    """Leaves and the newest head are there for the next process, whole and in order."""
    log, written = store.match_log, rows(5)
    empty = await log.load_log()
    assert (empty.size, empty.last_at, empty.head) == (0, 0, None)
    await log.enqueue_leaves(written[:2])
    await log.enqueue_leaves(written[2:])
    await log.put_head(head(2))
    await log.put_head(head(5))
    loaded = await log.load_log()
    assert (loaded.size, loaded.last_at, loaded.head) == (5, 1_004, head(5))
    assert await log.log_entries(1, 4) == written[1:4]
    assert sorted(await log.log_rows([0, 3]), key=lambda row: row.number) == [written[0], written[3]]
    assert await log.log_rows([]) == []


async def test_a_gap_is_refused(store: Store) -> None:
    """Leaves that do not follow the last one are not stored."""
    log, written = store.match_log, rows(5)
    await log.enqueue_leaves(written[:2])
    with pytest.raises(LogGap, match="leaf 3: the log has 2 leaves"):
        await log.enqueue_leaves(written[3:])
    assert (await log.load_log()).size == 2


async def test_a_repeated_write_changes_nothing(store: Store) -> None:
    """Leaves that are stored already are skipped, and the rest is appended; other leaves in their place are refused."""
    log, written = store.match_log, rows(5)
    await log.enqueue_leaves(written[:3])
    await log.enqueue_leaves(written[1:])
    await log.enqueue_leaves(written[1:])
    assert await log.log_entries(0, 9) == written
    changed = LogRow(2, 1_002, written[0].hashes, b"changed")
    with pytest.raises(LogGap, match="another one"):
        await log.enqueue_leaves([changed, *written[3:]])
    assert await log.log_entries(0, 9) == written


@pytest.mark.parametrize("size", [1, 3, 4])
async def test_a_size_has_one_head(store: Store, size: int) -> None:
    """No second head of a size, none of a smaller size, and none of leaves that are not stored."""
    log = store.match_log
    await log.enqueue_leaves(rows(3))
    await log.put_head(head(3))
    with pytest.raises(LogGap, match="head of"):
        await log.put_head(head(size))
    loaded = await log.load_log()
    assert loaded.head == head(3)


async def test_only_the_newest_heads_are_kept(store: Store) -> None:
    """The heads take bounded space."""
    log = store.match_log
    await log.enqueue_leaves(rows(KEPT_HEADS + 3))
    stored = [{"size": size, "head_doc": head(1).dumps()} for size in range(1, KEPT_HEADS + 3)]
    await store.database.write(lambda connection: connection.execute(sa.insert(log_heads), stored))
    await log.put_head(head(KEPT_HEADS + 3))
    count = await store.database.read(lambda c: c.execute(sa.select(sa.func.count()).select_from(log_heads)).scalar_one())
    assert count == KEPT_HEADS
    newest = (await log.load_log()).head
    assert newest is not None
    assert newest.message.size == KEPT_HEADS + 3


async def test_contents_are_forgotten_in_steps(store: Store) -> None:
    """Old contents are deleted a part at a time; hashes stay."""
    log, written = store.match_log, rows(FORGOTTEN_AT_ONCE + 20)
    await log.enqueue_leaves(written)
    before = 1_000 + FORGOTTEN_AT_ONCE + 10
    assert await log.forget_leaves(before)
    assert not await log.forget_leaves(before)
    assert not await log.forget_leaves(before)
    entries = await log.log_entries(0, len(written))
    assert [entry.hashes for entry in entries] == [row.hashes for row in written]
    assert [entry.number for entry in entries if entry.leaf is not None] == list(range(FORGOTTEN_AT_ONCE + 10, len(written)))


async def test_only_the_last_decisions_are_kept(store: Store) -> None:
    """Batches of decisions are read in order; older ones go once newer ones make up the whole log."""
    log = store.match_log
    await store.database.write(lambda connection: connection.execute(sa.delete(decisions)))
    for batch, count in ((b"first", 10), (b"second", MAX_DECISIONS - 1), (b"third", 1)):
        log.enqueue_decisions(count, batch)
    await store.database.write(lambda connection: connection.execute(sa.select(1)))
    assert await log.decisions() == [b"second", b"third"]
