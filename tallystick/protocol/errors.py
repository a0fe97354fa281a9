"""The error classes of the project. Each error names the party at fault and says whether a retry can help.

    TallyError
    |- PeerError      the other side broke a rule: keep the evidence, never retry
    |  |- BadMessage      a message does not parse
    |  |- BadSignature    a message is not signed by the account that it names
    |  |- BadReceipt      a receipt contradicts the order, the prices or the transcript
    |  `- BadSeal         ciphertext does not open, or chunks are out of order, missing or altered
    |- Refusal        the request is valid and refused; the code is the reason, and a retry does not help
    `- Unavailable    the request may succeed later

Bugs are not in this tree: they crash the process, and its supervisor restarts it.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple, TypeVar

E = TypeVar("E", bound=Enum)
MAX_RETRY_AFTER = 3_600
"""The longest wait, in seconds, that an error may ask for."""
_RETRY_STATUSES = (429, 503)
MAX_SEALED_REASON = 16_384
"""The most characters of a sealed reason."""


class Fault(str, Enum):
    """The party at fault."""

    CLIENT = "client"
    PROVIDER = "provider"
    COORDINATOR = "coordinator"
    ENGINE = "engine"
    NOBODY = "nobody"


class Code(str, Enum):
    """The kind of an error. The values are stable strings that programs may match on."""

    BAD_MESSAGE = "bad_message"
    BAD_SIGNATURE = "bad_signature"
    BAD_RECEIPT = "bad_receipt"
    UNDELIVERED = "undelivered"
    BAD_SEAL = "bad_seal"
    BODY_TOO_LARGE = "body_too_large"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    ORDER_EXPIRED = "order_expired"
    ORDER_REPLAYED = "order_replayed"
    REPORT_REPLAYED = "report_replayed"
    ORDER_MISDIRECTED = "order_misdirected"
    ORDER_TERMS = "order_terms"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNSUPPORTED = "unsupported"
    PRICE_ABOVE_CAP = "price_above_cap"
    COST_ABOVE_CAP = "cost_above_cap"
    OVER_BUDGET = "over_budget"
    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_JOB = "unknown_job"
    UNKNOWN_LEAF = "unknown_leaf"
    PREVIOUS_RESPONSE_NOT_FOUND = "previous_response_not_found"
    RESPONSE_NOT_FOUND = "response_not_found"
    FILE_NOT_FOUND = "file_not_found"
    BATCH_NOT_FOUND = "batch_not_found"
    STORAGE_FULL = "storage_full"
    UNKNOWN_ROUTE = "unknown_route"
    UNAUTHORISED_TAB = "unauthorised_tab"
    INSUFFICIENT_FUNDS = "insufficient_funds"
    UNSECURED = "unsecured"
    NO_PROVIDER = "no_provider"
    NODE_BUSY = "node_busy"
    NODE_GONE = "node_gone"
    PROVIDER_FAILED = "provider_failed"
    ENGINE_UNAVAILABLE = "engine_unavailable"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    TIMED_OUT = "timed_out"
    CHAIN_UNAVAILABLE = "chain_unavailable"
    CHAIN_REFUSED = "chain_refused"
    COORDINATOR_UNAVAILABLE = "coordinator_unavailable"
    DATABASE_UNAVAILABLE = "database_unavailable"
    PORT_UNAVAILABLE = "port_unavailable"
    ALREADY_RUNNING = "already_running"
    NOT_RUNNING = "not_running"
    PROCESS_FAILED = "process_failed"
    SHUTTING_DOWN = "shutting_down"
    CLIENT_BUSY = "client_busy"
    UNAUTHENTICATED = "unauthenticated"
    RATE_LIMITED = "rate_limited"
    TIER_LIMIT = "tier_limit"
    CANCELLED = "cancelled"


class Public(NamedTuple):
    """The HTTP form of a code: the status, and the `type` of OpenAI's error object."""

    status: int
    type: str


_INVALID, _FUNDS, _GONE, _SERVER = "invalid_request_error", "insufficient_quota", "not_found_error", "server_error"

PUBLIC: dict[Code, Public] = {
    Code.BAD_MESSAGE: Public(400, _INVALID),
    Code.BAD_SIGNATURE: Public(401, "authentication_error"),
    Code.BAD_RECEIPT: Public(502, _SERVER),
    Code.UNDELIVERED: Public(502, _SERVER),
    Code.BAD_SEAL: Public(400, _INVALID),
    Code.BODY_TOO_LARGE: Public(413, _INVALID),
    Code.UNSUPPORTED_ENCODING: Public(415, _INVALID),
    Code.ORDER_EXPIRED: Public(400, _INVALID),
    Code.ORDER_REPLAYED: Public(409, _INVALID),
    Code.REPORT_REPLAYED: Public(409, _INVALID),
    Code.ORDER_MISDIRECTED: Public(400, _INVALID),
    Code.ORDER_TERMS: Public(400, _INVALID),
    Code.CONTEXT_LENGTH_EXCEEDED: Public(400, _INVALID),
    Code.UNSUPPORTED: Public(400, _INVALID),
    Code.PRICE_ABOVE_CAP: Public(402, _FUNDS),
    Code.COST_ABOVE_CAP: Public(402, _FUNDS),
    Code.OVER_BUDGET: Public(402, _FUNDS),
    Code.UNKNOWN_MODEL: Public(404, _GONE),
    Code.UNKNOWN_JOB: Public(404, _GONE),
    Code.UNKNOWN_LEAF: Public(404, _GONE),
    Code.PREVIOUS_RESPONSE_NOT_FOUND: Public(404, _INVALID),
    Code.RESPONSE_NOT_FOUND: Public(404, _INVALID),
    Code.FILE_NOT_FOUND: Public(404, _INVALID),
    Code.BATCH_NOT_FOUND: Public(404, _INVALID),
    Code.STORAGE_FULL: Public(507, _FUNDS),
    Code.UNKNOWN_ROUTE: Public(404, _GONE),
    Code.UNAUTHORISED_TAB: Public(402, _FUNDS),
    Code.INSUFFICIENT_FUNDS: Public(402, _FUNDS),
    Code.UNSECURED: Public(402, _FUNDS),
    Code.NO_PROVIDER: Public(503, _SERVER),
    Code.NODE_BUSY: Public(503, _SERVER),
    Code.NODE_GONE: Public(503, _SERVER),
    Code.PROVIDER_FAILED: Public(502, _SERVER),
    Code.ENGINE_UNAVAILABLE: Public(502, _SERVER),
    Code.UPSTREAM_UNAVAILABLE: Public(502, _SERVER),
    Code.TIMED_OUT: Public(504, _SERVER),
    Code.CHAIN_UNAVAILABLE: Public(503, _SERVER),
    Code.CHAIN_REFUSED: Public(409, _INVALID),
    Code.COORDINATOR_UNAVAILABLE: Public(503, _SERVER),
    Code.DATABASE_UNAVAILABLE: Public(503, _SERVER),
    Code.PORT_UNAVAILABLE: Public(503, _SERVER),
    Code.ALREADY_RUNNING: Public(503, _SERVER),
    Code.NOT_RUNNING: Public(503, _SERVER),
    Code.PROCESS_FAILED: Public(503, _SERVER),
    Code.SHUTTING_DOWN: Public(503, _SERVER),
    Code.CLIENT_BUSY: Public(503, _SERVER),
    Code.UNAUTHENTICATED: Public(401, "authentication_error"),
    Code.RATE_LIMITED: Public(429, "rate_limit_error"),
    Code.TIER_LIMIT: Public(403, _INVALID),
    Code.CANCELLED: Public(499, _SERVER),
}
"""One row per code; a test proves that none is missing."""


class TallyError(Exception):
    """The base class. `code`: the kind; `fault`: the party at fault; `retry`: whether the same request may succeed later.

    `retry_after`: seconds after which the party at fault expects to answer; None if it did not say. `param`: the member of the
    request that is wrong, as OpenAI's errors name it; None if it is not a single one. `private_reason`: words for the client
    alone, which never leave this process unsealed. `sealed_reason`: such words of a node, sealed for the client (base64).
    `opened_reason`: such words as the client has them: part of the text, and of nothing that is logged or stored.
    """

    code: Code
    fault: Fault
    retry: bool = False
    retry_after: int | None = None
    param: str | None = None
    private_reason: str | None = None
    sealed_reason: str | None = None
    opened_reason: str | None = None

    def __init__(self, message: str, *, code: Code | None = None, fault: Fault | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        if fault is not None:
            self.fault = fault

    def __str__(self) -> str:
        return self.public_text if self.opened_reason is None else f"{self.public_text}: {self.opened_reason}"

    @property
    def public_text(self) -> str:
        """The text without `opened_reason`, which may quote a request: for logs and files."""
        return super().__str__()

    @property
    def status(self) -> int:
        """The HTTP status of this error."""
        return PUBLIC[self.code].status

    def as_json(self) -> dict[str, dict[str, object]]:
        """The error object of OpenAI's API, extended by `fault` and `retry`."""
        extra: dict[str, object] = {} if self.retry_after is None else {"retry_after": self.retry_after}
        if self.sealed_reason is not None:
            extra["sealed_reason"] = self.sealed_reason
        return {
            "error": {
                "message": str(self),
                "type": PUBLIC[self.code].type,
                "param": self.param,
                "code": self.code.value,
                "fault": self.fault.value,
                "retry": self.retry,
                **extra,
            }
        }


class PeerError(TallyError):
    """The other side, which `fault` names, broke a rule of the protocol. Keep the evidence, never retry."""

    fault = Fault.CLIENT


class BadMessage(PeerError):
    """A message does not parse. The fault of its sender; never retry the same message."""

    code = Code.BAD_MESSAGE


class BadSignature(PeerError):
    """A message is not signed by the account that it names. The fault of its sender; never retry."""

    code = Code.BAD_SIGNATURE


class BadReceipt(PeerError):
    """A receipt contradicts its order, its prices, its transcript or the tab. The provider's fault; never retry with it."""

    code = Code.BAD_RECEIPT
    fault = Fault.PROVIDER


class Undelivered(BadReceipt):
    """A receipt charges for an answer whose end never came."""

    code = Code.UNDELIVERED


class BadSeal(PeerError):
    """Ciphertext does not open, or chunks of a stream were altered, reordered, dropped or repeated.

    The fault of the party that sealed or forwarded it; never retry.
    """

    code = Code.BAD_SEAL


class Refusal(TallyError):
    """A valid request was refused, by default as the client's fault. The code is the reason; a retry needs another request."""

    fault = Fault.CLIENT

    def __init__(self, code: Code, message: str, *, fault: Fault | None = None) -> None:
        super().__init__(message, code=code, fault=fault)


class Unavailable(TallyError):
    """A peer, the engine, the chain or a local resource does not answer now. By default nobody's fault; a retry may succeed."""

    fault = Fault.NOBODY
    retry = True

    def __init__(self, code: Code, message: str, *, fault: Fault | None = None) -> None:
        super().__init__(message, code=code, fault=fault)


def rate_limited(text: str, delay: float, *, fault: Fault = Fault.CLIENT) -> Unavailable:
    """The error of a peer that does something too often, as `text` says. `delay`: seconds until it may do so again."""
    seconds = min(max(1, math.ceil(delay)), MAX_RETRY_AFTER)
    error = Unavailable(Code.RATE_LIMITED, f"{text}; try again in {seconds} s", fault=fault)
    error.retry_after = seconds
    return error


def retry_headers(error: TallyError) -> dict[str, str]:
    """The header that says when a refused request may be sent again (RFC 9110, 10.2.3); none if that does not help soon."""
    if not error.retry or error.status not in _RETRY_STATUSES:
        return {}
    return {"retry-after": str(error.retry_after or 1)}


def error_from_json(body: object, status: int) -> TallyError:
    """Reads an error object that a peer sent with an HTTP status.

    Returns Unavailable if the peer says that a retry can help, else Refusal, with the peer's code and fault. An unknown code or
    fault is replaced by a general one. Anything but an error object gives Unavailable for a status of 500 or more, else
    BadMessage.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        unknown = f"the peer answered status {status} without an error object"
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, unknown) if status >= 500 else BadMessage(unknown)
    text = error.get("message")
    message = text[:2000].encode(errors="replace").decode() if isinstance(text, str) else ""
    code = _member(Code, error.get("code"), Code.COORDINATOR_UNAVAILABLE if status >= 500 else Code.BAD_MESSAGE)
    fault = _member(Fault, error.get("fault"), Fault.NOBODY)
    known: TallyError = Refusal(code, message, fault=fault)
    if error.get("retry") is True:
        known = Unavailable(code, message, fault=fault)
        known.retry_after = read_retry_after(error.get("retry_after"))
    param, sealed = error.get("param"), error.get("sealed_reason")
    known.param = param[:100] if isinstance(param, str) else None
    known.sealed_reason = sealed if isinstance(sealed, str) and len(sealed) <= MAX_SEALED_REASON else None
    return known


def read_retry_after(value: object) -> int | None:
    """A wait in seconds, from 1 to MAX_RETRY_AFTER; None for anything but a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return None
    return min(value, MAX_RETRY_AFTER)


def _member(of: type[E], value: object, otherwise: E) -> E:
    try:
        return of(value)
    except ValueError:
        return otherwise
