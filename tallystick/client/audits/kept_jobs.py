"""The folder of jobs that are kept for audits: private files of whole hours, to which each process appends in batches.

Keeping a job costs its caller nothing but a reference: a thread writes what came in the last FLUSH_SECONDS. A crash loses that
much. Files that are too old or too many are deleted, the oldest first.

A file's first record is a job as it is packed. It is the dictionary by which those after it are compressed (RFC 1950): jobs of
one wallet have an ask, a deployment and much of their documents in common. Records of earlier versions are not compressed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from tallystick.client.audits.kept_job import KeptJob
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import JobId

log = structlog.get_logger()
FLUSH_SECONDS = 0.25
MAX_PENDING_BYTES = 32 << 20
"""Bytes of plaintext that wait for the thread; further jobs are not kept."""
MAX_ASKS = 256
MAX_JOB_BYTES = 2 * MAX_PENDING_BYTES
"""Bytes of a job that is read: its plaintexts and its documents."""
_WINDOW_BITS = 13
"""Of zlib data with a window of 8 KiB. To allocate the usual one takes longer than to compress a short job."""
_COMPRESSED = b"\1"
"""The first byte of a compressed record. A packed job begins with 0: its first part has less than 2^24 bytes."""
_HEADER = struct.Struct(">16sI")
_NAME = re.compile(r"([0-9]{1,12})-[0-9a-f]{8}\.jobs")
_HOUR = 3_600


class KeptJobs:
    """The kept jobs of one wallet. `limit`: bytes of the folder. `hours`: how long a job is kept. `now` is Unix seconds."""

    def __init__(self, folder: Path, *, limit: int, hours: int, now: Callable[[], int]) -> None:
        self.folder, self._limit, self._hours, self._now = folder, limit, hours, now
        self._token = secrets.token_hex(4)
        self._pending: list[KeptJob] = []
        self._pending_bytes = 0
        self._asks: dict[bytes, bytes] = {}
        self._dictionary = b""
        """The first record of the file that is written."""
        self._flushing: asyncio.Task[None] | None = None
        self.dropped = 0
        """Jobs that were not kept because the disk was too slow or refused them."""

    def add(self, kept: KeptJob) -> None:
        """Keeps a job. Its file has it within FLUSH_SECONDS and the time of one write."""
        size = len(kept.proof.request) + sum(map(len, kept.proof.response)) + len(kept.evidence)
        if self._limit <= 0 or self._pending_bytes + size > MAX_PENDING_BYTES:
            self.dropped += 1
            return
        self._pending.append(kept)
        self._pending_bytes += size
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush_later(), name="kept jobs")

    async def _flush_later(self) -> None:
        try:
            await asyncio.sleep(FLUSH_SECONDS)
        finally:
            self._flushing = None
        await self._write_pending()

    async def flush(self) -> None:
        """Writes what waits. Call it at the end."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        await self._write_pending()

    async def _write_pending(self) -> None:
        batch, self._pending, self._pending_bytes = self._pending, [], 0
        if not batch:
            return
        try:
            await asyncio.to_thread(self._write, batch)
        except OSError as error:
            self.dropped += len(batch)
            self._token = secrets.token_hex(4)  # what follows a record that was cut off could not be read
            log.warning("jobs could not be kept for audits", folder=str(self.folder), error=str(error))

    def _write(self, batch: list[KeptJob]) -> None:
        if len(self._asks) > MAX_ASKS:
            self._asks.clear()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{self._now() // _HOUR}-{self._token}.jobs"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            is_new = not os.fstat(descriptor).st_size
            _write_all(descriptor, self._records(batch, is_new=is_new))
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if is_new or size > self._limit // 16:
            self._prune()

    def _records(self, batch: list[KeptJob], *, is_new: bool) -> bytes:
        """The records of some jobs. `is_new`: the first of them is the first of its file."""
        data = bytearray()
        for kept in batch:
            body = kept.pack(self._asks)
            if is_new and not data:
                self._dictionary = body
            else:
                body = _compress(body, self._dictionary)
            data += _HEADER.pack(kept.job, len(body)) + body
        return bytes(data)

    def _files(self) -> list[tuple[int, Path, int]]:
        """The hour, path and bytes of each file, oldest first."""
        files = []
        for path in self.folder.iterdir() if self.folder.exists() else ():
            match = _NAME.fullmatch(path.name)
            if match is not None:
                files.append((int(match[1]), path, path.stat().st_size))
        return sorted(files)

    def _prune(self) -> None:
        files = self._files()
        total, oldest = sum(size for _, _, size in files), self._now() // _HOUR - self._hours
        for hour, path, size in files:
            if hour >= oldest and total <= self._limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    async def prune(self) -> None:
        """Deletes what is too old. Disk errors are logged."""
        try:
            await asyncio.to_thread(self._prune)
        except OSError as error:
            log.warning("kept jobs could not be deleted", folder=str(self.folder), error=str(error))

    async def find(self, job: JobId) -> KeptJob | None:
        """A kept job; None if there is none of this id. Raises BadMessage for a damaged file."""
        for kept in self._pending:
            if kept.job == job:
                return kept
        return await asyncio.to_thread(self._find, job)

    def _find(self, job: JobId) -> KeptJob | None:
        for _, path, _ in reversed(self._files()):
            records = _index(path)
            for record in records:
                if record.job == job:
                    body = record.read(records[0])
                    return None if body is None else KeptJob.unpack(body)
        return None

    async def latest(self, limit: int) -> list[KeptJob]:
        """Up to `limit` kept jobs, newest first. Damaged ones are left out."""
        return await asyncio.to_thread(self._latest, limit)

    def _latest(self, limit: int) -> list[KeptJob]:
        jobs: list[KeptJob] = []
        for _, path, _ in reversed(self._files()):
            records = _index(path)
            for record in reversed(records[max(0, len(records) - limit + len(jobs)) :]):
                with contextlib.suppress(BadMessage):
                    body = record.read(records[0])
                    if body is not None:
                        jobs.append(KeptJob.unpack(body))
        return jobs


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a file has a job."""

    job: JobId
    path: Path
    at: int
    size: int

    def read(self, first: _Record) -> bytes | None:
        """The packed job; `first` is the first record of the file. None if the file was deleted meanwhile, or if a crash cut it
        off. Raises BadMessage for a damaged record.
        """
        body = self._read()
        if body is None or not body.startswith(_COMPRESSED):
            return body
        dictionary = first._read()
        return None if dictionary is None else _decompress(body, dictionary)

    def _read(self) -> bytes | None:
        try:
            with self.path.open("rb") as file:
                file.seek(self.at)
                body = file.read(self.size)
        except FileNotFoundError:
            return None
        return body if len(body) == self.size else None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _compress(body: bytes, dictionary: bytes) -> bytes:
    deflate = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS, zdict=dictionary)
    return _COMPRESSED + deflate.compress(body) + deflate.flush()


def _decompress(record: bytes, dictionary: bytes) -> bytes:
    """Reads what `_compress` returns. Raises BadMessage."""
    inflate = zlib.decompressobj(_WINDOW_BITS, zdict=dictionary)
    try:
        body = inflate.decompress(record[len(_COMPRESSED) :], MAX_JOB_BYTES)
    except zlib.error as error:
        raise BadMessage(f"kept job: {error}") from None
    if not inflate.eof:
        raise BadMessage(f"kept job: expected at most {MAX_JOB_BYTES} bytes, whole")
    return body


def _index(path: Path) -> list[_Record]:
    """The records of a file, oldest first. Only their headers are read."""
    records: list[_Record] = []
    try:
        with path.open("rb") as file:
            while len(header := file.read(_HEADER.size)) == _HEADER.size:
                job, size = _HEADER.unpack(header)
                records.append(_Record(JobId(job), path, file.tell(), size))
                file.seek(size, os.SEEK_CUR)
    except FileNotFoundError:
        return []
    return records
