"""Binary formats: job submissions, response frames, and frames of the node link.

A submission (client -> coordinator, body of POST /v1/jobs) and a dispatch (coordinator -> node, payload of a DISPATCH frame) are
a 4-byte big-endian length, a JSON header of that length, and the sealed request.

A response frame (coordinator -> client) is 1 byte kind, 4 bytes big-endian length, payload.
A link frame (coordinator <-> node, one binary WebSocket message) is 1 byte kind, 16 bytes job id, payload.

The plaintext of a request is a JSON line (`RequestHead`) followed by the client's body. The plaintext of a response is a JSON
object (`ResponseHead`) as the first chunk, followed by the engine's body in chunks. Only client and node see these.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

import orjson

from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import BadMessage, TallyError, error_from_json
from tallystick.protocol.json_members import read_content_type, read_count, read_items, read_members, read_text
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.types import JobId, parse_job_id

MAX_HEADER = 256 * 1024
MAX_BODY = 32 * 1024 * 1024
MAX_FRAME = 1024 * 1024
MAX_WRAPPED = 4_096
MAX_MATCH = 8_192
"""Characters of a match in a dispatch, in base64."""
MAX_HEDGE_MS = 600_000
NO_JOB = JobId(bytes(16))
LINK_HEAD = 17
INITIAL_CREDIT = 64
"""The number of chunks that a node may send for a job before the coordinator grants more with CREDIT."""


class Kind(IntEnum):
    """The kind of a frame, as its number on the wire. Payloads are JSON if not stated otherwise."""

    MATCH = 1  # coordinator -> client: a Match in its binary form (match_log.py), not signed but logged
    CHUNK = 2  # node -> coordinator -> client: a sealed chunk, raw
    RECEIPT = 3  # node -> coordinator -> client: Signed[Receipt]
    FAIL = 4  # node -> coordinator -> client: Failure
    BEAT = 5  # coordinator -> client: empty, or a QueuePlace; keeps the connection alive; node -> coordinator: Capacity
    VOID = 6  # coordinator -> client: Signed[Receipt] at no cost, for an attempt that failed or lost before the job ended
    HEDGE = 7  # coordinator -> client: the Match of a second attempt, which runs beside the one that was matched last

    CHALLENGE = 16  # coordinator -> node: Challenge
    HELLO = 17  # node -> coordinator: Hello
    WELCOME = 18  # coordinator -> node: {}
    ASKS = 19  # node -> coordinator: {"asks": [Signed[Ask]]}, replaces all earlier asks
    DISPATCH = 20  # coordinator -> node: Dispatch
    ACCEPT = 21  # node -> coordinator: empty; the job was admitted
    CANCEL = 22  # coordinator -> node: a CancelReason as text; empty means CLIENT
    CREDIT = 23  # coordinator -> node: 4 bytes big-endian, the number of further chunks that may be sent
    RECEIPT_ACK = 24  # coordinator -> node: empty; the receipt is stored durably
    CLAIM = 25  # node -> coordinator: ClaimRequest
    ERROR = 26  # coordinator -> node: an OpenAI error object; the link is closed after it
    RECEIPT_REFUSED = 27  # coordinator -> node: an OpenAI error object; the receipt must not be sent again
    LATE_RECEIPT = 28  # node -> coordinator: LateReceipt, if RECEIPT was not acknowledged
    RECALL = 29  # node -> coordinator: {"after": address or ""}; asks for its last receipt on each tab, for payers after this one
    RECALLED = 30  # coordinator -> node: {"receipts": [LateReceipt], "more": bool}, by payer


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
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise BadMessage(f"JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One provider of a shortlist: an order on it, the order's terms, and the content key wrapped for it."""

    order: Signed[Order]
    terms: Terms
    wrapped_key: bytes
    raw: dict[str, Any] | None = field(default=None, repr=False, compare=False)
    """The wire form that it was read from, which is forwarded and stored without another encoding."""

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        if self.raw is not None:
            return self.raw
        wrapped = base64.b64encode(self.wrapped_key).decode()
        return {"order": self.order.to_json(), "terms": self.terms.to_json(), "wrappedKey": wrapped}

    @classmethod
    def from_json(cls, raw: object, where: str = "candidate") -> Candidate:
        """Reads the wire form and checks that the order commits to the terms. Raises BadMessage."""
        order, terms, wrapped = read_members(raw, where, "order", "terms", "wrappedKey")
        key = _read_base64(wrapped, f"{where}.wrappedKey", MAX_WRAPPED)
        parts = read_signed(Order, order, f"{where}.order"), Terms.from_json(terms, f"{where}.terms"), key
        candidate = cls(*parts, raw={"order": order, "terms": terms, "wrappedKey": wrapped})
        if candidate.order.message.terms_hash != candidate.terms.struct_hash():
            raise BadMessage(f"{where}.order.termsHash: expected the hash of the candidate's terms")
        return candidate


def _read_base64(raw: object, where: str, limit: int) -> bytes:
    try:
        return base64.b64decode(read_text(raw, where, limit), validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage(f"{where}: expected base64") from None


def _join(header: Any, sealed: bytes) -> bytes:
    head = dumps(header)
    return b"".join((len(head).to_bytes(4, "big"), head, sealed))


def _split(data: bytes, name: str) -> tuple[Any, bytes]:
    size = int.from_bytes(data[:4], "big")
    if len(data) < 4 or size > min(len(data) - 4, MAX_HEADER):
        raise BadMessage(f"{name}: cut off, or its header is longer than {MAX_HEADER} bytes")
    return loads(data[4 : 4 + size], f"{name} header"), data[4 + size :]


def _read_optional(header: dict[str, Any], member: str, low: int = 0, high: int = (1 << 32) - 1) -> int | None:
    value = header.get(member)
    return None if value is None else read_count(value, f"submission.{member}", low, high)


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as the client posts it: 1 to 8 candidates of one payer, and the request, sealed once for all of them."""

    job: JobId
    candidates: tuple[Candidate, ...]
    sealed: bytes
    ranked: bool = False
    """Whether the coordinator must try the candidates in the client's order, instead of the cheapest first."""
    wait: int | None = None
    """Seconds that the job may wait for a free slot; 0: not at all. None: as long as the coordinator lets jobs wait."""
    hedge_after_ms: int | None = None
    """Milliseconds after its dispatch at which a job without output may be given to a second provider too. None: never."""

    def dumps(self) -> bytes:
        """The wire form."""
        header: dict[str, Any] = {"job": self.job.hex(), "candidates": [c.to_json() for c in self.candidates]}
        if self.ranked:
            header["ranked"] = True
        if self.wait is not None:
            header["wait"] = self.wait
        if self.hedge_after_ms is not None:
            header["hedgeAfterMs"] = self.hedge_after_ms
        return _join(header, self.sealed)

    @classmethod
    def loads(cls, data: bytes) -> Submission:
        """Reads the wire form. All candidates must be of one payer, of one model and of this job. Raises BadMessage."""
        header, sealed = _split(data, "submission")
        job, candidates = read_members(header, "submission", "job", "candidates")
        listed = read_items(candidates, "submission.candidates", MAX_CANDIDATES)
        ranked = header.get("ranked", False)
        if not isinstance(ranked, bool):
            raise BadMessage("submission.ranked: expected true or false")
        submission = cls(
            parse_job_id(read_text(job, "submission.job"), "submission.job"),
            tuple(Candidate.from_json(raw, f"candidates[{i}]") for i, raw in enumerate(listed)),
            sealed,
            ranked,
            _read_optional(header, "wait"),
            _read_optional(header, "hedgeAfterMs", 1, MAX_HEDGE_MS),
        )
        if not submission.candidates:
            raise BadMessage("submission.candidates: expected at least one")
        if len({c.order.message.payer for c in submission.candidates}) > 1:
            raise BadMessage("submission.candidates: expected orders of one payer, got several payers")
        if len({c.terms.model for c in submission.candidates}) > 1:
            raise BadMessage("submission.candidates: expected terms of one model, got several models")
        if any(c.terms.job != submission.job for c in submission.candidates):
            raise BadMessage("submission.candidates: expected terms of the submission's job, got terms of another job")
        return submission


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A job as the coordinator sends it to one node."""

    match: Match
    candidate: Candidate
    sealed: bytes

    def dumps(self) -> bytes:
        """The wire form."""
        match = base64.b64encode(self.match.dumps()).decode()
        return _join({"match": match, "candidate": self.candidate.to_json()}, self.sealed)

    @classmethod
    def loads(cls, data: bytes) -> Dispatch:
        """Reads the wire form. Raises BadMessage."""
        header, sealed = _split(data, "dispatch")
        match, candidate = read_members(header, "dispatch", "match", "candidate")
        logged = Match.loads(_read_base64(match, "dispatch.match", MAX_MATCH))
        return cls(logged, Candidate.from_json(candidate, "dispatch.candidate"), sealed)


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """The payload of a BEAT frame for a job that waits for a free slot: its place, 1 for the next, and the expected wait.

    `wait_ms`: milliseconds; None if the coordinator has measured nothing yet.
    """

    position: int
    wait_ms: int | None = None

    @property
    def seconds(self) -> int | None:
        """The expected wait in whole seconds, at least 1; None if it is unknown."""
        return None if self.wait_ms is None else max(1, round(self.wait_ms / 1_000))

    @property
    def words(self) -> str:
        """The expected wait as it is shown behind the position; empty if it is unknown."""
        return "" if self.seconds is None else f", about {self.seconds} s"

    def to_json(self) -> dict[str, Any]:
        """The wire form, as an object."""
        return {"position": self.position} | ({} if self.wait_ms is None else {"waitMs": self.wait_ms})

    def dumps(self) -> bytes:
        """The wire form."""
        return dumps(self.to_json())

    @classmethod
    def loads(cls, data: bytes) -> QueuePlace:
        """Reads the wire form. Raises BadMessage."""
        return cls.from_json(loads(data, "place"))

    @classmethod
    def from_json(cls, raw: Any) -> QueuePlace:
        """Reads the wire form, as an object. Raises BadMessage."""
        (position,) = read_members(raw, "place", "position")
        wait = raw.get("waitMs")
        return cls(read_count(position, "place.position"), None if wait is None else read_count(wait, "place.waitMs"))


@dataclass(frozen=True, slots=True)
class Failure:
    """The payload of a FAIL frame: an OpenAI error object and, from a node, the receipt that releases the order's cap."""

    error: TallyError
    receipt: Signed[Receipt] | None = None

    def dumps(self) -> bytes:
        """The wire form."""
        receipt = {} if self.receipt is None else {"receipt": self.receipt.to_json()}
        return dumps(self.error.as_json() | receipt)

    @staticmethod
    def members(data: bytes) -> dict[str, Any]:
        """The members of the wire form, unchecked; empty if it is no JSON object."""
        try:
            raw = loads(data, "failure")
        except BadMessage:
            return {}
        return raw if isinstance(raw, dict) else {}

    @classmethod
    def loads(cls, data: bytes) -> Failure:
        """Reads the wire form; see `error_from_json` for the error. Raises BadMessage for a malformed receipt."""
        raw = loads(data, "failure")
        receipt = raw.get("receipt") if isinstance(raw, dict) else None
        return cls(error_from_json(raw, 502), None if receipt is None else read_signed(Receipt, receipt, "failure.receipt"))


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The first line of a request's plaintext: the OpenAI route, and the content type of the body."""

    path: str
    content_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The first chunk of a response's plaintext: the engine's HTTP status and content type."""

    status: int
    content_type: str


def join_request(head: RequestHead, body: bytes) -> bytes:
    """The plaintext of a request."""
    return dumps({"path": head.path, "contentType": head.content_type}) + b"\n" + body


def split_request(plain: bytes) -> tuple[RequestHead, bytes]:
    """Splits the plaintext of a request into its head and its body. Raises BadMessage."""
    line, separator, body = plain.partition(b"\n")
    if not separator:
        raise BadMessage("request: expected a head line that ends with LF")
    path, content_type = read_members(loads(line, "request head"), "request head", "path", "contentType")
    return RequestHead(read_text(path, "request.path"), read_content_type(content_type, "request.contentType")), body


def dump_response_head(head: ResponseHead) -> bytes:
    """The first plaintext chunk of a response."""
    return dumps({"status": head.status, "contentType": head.content_type})


def load_response_head(chunk: bytes) -> ResponseHead:
    """Reads the first plaintext chunk of a response. Raises BadMessage."""
    status, content_type = read_members(loads(chunk, "response head"), "response head", "status", "contentType")
    return ResponseHead(read_count(status, "response.status", 100, 599), read_content_type(content_type, "response.contentType"))


def pack_frame(kind: Kind, payload: bytes = b"") -> bytes:
    """Encodes a response frame."""
    return b"".join((bytes((kind,)), len(payload).to_bytes(4, "big"), payload))


class FrameReader:
    """Splits a byte stream into response frames. Buffers at most one incomplete frame of `limit` bytes."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Yields the frames that `data` completes. Raises BadMessage for an unknown kind or an oversized frame."""
        self._buffer += data
        while len(self._buffer) >= 5:
            size = int.from_bytes(self._buffer[1:5], "big")
            if size > self._limit:
                raise BadMessage(f"frame: expected at most {self._limit} bytes, got {size}")
            if len(self._buffer) < 5 + size:
                return
            kind, payload = self._buffer[0], bytes(self._buffer[5 : 5 + size])
            del self._buffer[: 5 + size]
            yield read_kind(kind), payload

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
