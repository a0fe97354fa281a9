"""Rows of evidence that did not go out with their answers, for payers that ask for them within a day.

They are kept in memory alone: the tokens of an answer say what it said, and no content of a job reaches the provider's disk. A
restart forgets them. A payer asks with an ordinary job on EVIDENCE_ROUTE, sealed like any other, which costs nothing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from node.ports import EngineEvent, ResponseEnd, ResponseStart
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_text
from tallystick.protocol.lenient_json import load_lenient
from tallystick.protocol.routes import JSON
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import dumps

KEEP_SECONDS = 86_400.0
MAX_KEPT_BYTES = 64 << 20
"""Bytes of all rows: those of two million tokens. Beyond it the oldest are forgotten."""
ROWS_TYPE = "application/octet-stream"
_FREE = ReportedUsage(0, 0, 0)


class _Kept(NamedTuple):
    payer: Address
    until: float
    rows: bytes


class KeptEvidence:
    """See the module's docstring. `clock` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._clock, self._max_bytes = clock, max_bytes
        self._kept: OrderedDict[JobId, _Kept] = OrderedDict()
        self._size = 0

    def keep(self, job: JobId, payer: Address, rows: bytes) -> None:
        """Keeps the rows of a job's answer."""
        now = self._clock()
        self._kept[job] = _Kept(payer, now + KEEP_SECONDS, rows)
        self._size += len(rows)
        while self._kept and (self._size > self._max_bytes or next(iter(self._kept.values())).until <= now):
            self._size -= len(self._kept.popitem(last=False)[1].rows)

    def find(self, job: JobId, payer: Address) -> bytes | None:
        """The rows of a job of this payer; None if they are not kept, or are another payer's."""
        kept = self._kept.get(job)
        return kept.rows if kept is not None and kept.payer == payer and kept.until > self._clock() else None

    async def answer(self, body: bytes, payer: Address) -> AsyncGenerator[EngineEvent, None]:
        """The answer to a request on EVIDENCE_ROUTE, in the place of an engine's."""
        try:
            members = load_lenient(body)
            job = JobId(bytes.fromhex(read_text(members.get("job"), "job", 32)))
        except (ValueError, BadMessage):
            job = JobId(b"")
        rows = self.find(job, payer)
        if rows is None:
            text = "job: expected a job of this payer of the last day whose evidence did not come with its answer"
            yield ResponseStart(404, JSON)
            yield ResponseEnd(
                dumps({"error": {"message": text, "type": "invalid_request_error", "code": "unknown_job"}}), usage=_FREE
            )
        else:
            yield ResponseStart(200, ROWS_TYPE)
            yield ResponseEnd(rows, usage=_FREE)
