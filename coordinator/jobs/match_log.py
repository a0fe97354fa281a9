"""The match log of this coordinator: appends a leaf for each match, signs heads, and proves what is in it.

Leaves are written in order, one write at a time, in the transactions that write the jobs anyway. A head is signed only for leaves
that are committed, and both are synced before anybody sees the head. So a kill leaves no gap, and no size ever has a second head.
"""

from __future__ import annotations

import asyncio
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import structlog

from coordinator.domain.match_leaf import request_facts
from coordinator.domain.scoring import RequestShape
from coordinator.jobs.recent_hashes import RecentHashes
from coordinator.ports import LogRow, LogStore
from tallystick.protocol import merkle
from tallystick.protocol.eip712 import Domain, Signed, Signer, Verified
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Fault, Unavailable
from tallystick.protocol.log_leaves import ReportLeaf, RestartLeaf
from tallystick.protocol.match_log import SECRET_SIZE, Considered, Match, MatchLeaf, commit, unpack_head
from tallystick.protocol.merkle import HASH_SIZE, Edge, leaf_hash
from tallystick.protocol.messages import LogHead, Order
from tallystick.protocol.types import Address, Hash, JobId

log = structlog.get_logger()
FORGET_SECONDS = 60.0
MAX_UNWRITTEN = 4_096
"""Leaves that wait for the database; at more, the coordinator takes no further job."""
MAX_SEEN_HEADS = 16
"""Heads that nodes passed on and that wait for their check, one a node. More are dropped: later beats have newer ones."""
MAX_PAGE_BYTES = 256 * 1024
"""Contents of leaves in one page of entries, beside the first."""
Random = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class MatchDraft:
    """A match before it is logged: the candidates as they were considered, and the draw among near ties.

    `shape`: what the ranking knew of the request.
    """

    model: str
    shape: RequestShape
    ranked: bool
    draw: float
    considered: tuple[Considered, ...]


@dataclass(slots=True)
class _Written:
    """The part of the log that is on disk."""

    size: int = 0
    root: Hash = merkle.EMPTY_ROOT


@dataclass(slots=True)
class MatchLog:
    """See the module's docstring. `now`: Unix time in seconds. `head_seconds`: between two signed heads. `keep_seconds`: how long
    the contents of leaves are kept. `lost`: whether an earlier log of this key is lost, so that its heads do not stop this one.
    """

    store: LogStore
    signer: Signer
    domain: Domain
    now: Callable[[], float]
    random: Random = os.urandom
    head_seconds: float = 1.0
    keep_seconds: int = 30 * 86_400
    lost: bool = False
    head: Verified[LogHead] | None = None
    """The newest head; None until the first one is signed."""
    epoch: int = 0
    """The number of this process's RestartLeaf."""
    conflict: str = ""
    """Why this log must not go on: its key has signed another log. Empty if nothing is known of one."""
    _edge: Edge = field(default_factory=Edge)
    _written: _Written = field(default_factory=_Written)
    _last_at: int = 0
    _unwritten: list[LogRow] = field(default_factory=list)
    _writing: asyncio.Future[None] | None = None
    _forgotten: int = 0
    _forget_at: float = 0.0
    _seen: dict[Address, bytes] = field(default_factory=dict)
    """Heads that nodes passed on, by provider."""
    _recent: RecentHashes = field(default_factory=RecentHashes)

    async def start(self) -> None:
        """Loads the log and appends the leaf of this restart. Raises Unavailable if the database does not hold its own head."""
        await self._load()
        self._begin()
        await self.flush()
        await self.sign_head()

    async def _load(self) -> None:
        stored = await self.store.load_log()
        self._edge = Edge.load(stored.size, _reader(await self._hashes(merkle.rows([(0, stored.size)]))))
        self._written, self._last_at = _Written(stored.size, self._edge.root()), stored.last_at
        if stored.head is not None:
            await self._check_head(stored.head)

    async def _check_head(self, head: Signed[LogHead]) -> None:
        """Raises Unavailable if the log on disk is not the one whose head was signed: to go on would be a second log."""
        size, what = head.message.size, "has lost leaves of the match log whose head it signed"
        verified: Verified[LogHead] | None = None
        try:
            verified = head.verify(self.domain)
        except (BadSignature, BadMessage):
            what = "has a match log of another chain or contract"
        if verified is not None and head.message.coordinator != self.signer.address:
            verified, what = None, f"has the match log of {head.message.coordinator}, and this is {self.signer.address}"
        if verified is not None and size <= self._edge.size and await self._root_of(size) == head.message.root:
            self.head = verified
            return
        text = f"db: the database {what}; use the database that this key wrote last, or a new database and a new key"
        raise Unavailable(Code.DATABASE_UNAVAILABLE, text, fault=Fault.COORDINATOR)

    # Appending

    @property
    def blocked(self) -> bool:
        """Whether too many leaves wait for the database, or the log must not go on."""
        return len(self._unwritten) >= MAX_UNWRITTEN or bool(self.conflict)

    def append(self, job: JobId, attempt: int, order: Verified[Order], draft: MatchDraft) -> Match:
        """Appends a match and returns it. It is written with the next transaction, and signed with the next head."""
        if not self._edge.size:
            self._begin()
        secret = self.random(SECRET_SIZE)
        leaf = self.make_leaf(self._time(), job, attempt, order=order, draft=draft, secret=secret)
        data = leaf.dumps()
        return Match(self._append(data), secret, order.digest, data, leaf)

    def make_leaf(
        self, at: int, job: JobId, attempt: int, *, order: Verified[Order], draft: MatchDraft, secret: bytes
    ) -> MatchLeaf:
        """Returns the leaf of a match."""
        return MatchLeaf(
            at=at,
            epoch=self.epoch,
            job=job,
            attempt=attempt,
            commitment=commit(secret, order.message.payer, order.digest, job),
            ranked=draft.ranked,
            draw=draft.draw,
            model=draft.model,
            request=request_facts(draft.shape),
            considered=draft.considered,
        )

    def append_report(self, leaf: ReportLeaf) -> tuple[int, ReportLeaf]:
        """Appends a report with its time and epoch. Returns its number and the leaf; `flush` waits until it is on disk."""
        if not self._edge.size:
            self._begin()
        leaf = replace(leaf, at=self._time(), epoch=self.epoch)
        return self._append(leaf.dumps()), leaf

    def _begin(self) -> None:
        self.epoch = self._append(RestartLeaf(self._time()).dumps())

    def _time(self) -> int:
        """Returns the time of the next leaf: never before that of the last one, whatever the clock does."""
        self._last_at = max(self._last_at, int(self.now()))
        return self._last_at

    def _append(self, data: bytes) -> int:
        number = self._edge.size
        hashes = self._edge.append(leaf_hash(data))
        row = LogRow(number, self._last_at, b"".join(hashes), data)
        self._unwritten.append(row)
        self._recent.append(number, row.hashes)
        if self._writing is None:
            self._write()
        return number

    def _write(self) -> None:
        """Queues all unwritten leaves as one write. What is appended meanwhile follows in the next one."""
        rows, written = tuple(self._unwritten), _Written(self._edge.size, self._edge.root())
        try:
            self._writing = self.store.enqueue_leaves(rows)
        except Unavailable:
            return  # tried again with the next leaf or the next head
        self._writing.add_done_callback(lambda future: self._wrote(future, rows, written))

    def _wrote(self, future: asyncio.Future[None], rows: Sequence[LogRow], written: _Written) -> None:
        self._writing = None
        if future.cancelled() or future.exception() is not None:
            return  # the store logged why
        self._written = written
        del self._unwritten[: len(rows)]
        if self._unwritten:
            self._write()

    async def flush(self) -> None:
        """Waits until all leaves are on disk. Raises Unavailable if the database does not take them."""
        while self._unwritten:
            if self._writing is None:
                self._write()
            if self._writing is None:
                raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database does not take the match log's leaves")
            await self._writing
            await asyncio.sleep(0)  # lets the callback run

    # Heads

    async def sign_head(self) -> None:
        """Signs a head for the leaves that are on disk, if there are new ones. Raises Unavailable."""
        if self._unwritten and self._writing is None:
            self._write()
        size, root = self._written.size, self._written.root
        if self.conflict or (self.head is not None and size <= self.head.message.size):
            return
        head = self._make_head(size, root, self._last_at, self.head)
        await self.store.put_head(head)
        self.head = head

    def _make_head(self, size: int, root: Hash, last_at: int, newest: Signed[LogHead] | None) -> Verified[LogHead]:
        """Signs a head. `last_at`: the time of the last leaf; `newest`: the newest head so far."""
        signed_at = max(int(self.now()), last_at, 0 if newest is None else newest.message.signed_at)
        message = LogHead(coordinator=self.signer.address, size=size, root=root, signed_at=signed_at)
        return self.signer.sign(message, self.domain)

    async def next_head(self) -> None:
        """Called once in `head_seconds`. Raises Unavailable."""
        await self.sign_head()

    async def run(self) -> None:
        """Signs heads until cancelled, and forgets the contents of old leaves."""
        while True:
            await asyncio.sleep(self.head_seconds)
            try:
                await self._check_seen()
                await self.next_head()
                await self._forget()
            except Unavailable as error:
                log.warning("match log waits for the database", error=str(error))

    def add_seen_head(self, provider: Address, packed: bytes) -> None:
        """Takes a head of this log that a node saw, to be checked before the next one is signed. Never waits."""
        if packed and (provider in self._seen or len(self._seen) < MAX_SEEN_HEADS):
            self._seen[provider] = packed

    async def _check_seen(self) -> None:
        """Compares the heads that nodes saw with this log, and stops the log if its key signed another one. Raises Unavailable.

        What this key did not sign is ignored: anybody can make it up.
        """
        seen, self._seen = set(self._seen.values()), {}
        for packed in seen:
            try:
                head = unpack_head(packed, self.signer.address).verify(self.domain).message
            except (BadMessage, BadSignature):
                continue
            if not self.conflict and not await self._is_own(head):
                reason = f"has a key that signed another match log ({head.size} leaves, root {head.root.hex()})"
                if self.lost:
                    log.warning("a node knows a head of the lost match log", reason=reason)
                    continue
                self.conflict = reason
                text = (
                    "stop the other coordinator with this key; if this database is an older copy, use the newest one; if that is "
                    "lost, use a new key, or set match_log_lost = true and tell your users"
                )
                log.error("match log stopped", reason=self.conflict, next=text)

    async def _is_own(self, head: LogHead) -> bool:
        newest = self._newest().message
        return head.size <= newest.size and await self._root_of(head.size) == head.root

    async def _root_of(self, size: int) -> Hash:
        """The root of the first `size` leaves, which must be on disk."""
        span = (0, size)
        return Hash(merkle.range_hash(span, _reader(await self._hashes(merkle.rows([span])))))

    async def _hashes(self, numbers: Collection[int]) -> dict[int, bytes]:
        """Returns the stored hashes of these leaves, from memory as far as they are there. Raises Unavailable."""
        known = self._recent.known(numbers)
        missing = sorted(number for number in numbers if number not in known)
        if missing:
            read = {row.number: row.hashes for row in await self.store.log_rows(missing)}
            self._recent.add_older(read)
            known |= read
        return known

    async def _leaf_hashes(self, start: int, end: int) -> list[bytes]:
        """Returns the hashes of leaves in a row. Raises Unavailable."""
        recent = self._recent.span(start, end)
        return await self.store.log_hashes(start, end) if recent is None else [hashes[:HASH_SIZE] for hashes in recent]

    async def close(self) -> None:
        """Writes what is left and signs it."""
        try:
            await self.flush()
            await self.sign_head()
        except Unavailable as error:
            log.warning("match log not written", error=str(error))

    async def _forget(self) -> None:
        """Deletes the contents of leaves that are older than `keep_seconds`. Their hashes stay, so all proofs still work."""
        if self.now() >= self._forget_at:
            before = int(self.now()) - self.keep_seconds
            if await self.store.forget_leaves(before):
                return  # there are more
            self._forget_at = self.now() + FORGET_SECONDS

    # Proofs

    async def proof(
        self, since: Sequence[int], indexes: Sequence[int], size: int | None = None, span: merkle.Range | None = None
    ) -> dict[str, Any]:
        """Returns the newest head, and the proofs that it contains these leaves and continues the logs of these sizes.

        Leaves and sizes beyond the head are left out. `size`: proves it for the log of so many leaves instead of the whole one.
        `span`: leaves in a row whose hashes are returned with one proof for all. Raises Unavailable.
        """
        head = self._newest()
        size = head.message.size if size is None else min(size, head.message.size)
        sizes = [earlier for earlier in dict.fromkeys(since) if earlier <= size]
        leaves = [index for index in dict.fromkeys(indexes) if index < size]
        extensions = {earlier: merkle.consistency_ranges(earlier, size) for earlier in sizes}
        paths = {index: merkle.inclusion_ranges(index, size) for index in leaves}
        in_a_row = span if span is not None and 0 <= span[0] < span[1] <= size else None
        beside = [] if in_a_row is None else merkle.span_ranges(in_a_row, size)
        ranges_of_all = (*extensions.values(), *paths.values(), beside)
        listed = [] if in_a_row is None else await self._leaf_hashes(*in_a_row)
        rows = {row.number: row for row in await self.store.log_rows(sorted(leaves))} if leaves else {}
        node = _reader(await self._hashes(merkle.rows(part for ranges in ranges_of_all for part in ranges)))

        def hashes(ranges: list[merkle.Range]) -> list[str]:
            return [merkle.range_hash(part, node).hex() for part in ranges]

        return {
            "head": head.to_json(),
            "size": size,
            "epoch": self.epoch,
            "consistency": {str(earlier): hashes(ranges) for earlier, ranges in extensions.items()},
            "inclusion": {str(index): _entry(rows[index]) | {"path": hashes(ranges)} for index, ranges in paths.items()},
            "span": None if in_a_row is None else {"hashes": b"".join(listed).hex(), "path": hashes(beside)},
        }

    async def entries(self, start: int, limit: int) -> dict[str, Any]:
        """Returns leaves from number `start` on, as far as a head covers them. Raises Unavailable."""
        size = self._newest().message.size
        end = min(start + limit, size)
        rows = await self.store.log_entries(start, end) if start < end else []
        sizes = list(accumulate(len(row.leaf or b"") for row in rows))
        rows = rows[: max(1, bisect_right(sizes, MAX_PAGE_BYTES))]
        end = start + len(rows) if rows else end
        listed = [{"index": row.number} | _entry(row) for row in rows]
        return {"entries": listed, "size": size, "next": end if end < size else None}

    def _newest(self) -> Verified[LogHead]:
        if self.head is None:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "the match log has no signed head yet; try again in a second")
        return self.head


def _entry(row: LogRow) -> dict[str, Any]:
    """The members of an entry. `leaf` is null once its contents were deleted."""
    return {"hash": row.hashes[:HASH_SIZE].hex(), "leaf": None if row.leaf is None else row.leaf.hex()}


def _reader(hashes: Mapping[int, bytes]) -> merkle.ReadNode:
    def node(row: int, level: int) -> bytes:
        return hashes[row][HASH_SIZE * level : HASH_SIZE * (level + 1)]

    return node
