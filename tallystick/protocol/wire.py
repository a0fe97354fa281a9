"""How bytes travel: job submissions, the frames of a job's response, and the frames of the node link.

Submission (client -> coordinator, body of POST /v1/jobs) and dispatch (coordinator -> node, payload of a DISPATCH frame):
a 4-byte big-endian length, that many bytes of JSON (the header), then the sealed request, untouched.

Response frames (coordinator -> client): 1 byte kind, 4 bytes big-endian length, payload.
Link frames (coordinator <-> node, one WebSocket binary message each): 1 byte kind, 16 bytes job id, payload.

The plaintext of a request is a JSON line (`RequestHead`), then the body as the client sent it; that of a response is a JSON line
(`ResponseHead`) as first chunk, then the body as the engine sent it, cut into chunks. Only the two ends ever see these.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

import orjson

from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import BadMessage, TallyError, error_from_json
from tallystick.protocol.json_members import read_content_type, read_count, read_items, read_members, read_text
from tallystick.protocol.messages import Match, Order, Receipt, Terms
from tallystick.protocol.types import JobId, parse_job_id

MAX_HEADER = 256 * 1024
MAX_BODY = 32 * 1024 * 1024
MAX_FRAME = 1024 * 1024
MAX_CANDIDATES = 8
MAX_WRAPPED = 4_096
NO_JOB = JobId(bytes(16))
LINK_HEAD = 17
INITIAL_CREDIT = 64
"""Chunks that a node may send for a job before the coordinator grants more with CREDIT."""


class Kind(IntEnum):
    """What a frame carries. Numbers are the wire; payloads are JSON unless said otherwise."""

    MATCH = 1  # coordinator -> client: Signed[Match]
    CHUNK = 2  # node -> coordinator -> client: a sealed chunk, raw
    RECEIPT = 3  # node -> coordinator -> client: Signed[Receipt]
    FAIL = 4  # node -> coordinator -> client: Failure
    BEAT = 5  # coordinator -> client: empty, keeps the connection alive; node -> coordinator: Capacity
    VOID = 6  # coordinator -> client: Signed[Receipt] at no cost, of an attempt that ended before the job did

    CHALLENGE = 16  # coordinator -> node: Challenge
    HELLO = 17  # node -> coordinator: Hello
    WELCOME = 18  # coordinator -> node: {}
    ASKS = 19  # node -> coordinator: {"asks": [Signed[Ask]]}, replaces the standing ones
    DISPATCH = 20  # coordinator -> node: Dispatch
    ACCEPT = 21  # node -> coordinator: empty; the job was admitted
    CANCEL = 22  # coordinator -> node: a CancelReason as text; empty: the client
    CREDIT = 23  # coordinator -> node: 4 bytes big-endian, how many more chunks may be sent
    RECEIPT_ACK = 24  # coordinator -> node: empty; the receipt is stored durably
    CLAIM = 25  # node -> coordinator: ClaimRequest
    ERROR = 26  # coordinator -> node: an error in OpenAI's shape, then the link is closed
    RECEIPT_REFUSED = 27  # coordinator -> node: an error in OpenAI's shape; sending that receipt again will not help
    LATE_RECEIPT = 28  # node -> coordinator: LateReceipt, where RECEIPT was not answered
    RECALL = 29  # node -> coordinator: {"after": address or ""}; what it last signed on each tab, of payers after this one
    RECALLED = 30  # coordinator -> node: {"receipts": [LateReceipt], "more": bool}, by payer


class CancelReason(str, Enum):
    """Why a node is told to stop a job. It decides the receipt's outcome, and so who pays."""

    CLIENT = "client"
    TIMED_OUT = "timed_out"
    COORDINATOR = "coordinator"

    @classmethod
    def loads(cls, payload: bytes) -> CancelReason:
        """Reads a CANCEL's payload. Raises BadMessage."""
        try:
            return cls(payload.decode()) if payload else cls.CLIENT
        except ValueError:
            raise BadMessage("cancel: not a reason that is known") from None


def loads(data: bytes | str, what: str) -> Any:
    """JSON. Raises BadMessage that names what was being read."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"{what}: not JSON: {error}") from None


def dumps(value: Any) -> bytes:
    """Compact JSON. Raises BadMessage for what was read, and is nested too deeply to be written."""
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
    """The wire form that it was read from: what is passed on and stored need not be written again."""

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
        try:
            key = base64.b64decode(read_text(wrapped, f"{where}.wrappedKey", MAX_WRAPPED), validate=True)
        except (binascii.Error, ValueError):
            raise BadMessage(f"{where}.wrappedKey: expected base64") from None
        parts = read_signed(Order, order, f"{where}.order"), Terms.from_json(terms, f"{where}.terms"), key
        made = cls(*parts, raw={"order": order, "terms": terms, "wrappedKey": wrapped})
        if made.order.message.terms_hash != made.terms.struct_hash():
            raise BadMessage(f"{where}.order.termsHash: not the hash of the terms beside it")
        return made


def _join(header: Any, sealed: bytes) -> bytes:
    head = dumps(header)
    return b"".join((len(head).to_bytes(4, "big"), head, sealed))


def _split(data: bytes, what: str) -> tuple[Any, bytes]:
    size = int.from_bytes(data[:4], "big")
    if len(data) < 4 or size > min(len(data) - 4, MAX_HEADER):
        raise BadMessage(f"{what}: cut off, or its header is longer than {MAX_HEADER} bytes")
    return loads(data[4 : 4 + size], f"{what} header"), data[4 + size :]


@dataclass(frozen=True, slots=True)
class Submission:
    """A job as the client posts it: 1 to 8 candidates of one payer, and the request sealed once for all of them."""

    job: JobId
    candidates: tuple[Candidate, ...]
    sealed: bytes
    ranked: bool = False
    """Whether the candidates are in the order in which the client would have them, instead of the cheapest first."""

    def dumps(self) -> bytes:
        """The wire form."""
        header = {"job": self.job.hex(), "candidates": [c.to_json() for c in self.candidates]}
        return _join(header | ({"ranked": True} if self.ranked else {}), self.sealed)

    @classmethod
    def loads(cls, data: bytes) -> Submission:
        """Reads the wire form: all candidates must be of one payer and this job. Raises BadMessage."""
        header, sealed = _split(data, "submission")
        job, candidates = read_members(header, "submission", "job", "candidates")
        listed = read_items(candidates, "submission.candidates", MAX_CANDIDATES)
        ranked = header.get("ranked", False)
        if not isinstance(ranked, bool):
            raise BadMessage("submission.ranked: expected true or false")
        made = cls(
            parse_job_id(read_text(job, "submission.job")),
            tuple(Candidate.from_json(raw, f"candidates[{i}]") for i, raw in enumerate(listed)),
            sealed,
            ranked,
        )
        if not made.candidates:
            raise BadMessage("submission.candidates: expected at least one")
        if len({c.order.message.payer for c in made.candidates}) > 1:
            raise BadMessage("submission.candidates: orders of several payers")
        if any(c.terms.job != made.job for c in made.candidates):
            raise BadMessage("submission.candidates: terms of another job")
        return made


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A job as one node gets it."""

    match: Signed[Match]
    candidate: Candidate
    sealed: bytes

    def dumps(self) -> bytes:
        """The wire form."""
        return _join({"match": self.match.to_json(), "candidate": self.candidate.to_json()}, self.sealed)

    @classmethod
    def loads(cls, data: bytes) -> Dispatch:
        """Reads the wire form. Raises BadMessage."""
        header, sealed = _split(data, "dispatch")
        match, candidate = read_members(header, "dispatch", "match", "candidate")
        return cls(read_signed(Match, match, "dispatch.match"), Candidate.from_json(candidate, "dispatch.candidate"), sealed)


@dataclass(frozen=True, slots=True)
class Failure:
    """The payload of a FAIL frame: an error in OpenAI's shape and, from a node that took the order or refused it, the receipt at
    no cost that releases the order's cap.
    """

    error: TallyError
    receipt: Signed[Receipt] | None = None

    def dumps(self) -> bytes:
        """The wire form."""
        receipt = {} if self.receipt is None else {"receipt": self.receipt.to_json()}
        return dumps(self.error.as_json() | receipt)

    @classmethod
    def loads(cls, data: bytes) -> Failure:
        """Reads the wire form. An error of an unknown shape becomes a general one. Raises BadMessage for a malformed receipt."""
        raw = loads(data, "failure")
        receipt = raw.get("receipt") if isinstance(raw, dict) else None
        return cls(error_from_json(raw, 502), None if receipt is None else read_signed(Receipt, receipt, "failure.receipt"))


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The first line of a request's plaintext: the OpenAI route and the body's content type."""

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
    """The inverse. Raises BadMessage."""
    line, separator, body = plain.partition(b"\n")
    if not separator:
        raise BadMessage("request: no head line")
    path, content_type = read_members(loads(line, "request head"), "request head", "path", "contentType")
    return RequestHead(read_text(path, "request.path"), read_content_type(content_type, "request.contentType")), body


def dump_response_head(head: ResponseHead) -> bytes:
    """The first plaintext chunk of a response."""
    return dumps({"status": head.status, "contentType": head.content_type})


def load_response_head(chunk: bytes) -> ResponseHead:
    """The inverse. Raises BadMessage."""
    status, content_type = read_members(loads(chunk, "response head"), "response head", "status", "contentType")
    return ResponseHead(read_count(status, "response.status", 100, 599), read_content_type(content_type, "response.contentType"))


def pack_frame(kind: Kind, payload: bytes = b"") -> bytes:
    """One frame of a job's response."""
    return b"".join((bytes((kind,)), len(payload).to_bytes(4, "big"), payload))


class FrameReader:
    """Cuts a byte stream into response frames, holding at most one frame beside what it was fed."""

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """The frames completed by `data`. Raises BadMessage for an unknown kind or an oversized frame."""
        self._buffer += data
        while len(self._buffer) >= 5:
            size = int.from_bytes(self._buffer[1:5], "big")
            if size > self._limit:
                raise BadMessage(f"frame: {size} bytes, at most {self._limit} are allowed")
            if len(self._buffer) < 5 + size:
                return
            kind, payload = self._buffer[0], bytes(self._buffer[5 : 5 + size])
            del self._buffer[: 5 + size]
            yield read_kind(kind), payload

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._buffer)


def pack_link(kind: Kind, job: JobId = NO_JOB, payload: bytes = b"") -> bytes:
    """One message of the node link."""
    return b"".join((bytes((kind,)), job, payload))


def unpack_link(data: bytes | str) -> tuple[Kind, JobId, bytes]:
    """The inverse. Raises BadMessage."""
    if not isinstance(data, bytes) or len(data) < LINK_HEAD:
        raise BadMessage("link frame: expected a binary message of at least 17 bytes")
    return read_kind(data[0]), JobId(data[1:LINK_HEAD]), data[LINK_HEAD:]


def read_kind(number: int) -> Kind:
    """A frame kind. Raises BadMessage for an unknown one."""
    kind = _KINDS.get(number)
    if kind is None:
        raise BadMessage(f"frame: unknown kind {number}")
    return kind


_KINDS = {int(kind): kind for kind in Kind}
"""Calling an enum costs more than reading all the rest of a frame."""
