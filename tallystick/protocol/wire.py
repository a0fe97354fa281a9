"""Binary formats: job submissions, response frames, and frames of the node link.

A submission (client -> coordinator, body of POST /v1/jobs): 1 byte PROTOCOL, 16 bytes job id, options (options.py), 1 byte number
of candidates, each as 2 bytes length and the candidate, then the sealed request.
A dispatch (coordinator -> node, payload of a DISPATCH frame): 1 byte PROTOCOL, 2 bytes length and the match
(match_log.py), 2 bytes length and the candidate, then the sealed request.
A candidate: the signed order, the terms, then the wrapped key. Signed messages and terms are in their binary form (eip712.py).
Numbers are big-endian.

A response frame (coordinator -> client) is 1 byte kind, 4 bytes big-endian length, payload.
A link frame (coordinator <-> node, one binary WebSocket message) is 1 byte kind, 16 bytes job id, payload.
The link between client and coordinator carries response frames of many jobs (job_link.py).

The plaintexts inside are described in plaintext_heads.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from typing import Any

import orjson

from tallystick.protocol.codecs import pack_sized, take, unpack_sized
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.eip712 import Signed, read_signed_bytes, unpack_signed
from tallystick.protocol.errors import BadMessage, TallyError, error_from_json
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.options import IGNORABLE, Option, flag, pack_options, unpack_options, whole_number
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.types import JobId
from tallystick.protocol.versions import PROTOCOL, check_first_byte

MAX_HEADER = 32 * 1024
"""The most bytes before a dispatch's sealed request; see `Dispatch`."""
MAX_BODY = 32 * 1024 * 1024
MAX_FRAME = 1024 * 1024
MAX_WRAPPED = 4_096
MAX_MATCH = 20_480
"""Bytes of a match."""
MAX_HEDGE_MS = 600_000


@functools.lru_cache(maxsize=512)
def _write_hints(hints: RankingHints) -> bytes:
    """Cached, as what it reads: the jobs of one application have the same few hints."""
    return dumps(hints.to_json())


@functools.lru_cache(maxsize=512)
def _read_hints(value: bytes, where: str) -> RankingHints:
    return RankingHints.from_json(loads(value, where), where)


def _read_trace(value: bytes, _where: str) -> TraceContext | None:
    return TraceContext.unpack(value)


SUBMISSION_OPTIONS = (
    flag(1, "ranked", "ranked"),
    whole_number(2, "wait", "wait"),
    whole_number(3, "hedge_after_ms", "hedgeAfterMs", 1, MAX_HEDGE_MS),
    Option(IGNORABLE, "hints", "hints", _write_hints, _read_hints),
    flag(IGNORABLE + 1, "batch", "batch"),
    Option(IGNORABLE + 2, "trace", "trace", TraceContext.pack, _read_trace),
)
"""The members of a submission that may be absent. Each keeps its number for ever."""
_OPTIONS = {option.number: option for option in SUBMISSION_OPTIONS}
NO_JOB = JobId(bytes(16))
LINK_HEAD = 17
COPIED_BYTES = 1 << 16
"""Bytes of a sealed request up to which a copy costs less than the rest of the body that a view of it keeps."""
INITIAL_CREDIT = 64
"""The number of chunks that a node may send for a job before the coordinator grants more with CREDIT."""


class Kind(IntEnum):
    """The kind of a frame, as its number on the wire.

    A payload that is one `Signed` message is in binary form; other payloads are JSON if not stated otherwise.
    """

    MATCH = 1  # coordinator -> client: a Match in its binary form (match_log.py), not signed but logged
    CHUNK = 2  # node -> coordinator -> client: a sealed chunk, raw
    RECEIPT = 3  # node -> coordinator -> client: Signed[Receipt]
    FAIL = 4  # node -> coordinator -> client: Failure, as JSON and binary
    BEAT = 5  # coordinator -> client: empty, or a QueuePlace; node -> coordinator: Beat
    VOID = 6  # coordinator -> client: Signed[Receipt] at no cost, for an attempt that failed or lost before the job ended
    HEDGE = 7  # coordinator -> client: the Match of a second attempt, which runs beside the one that was matched last

    CHALLENGE = 16  # coordinator -> node: Challenge
    HELLO = 17  # node -> coordinator: Hello; client -> coordinator: {"protocol", "software"}
    WELCOME = 18  # coordinator -> node: {"replicas": [URL]}, {} if it is alone; coordinator -> client: {"protocol"}
    ASKS = 19  # node -> coordinator: Listing, replaces all earlier asks
    DISPATCH = 20  # coordinator -> node: Dispatch, binary
    ACCEPT = 21  # node -> coordinator: empty; the job was admitted
    CANCEL = 22  # coordinator -> node: a CancelReason as text; empty means CLIENT. client -> coordinator: empty
    CREDIT = 23  # coordinator -> node: 4 bytes big-endian, the number of further chunks; client -> coordinator: of bytes
    RECEIPT_ACK = 24  # coordinator -> node: empty; the receipt is stored durably
    CLAIM = 25  # node -> coordinator: ClaimRequest
    ERROR = 26  # coordinator -> node: an OpenAI error object; the link is closed after it. -> client: or its stream has ended
    RECEIPT_REFUSED = 27  # coordinator -> node: an OpenAI error object; the receipt must not be sent again
    LATE_RECEIPT = 28  # node -> coordinator: LateReceipt, if RECEIPT was not acknowledged
    RECALL = 29  # node -> coordinator: {"after": address or ""}; asks for its last receipt on each tab, for payers after this one
    RECALLED = 30  # coordinator -> node: {"receipts": [LateReceipt], "more": bool}, by payer

    SUBMIT = 31  # client -> coordinator: the seconds that the job may linger, and a Submission; see job_link.py
    LEAVE = 32  # client -> coordinator: empty; the client reads the stream no further
    ORDERS = 33  # client -> coordinator: candidates, as in a Submission; further orders for a job that waits
    ADDED = 34  # coordinator -> client: empty, or an OpenAI error object; the answer to ORDERS
    END = 35  # coordinator -> client: empty; the stream has ended

    REPLICAS = 36  # coordinator -> node that announced `replicas`: [URL]; the coordinator's replicas have changed
    TRACE = 37  # coordinator -> node that announced `trace`: the TraceContext of the job whose DISPATCH follows
    RESUME = 38  # coordinator -> node that announced `resume`: 4 bytes big-endian, the number of the job's chunks that came


class CancelReason(str, Enum):
    """The reason for which a node must stop a job. It determines the receipt's outcome, and so the charge."""

    CLIENT = "client"
    TIMED_OUT = "timed_out"
    COORDINATOR = "coordinator"
    HEDGED = "hedged"
    """The job ran at two providers, and the other one had output first."""

    @classmethod
    def loads(cls, payload: bytes) -> CancelReason:
        """Reads a CANCEL's payload. Raises BadMessage."""
        try:
            return cls(payload.decode()) if payload else cls.CLIENT
        except ValueError:
            raise BadMessage("cancel: expected client, timed_out, coordinator, hedged or an empty payload") from None


def loads(data: bytes | str, name: str) -> Any:
    """Parses JSON. `name` is the document's name in errors. Raises BadMessage."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"{name}: not JSON: {error}") from None


def dumps(value: Any) -> bytes:
    """Compact JSON. Raises BadMessage for a value that cannot be written, such as one that is nested too deeply."""
    try:
        return bytes(memoryview(orjson.dumps(value)))  # a copy: what orjson returns takes 4 KiB of memory at least
    except orjson.JSONEncodeError as error:
        raise BadMessage(f"JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One provider of a shortlist: an order on it, the order's terms, and the content key wrapped for it."""

    order: Signed[Order]
    terms: Terms
    wrapped_key: bytes
    raw: bytes | None = field(default=None, repr=False, compare=False)
    """The wire form that it was read from, which is forwarded without another encoding."""

    def to_bytes(self) -> bytes:
        """The wire form. Raises BadMessage."""
        if self.raw is not None:
            return self.raw
        return self.order.to_bytes() + self.terms.to_bytes() + self.wrapped_key

    @classmethod
    def from_bytes(cls, raw: bytes, where: str = "candidate") -> Candidate:
        """Reads the wire form and checks that the order commits to the terms. Raises BadMessage."""
        order, at = unpack_signed(Order, raw, 0, f"{where}.order")
        terms, at = Terms.unpack(raw, at, f"{where}.terms")
        wrapped = raw[at:]
        if len(wrapped) > MAX_WRAPPED:
            raise BadMessage(f"{where}.wrappedKey: expected at most {MAX_WRAPPED} bytes, got {len(wrapped)}")
        if order.message.word("terms_hash") != terms.struct_hash():
            raise BadMessage(f"{where}.order.termsHash: expected the hash of the candidate's terms")
        return cls(order, terms, wrapped, raw)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as the client posts it: 1 to 8 candidates of one payer, and the request, sealed once for all of them."""

    job: JobId
    candidates: tuple[Candidate, ...]
    sealed: bytes | memoryview
    ranked: bool = False
    """Whether the coordinator must try the candidates in the client's order, instead of the cheapest first."""
    wait: int | None = None
    """Seconds that the job may wait for a free slot; 0: not at all. None: as long as the coordinator lets jobs wait."""
    hedge_after_ms: int | None = None
    """Milliseconds after its dispatch at which a job without output may be given to a second provider too. None: never."""
    hints: RankingHints | None = None
    """What the coordinator may rank the candidates by, if the client leaves their order to it."""
    batch: bool = False
    """Whether the job waits behind interactive ones. At least one slot in eight goes to batch jobs while some wait."""
    trace: TraceContext | None = None
    """The span of the client that the job belongs to; None unless the client shares it. No job depends on it."""

    def dumps(self) -> bytes:
        """The wire form. Raises BadMessage."""
        count = len(self.candidates).to_bytes(1, "big")
        candidates = (pack_sized(candidate.to_bytes()) for candidate in self.candidates)
        options = pack_options(SUBMISSION_OPTIONS, self)
        return b"".join((bytes((PROTOCOL,)), self.job, options, count, *candidates, self.sealed))

    def without_candidates(self) -> Submission:
        """The same submission without its candidates, for one that is kept for a while: a caller packs them more tightly.

        It does not keep the body that it was read from, unless the request has more than COPIED_BYTES and so stays a view.
        """
        sealed = bytes(self.sealed) if len(self.sealed) <= COPIED_BYTES else self.sealed
        return replace(self, candidates=(), sealed=sealed)

    @classmethod
    def loads(cls, data: bytes) -> Submission:
        """Reads the wire form. All candidates must be of one payer, of one model and of this job. Raises BadMessage.

        The sealed request is a view of `data`; everything else is copied. No signature is checked.
        """
        check_first_byte(data, "submission", "the client")
        job = JobId(take(data, 1, 16, "submission.job"))
        members, at = unpack_options(_OPTIONS, data, 17, "submission")
        count, at = take(data, at, 1, "submission.candidates")[0], at + 1
        if not 1 <= count <= MAX_CANDIDATES:
            raise BadMessage(f"submission.candidates: expected at least one and at most {MAX_CANDIDATES}, got {count}")
        candidates = []
        for i in range(count):
            raw, at = unpack_sized(data, at, f"candidates[{i}]")
            candidates.append(Candidate.from_bytes(raw, f"candidates[{i}]"))
        _check_alike(job, candidates)
        return cls(job, tuple(candidates), memoryview(data)[at:], **members)


def _check_alike(job: JobId, candidates: Sequence[Candidate]) -> None:
    payer, model = candidates[0].order.message.word("payer"), candidates[0].terms.model
    for candidate in candidates:
        if candidate.order.message.word("payer") != payer:
            raise BadMessage("submission.candidates: expected orders of one payer, got several payers")
        if candidate.terms.model != model:
            raise BadMessage("submission.candidates: expected terms of one model, got several models")
        if candidate.terms.word("job")[:16] != job:
            raise BadMessage("submission.candidates: expected terms of the submission's job, got terms of another job")


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A job as the coordinator sends it to one node."""

    match: Match
    candidate: Candidate
    sealed: bytes | memoryview

    def dumps(self) -> bytes:
        """The wire form. Raises BadMessage."""
        return b"".join(self._parts())

    def frame(self, job: JobId) -> bytes:
        """The DISPATCH frame, which copies the sealed request once. Raises BadMessage."""
        return b"".join((bytes((Kind.DISPATCH,)), job, *self._parts()))

    def _parts(self) -> tuple[bytes | memoryview, ...]:
        return bytes((PROTOCOL,)), pack_sized(self.match.dumps(), MAX_MATCH), pack_sized(self.candidate.to_bytes()), self.sealed

    @classmethod
    def loads(cls, data: bytes) -> Dispatch:
        """Reads the wire form. The sealed request is a view of `data`. Raises BadMessage."""
        check_first_byte(data, "dispatch", "the coordinator")
        match, at = unpack_sized(data, 1, "dispatch.match", MAX_MATCH)
        raw, at = unpack_sized(data, at, "dispatch.candidate")
        candidate = Candidate.from_bytes(raw, "dispatch.candidate")
        candidate.terms.decode()  # the node reads nearly all of them
        return cls(Match.loads(match), candidate, memoryview(data)[at:])


@dataclass(frozen=True, slots=True)
class Failure:
    """The payload of a FAIL frame: an OpenAI error object and, from a node, the receipt that releases the order's cap.

    The wire form is the error as JSON. A receipt follows after a zero byte, which JSON never contains.
    """

    error: TallyError
    receipt: Signed[Receipt] | None = None

    def dumps(self) -> bytes:
        """The wire form."""
        return dumps(self.error.as_json()) + (b"" if self.receipt is None else b"\0" + self.receipt.to_bytes())

    @staticmethod
    def split(data: bytes) -> tuple[dict[str, Any], bytes | None]:
        """The error's JSON members, empty if they cannot be read, and the receipt's bytes; None without one. All unchecked."""
        head, separator, receipt = data.partition(b"\0")
        try:
            raw = loads(head, "failure")
        except BadMessage:
            raw = None
        return raw if isinstance(raw, dict) else {}, receipt if separator else None

    @classmethod
    def loads(cls, data: bytes) -> Failure:
        """Reads the wire form; see `error_from_json` for the error. Raises BadMessage for a malformed one or its receipt."""
        head, separator, receipt = data.partition(b"\0")
        error = error_from_json(loads(head, "failure"), 502)
        return cls(error, read_signed_bytes(Receipt, receipt, "failure.receipt") if separator else None)


_FRAME_HEAD = 5


def pack_frame(kind: Kind, payload: bytes = b"") -> bytes:
    """Encodes a response frame."""
    return b"".join((bytes((kind,)), len(payload).to_bytes(4, "big"), payload))


class FrameReader:
    """Splits a byte stream into response frames. Buffers at most one incomplete frame of `limit` bytes."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._needed = _FRAME_HEAD
        """Buffered bytes from which on something can be read."""
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Yields the frames that `data` completes. Raises BadMessage for an unknown kind or an oversized frame."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        at, end, self._needed = 0, len(data), _FRAME_HEAD
        try:
            while end - at >= _FRAME_HEAD:
                size = int.from_bytes(data[at + 1 : at + _FRAME_HEAD], "big")
                if size > self._limit:
                    raise BadMessage(f"frame: expected at most {self._limit} bytes, got {size}")
                start, stop = at + _FRAME_HEAD, at + _FRAME_HEAD + size
                if stop > end:
                    self._needed = stop - at
                    return
                kind, payload, at = data[at], data[start:stop], stop
                yield read_kind(kind), payload
        finally:  # also if the caller takes only some of the frames
            self._buffer += data[at:]

    @property
    def pending(self) -> int:
        """The number of buffered bytes, which belong to an incomplete frame."""
        return len(self._buffer)


def pack_link(kind: Kind, job: JobId = NO_JOB, payload: bytes = b"") -> bytes:
    """Encodes a link frame."""
    return b"".join((bytes((kind,)), job, payload))


def unpack_link(data: bytes | str) -> tuple[Kind, JobId, bytes]:
    """Decodes a link frame into kind, job and payload. Raises BadMessage."""
    if not isinstance(data, bytes) or len(data) < LINK_HEAD:
        raise BadMessage(f"link frame: expected a binary message of at least {LINK_HEAD} bytes")
    return read_kind(data[0]), JobId(data[1:LINK_HEAD]), data[LINK_HEAD:]


def read_kind(number: int) -> Kind:
    """The kind with this number. Raises BadMessage for an unknown number."""
    kind = _KINDS.get(number)
    if kind is None:
        raise BadMessage(f"frame: expected a known kind, got {number}")
    return kind


_KINDS = {int(kind): kind for kind in Kind}
"""A dict lookup is faster than a call of the enum, which would cost more than the rest of a frame."""
