"""Answers that ended and whose receipts are not acknowledged: if their connection broke, their ends are sent again.

The receipt is signed for the whole answer before its last chunk leaves. If the connection breaks with that chunk in it, the
coordinator asks for what is missing once this node is back (RESUME). Otherwise the receipt would charge for more than came.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

import structlog

from node.ports import Link
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind

log = structlog.get_logger()
MAX_ANSWER_BYTES = 1 << 20
"""Bytes of one answer's newest chunks that are kept."""
MAX_BYTES = 64 << 20
"""Bytes of all answers that are kept."""
_OVERHEAD_BYTES = 1_024
"""Bytes that an answer takes beside its chunks."""
_MAX_REQUESTS = 64


class SentChunks:
    """The newest chunks of one answer, from the first one that its coordinator may not have."""

    __slots__ = ("_chunks", "_first", "size")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._first = 0
        self.size = 0

    def add(self, chunk: bytes) -> None:
        """Adds a chunk that is sent. The oldest ones make room."""
        self._chunks.append(chunk)
        self.size += len(chunk)
        while self.size > MAX_ANSWER_BYTES:
            self._drop()

    def confirm(self, count: int) -> None:
        """Drops `count` chunks more, which the coordinator has."""
        for _ in range(min(count, len(self._chunks))):
            self._drop()

    def _drop(self) -> None:
        self.size -= len(self._chunks.popleft())
        self._first += 1

    def since(self, number: int) -> list[bytes] | None:
        """The chunks from this number on, which may be none; None if some of them are not kept."""
        return list(self._chunks)[number - self._first :] if number >= self._first else None


class _Answer(NamedTuple):
    coordinator: Address
    chunks: SentChunks
    receipt: bytes

    @property
    def size(self) -> int:
        return self.chunks.size + _OVERHEAD_BYTES


class ResumableAnswers:
    """See the module's docstring. The oldest answers make room for new ones."""

    def __init__(self) -> None:
        self._answers: OrderedDict[JobId, _Answer] = OrderedDict()
        self._requests: OrderedDict[JobId, tuple[Link, int]] = OrderedDict()
        """What was asked for of jobs that are not here. Their receipts may still be on their way to the disk."""
        self._size = 0

    def __len__(self) -> int:
        return len(self._answers)

    def keep(self, link: Link, job: JobId, chunks: SentChunks, receipt: bytes) -> None:
        """Keeps an answer that was sent, until `forget`."""
        self._answers[job] = answer = _Answer(link.coordinator, chunks, receipt)
        self._size += answer.size
        while self._size > MAX_BYTES:
            self.forget(next(iter(self._answers)))
        if (request := self._requests.pop(job, None)) is not None:
            self._send(*request, job)

    def forget(self, job: JobId) -> None:
        """Forgets an answer, whose receipt the coordinator acknowledged or refused."""
        if (answer := self._answers.pop(job, None)) is not None:
            self._size -= answer.size

    def resume(self, link: Link, job: JobId, payload: bytes) -> None:
        """Sends what is missing of an answer, and its receipt, as a RESUME frame asks for. Raises BadMessage."""
        if len(payload) != 4:
            raise BadMessage(f"resume: expected 4 bytes, got {len(payload)}")
        number = int.from_bytes(payload, "big")
        if job in self._answers:
            self._send(link, number, job)
            return
        self._requests[job] = link, number
        if len(self._requests) > _MAX_REQUESTS:
            self._requests.popitem(last=False)

    def _send(self, link: Link, number: int, job: JobId) -> None:
        answer = self._answers[job]
        chunks = answer.chunks.since(number)
        if chunks is None or answer.coordinator != link.coordinator:
            return
        log.info("the end of an answer is sent again", job=job.hex(), chunks=len(chunks))
        for chunk in chunks:
            link.post(Kind.CHUNK, job, chunk)
        link.post(Kind.RECEIPT, job, answer.receipt)
