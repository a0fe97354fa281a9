"""The files and batches of one wallet in an SQLite file. What a method returned from survives the process."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from tallystick.client.batches.records import (
    CANCELLABLE,
    OPEN,
    Batch,
    BatchStatus,
    InputLine,
    LineState,
    StoredFile,
    Usage,
)
from tallystick.client.batches.rows import batch_row, file_row, read_batch, read_file
from tallystick.client.batches.schema import batches, files, lines
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Amount
from tallystick.runtime.database_url import sqlite_url
from tallystick.runtime.storage import Database

MIGRATIONS = Path(__file__).parent / "migrations"
MAX_FILES = 1_000
"""Files of a wallet."""
MAX_OPEN = 100
"""Batches of a wallet that are not at their end."""
MAX_ENDED = 10_000
"""Ended batches that are kept; the oldest go first."""
FILES_OF_BATCH = 2
"""Files that each open batch has a place for: its output and its error file."""


@dataclass(frozen=True, slots=True)
class LineResult:
    """The end of a line. `sealed`: its line of the output or error file."""

    number: int
    state: LineState
    sealed: bytes
    usage: Usage = field(default_factory=Usage)
    cost: Amount = Amount(0)


@dataclass(frozen=True, slots=True)
class StoredLine:
    """A line and where it stands."""

    line: InputLine
    state: LineState
    sealed: bytes | None


class BatchStore:
    """Open with `BatchStore.open`, close with `close`. `max_bytes`: of all files, results, and places kept for results."""

    def __init__(self, database: Database, max_bytes: int) -> None:
        self._database, self.max_bytes = database, max_bytes

    @classmethod
    async def open(cls, path: Path, max_bytes: int) -> BatchStore:
        """Opens or creates the file, with mode 0600. Raises Unavailable if that fails."""
        database = Database(sqlite_url(path), "batches_folder")
        await database.start(MIGRATIONS)
        return cls(database, max_bytes)

    async def close(self) -> None:
        """Finishes queued writes and closes the file."""
        await self._database.close()

    # Files

    async def add_file(self, file: StoredFile) -> None:
        """Adds a file whose content is on the disk. Raises Refusal if there is no room for it."""

        def work(c: Connection) -> None:
            _check_places(c, 1)
            self._check_bytes(c, file.bytes)
            c.execute(sa.insert(files).values(file_row(file)))

        await self._database.write(work)

    async def file(self, caller: str, file_id: str) -> StoredFile:
        """A file of a caller. Raises Refusal (file_not_found)."""
        query = sa.select(files).where(files.c.caller == caller, files.c.id == file_id)
        row = await self._database.read(lambda c: c.execute(query).first())
        if row is None:
            raise Refusal(Code.FILE_NOT_FOUND, f"No such File object: {file_id[:100]}")
        return read_file(row)

    async def list_files(
        self, caller: str, *, limit: int, after: str | None, purpose: str | None, newest_first: bool
    ) -> tuple[list[StoredFile], bool]:
        """A page of a caller's files, and whether more follow. Raises BadMessage for an unknown `after`."""
        own = [files.c.caller == caller, *([] if purpose is None else [files.c.purpose == purpose])]
        rows, more = await self._database.read(lambda c: _page(c, files, own, limit, after, newest_first=newest_first))
        return [read_file(row) for row in rows], more

    async def delete_file(self, caller: str, file_id: str) -> None:
        """Forgets a file. Raises Refusal for an unknown one, or one that an open batch reads."""
        await self.file(caller, file_id)

        def work(c: Connection) -> None:
            reading = sa.select(batches.c.id).where(batches.c.input_file == file_id, batches.c.status.in_(OPEN)).limit(1)
            batch = c.execute(reading).scalar()
            if batch is not None:
                raise BadMessage(f"file_id: {file_id} is the input of {batch}, which is not at its end; cancel it first")
            c.execute(sa.delete(files).where(files.c.id == file_id))

        await self._database.write(work)

    async def prune(self, now: int, oldest: int) -> None:
        """Forgets expired files that no open batch reads, and ended batches from before `oldest` or beyond MAX_ENDED."""

        def work(c: Connection) -> None:
            read = sa.select(batches.c.input_file).where(batches.c.status.in_(OPEN))
            c.execute(sa.delete(files).where(files.c.expires_at <= now, files.c.id.not_in(read)))
            ended = batches.c.status.not_in(OPEN)
            newest = sa.select(batches.c.number).where(ended).order_by(batches.c.number.desc()).limit(MAX_ENDED)
            c.execute(sa.delete(batches).where(ended, (batches.c.created_at < oldest) | batches.c.number.not_in(newest)))

        await self._database.write(work, synced=False)

    async def file_ids(self) -> set[str]:
        """The ids of all files."""
        return await self._database.read(lambda c: set(c.execute(sa.select(files.c.id)).scalars()))

    async def used_bytes(self) -> int:
        """Bytes of all files, of results that are not in files yet, and of the places kept for results."""
        return await self._database.read(_used_bytes)

    def _check_bytes(self, c: Connection, added: int) -> None:
        if _used_bytes(c) + added > self.max_bytes:
            raise storage_full()

    # Batches

    async def create(self, batch: Batch, create_key: str | None) -> Batch:
        """Adds a batch, or returns the one that was created with this key before.

        Raises Refusal if the key created another batch, too many are open, or no room is left for its output and its error file.
        """

        def work(c: Connection) -> Batch:
            if create_key is not None:
                known = sa.select(batches).where(batches.c.caller == batch.caller, batches.c.create_key == create_key)
                row = c.execute(known).first()
                if row is not None:
                    return _only_if_same(read_batch(row), batch, create_key)
            count = sa.select(sa.func.count()).select_from(batches).where(batches.c.status.in_(OPEN))
            if c.execute(count).scalar_one() >= MAX_OPEN:
                raise Refusal(Code.RATE_LIMITED, f"this gateway runs at most {MAX_OPEN} batches at a time; wait for one to end")
            _check_places(c, FILES_OF_BATCH)
            self._check_bytes(c, 1)
            c.execute(sa.insert(batches).values(batch_row(batch) | {"create_key": create_key, "result_bytes": 0}))
            return batch

        return await self._database.write(work)

    async def batch(self, caller: str, batch_id: str) -> Batch:
        """A batch of a caller. Raises Refusal (batch_not_found)."""
        query = sa.select(batches).where(batches.c.caller == caller, batches.c.id == batch_id)
        row = await self._database.read(lambda c: c.execute(query).first())
        if row is None:
            raise Refusal(Code.BATCH_NOT_FOUND, f"No such Batch object: {batch_id[:100]}")
        return read_batch(row)

    async def list_batches(self, caller: str, *, limit: int, after: str | None) -> tuple[list[Batch], bool]:
        """A page of a caller's batches, newest first, and whether more follow. Raises BadMessage for an unknown `after`."""
        own = [batches.c.caller == caller]
        rows, more = await self._database.read(lambda c: _page(c, batches, own, limit, after, newest_first=True))
        return [read_batch(row) for row in rows], more

    async def open_batches(self) -> list[Batch]:
        """All callers' batches that are not at their end, oldest first."""
        query = sa.select(batches).where(batches.c.status.in_(OPEN)).order_by(batches.c.number)
        return await self._database.read(lambda c: [read_batch(row) for row in c.execute(query)])

    async def cancel(self, caller: str, batch_id: str, now: int) -> Batch:
        """Asks for the end of a batch. Raises Refusal for an unknown one, BadMessage for one that can no longer be cancelled."""
        await self.batch(caller, batch_id)

        def work(c: Connection) -> Batch:
            batch = read_batch(c.execute(sa.select(batches).where(batches.c.id == batch_id)).one())
            if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                return batch
            if batch.status not in CANCELLABLE:
                raise BadMessage(f"Cannot cancel a batch with status '{batch.status.value}'.")
            return _update(c, batch_id, BatchStatus.CANCELLING, now, {})

        return await self._database.write(work)

    async def advance(self, batch_id: str, status: BatchStatus, now: int, **values: Any) -> Batch:
        """Gives a batch its next state and notes the time, unless it was cancelled meanwhile. Returns what it is now.

        An end removes its lines.
        """

        def work(c: Connection) -> Batch:
            current = c.execute(sa.select(batches.c.status).where(batches.c.id == batch_id)).scalar_one()
            if current == BatchStatus.CANCELLING and status not in (BatchStatus.CANCELLED, BatchStatus.FAILED):
                return _update(c, batch_id, BatchStatus.CANCELLING, now, values)
            return _update(c, batch_id, status, now, values)

        return await self._database.write(work)

    async def begin(self, batch_id: str, now: int, kept_bytes: int, **values: Any) -> Batch:
        """Puts a validated batch in progress, unless it was cancelled meanwhile. Returns what it is now.

        `kept_bytes`: the place that its files need if no line is answered. Raises Refusal (storage_full) if there is none.
        """

        def work(c: Connection) -> Batch:
            self._check_bytes(c, kept_bytes)
            current = c.execute(sa.select(batches.c.status).where(batches.c.id == batch_id)).scalar_one()
            status = BatchStatus.CANCELLING if current == BatchStatus.CANCELLING else BatchStatus.IN_PROGRESS
            return _update(c, batch_id, status, now, {**values, "result_bytes": kept_bytes})

        return await self._database.write(work)

    async def finish(self, batch_id: str, status: BatchStatus, now: int, outputs: Sequence[StoredFile], **values: Any) -> None:
        """Ends a batch with its output files, all at once. Their places were kept since it began."""

        def work(c: Connection) -> None:
            for file in outputs:
                c.execute(sa.insert(files).values(file_row(file)))
            _update(c, batch_id, status, now, values)

        await self._database.write(work)

    # Lines

    async def clear_lines(self, batch_id: str) -> None:
        """Forgets the lines of a batch whose validation begins anew."""
        await self._database.write(lambda c: c.execute(sa.delete(lines).where(lines.c.batch == _number(c, batch_id))) and None)

    async def add_lines(self, batch_id: str, added: Sequence[InputLine]) -> None:
        """Adds lines that wait. They are durable once the batch advances."""

        def work(c: Connection) -> None:
            number = _number(c, batch_id)
            rows = [
                {
                    "batch": number,
                    "number": line.number,
                    "offset": line.offset,
                    "length": line.length,
                    "state": LineState.PENDING.value,
                    "attempt": 0,
                }
                for line in added
            ]
            c.execute(sa.insert(lines), rows)

        if added:
            await self._database.write(work, synced=False)

    async def pending(self, batch_id: str, after: int, limit: int) -> list[InputLine]:
        """The next lines that wait, in the order of the input, after this line number."""

        def work(c: Connection) -> list[InputLine]:
            query = sa.select(lines).where(lines.c.batch == _number(c, batch_id), lines.c.number > after)
            query = query.where(lines.c.state == LineState.PENDING.value).order_by(lines.c.number).limit(limit)
            return [InputLine(row.number, row.offset, row.length, row.attempt) for row in c.execute(query)]

        return await self._database.read(work)

    async def next_attempt(self, batch_id: str, line: int, attempt: int) -> None:
        """Notes that a line's next job has another key, since the one before cost nothing."""

        def work(c: Connection) -> None:
            own = (lines.c.batch == _number(c, batch_id)) & (lines.c.number == line)
            c.execute(sa.update(lines).where(own).values(attempt=attempt))

        await self._database.write(work)

    async def end_line(self, batch_id: str, result: LineResult) -> None:
        """Stores how a line ended, and counts it. A line ends once: a second result changes nothing."""

        def work(c: Connection) -> None:
            own = (lines.c.batch == _number(c, batch_id)) & (lines.c.number == result.number)
            waits = own & (lines.c.state == LineState.PENDING.value)
            ended = sa.update(lines).where(waits).values(state=result.state.value, result=result.sealed)
            if not c.execute(ended).rowcount:
                return
            count = batches.c.completed if result.state is LineState.COMPLETED else batches.c.failed
            usage = result.usage
            values = {
                count: count + 1,
                batches.c.input_tokens: batches.c.input_tokens + usage.input,
                batches.c.cached_tokens: batches.c.cached_tokens + usage.cached,
                batches.c.output_tokens: batches.c.output_tokens + usage.output,
                batches.c.reasoning_tokens: batches.c.reasoning_tokens + usage.reasoning,
                batches.c.cost: batches.c.cost + int(result.cost),
                batches.c.result_bytes: batches.c.result_bytes + len(result.sealed),
            }
            c.execute(sa.update(batches).where(batches.c.id == batch_id).values(values))

        await self._database.write(work)

    async def lines(self, batch_id: str, after: int, limit: int, max_bytes: int) -> list[StoredLine]:
        """The next lines in the order of the input, with their results: at least one, and no more than `max_bytes` of results."""

        def work(c: Connection) -> list[StoredLine]:
            number, page, size = _number(c, batch_id), list[StoredLine](), 0
            wanted = (lines.c.batch == number, lines.c.number > after)
            sizes = sa.select(lines.c.number, sa.func.length(lines.c.result)).where(*wanted).order_by(lines.c.number).limit(limit)
            last = after
            for line, length in c.execute(sizes):
                size += length or 0
                if last > after and size > max_bytes:
                    break
                last = line
            query = sa.select(lines).where(*wanted, lines.c.number <= last).order_by(lines.c.number)
            for row in c.execute(query):
                line = InputLine(row.number, row.offset, row.length, row.attempt)
                page.append(StoredLine(line, LineState(row.state), row.result))
            return page

        return await self._database.read(work)


def new_id(prefix: str) -> str:
    """A new id such as batch_… or file-…."""
    return prefix + secrets.token_hex(16)


def storage_full() -> Refusal:
    """The refusal of what would exceed `batches_mib`."""
    text = "the files and batches of this gateway would have more bytes than batches_mib allows; delete files, or raise it"
    return Refusal(Code.STORAGE_FULL, text)


def _only_if_same(known: Batch, new: Batch, key: str) -> Batch:
    if not known.asks_the_same(new):
        text = f"idempotency key: {key[:50]!r} created another batch ({known.id}); send each creation with a key of its own"
        raise Refusal(Code.ORDER_REPLAYED, text)
    return known


def _used_bytes(c: Connection) -> int:
    sums = (sa.func.sum(files.c.bytes), sa.func.sum(batches.c.result_bytes))
    return sum(int(c.execute(sa.select(sa.func.coalesce(total, 0))).scalar_one()) for total in sums)


def _check_places(c: Connection, added: int) -> None:
    """Raises Refusal if this many more files would take places that are kept for those of open batches."""
    kept = c.execute(sa.select(sa.func.count()).select_from(files)).scalar_one()
    running = c.execute(sa.select(sa.func.count()).select_from(batches).where(batches.c.status.in_(OPEN))).scalar_one()
    if kept + FILES_OF_BATCH * running + added > MAX_FILES:
        text = f"this gateway keeps at most {MAX_FILES} files, {FILES_OF_BATCH} of them for each open batch; delete one"
        raise Refusal(Code.STORAGE_FULL, text)


def _number(c: Connection, batch_id: str) -> int:
    return int(c.execute(sa.select(batches.c.number).where(batches.c.id == batch_id)).scalar_one())


def _update(c: Connection, batch_id: str, status: BatchStatus, now: int, values: dict[str, Any]) -> Batch:
    stamps = dict(c.execute(sa.select(batches.c.stamps).where(batches.c.id == batch_id)).scalar_one())
    stamps.setdefault(f"{status.value}_at", now)
    written = {"status": status.value, "stamps": stamps, **values}
    if status not in OPEN:
        c.execute(sa.delete(lines).where(lines.c.batch == _number(c, batch_id)))
        written["result_bytes"] = 0
    c.execute(sa.update(batches).where(batches.c.id == batch_id).values(written))
    return read_batch(c.execute(sa.select(batches).where(batches.c.id == batch_id)).one())


def _page(
    c: Connection, table: sa.Table, own: Sequence[Any], limit: int, after: str | None, *, newest_first: bool
) -> tuple[list[Any], bool]:
    query, number = sa.select(table).where(*own), table.c.number
    if after is not None:
        place = c.execute(sa.select(number).where(*own, table.c.id == after)).scalar()
        if place is None:
            raise BadMessage(f"after: expected the id of an object of this list, got {after[:80]!r}")
        query = query.where(number < place if newest_first else number > place)
    rows = list(c.execute(query.order_by(number.desc() if newest_first else number).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
