"""What a JSON-RPC endpoint means by an error. Pure.

Nodes and hosted providers use one code for different errors and different codes for one error, so the text decides as well. The
codes are those of EIP-1474 and of the providers' own documentation: -32005 (limit exceeded), -32007 (QuickNode), -32016 (Base),
-32029 and -32097 (Chainstack and others), 429 (the HTTP status as a code).
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from tallystick.chain.codec import revert_error
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable

MAX_MESSAGE = 500
"""Characters of an endpoint's message that are kept."""


class RpcErrorKind(Enum):
    """The meanings of an error that callers treat differently."""

    RATE_LIMIT = "too many requests in a time"
    BATCH_LIMIT = "too many requests in one batch"
    RANGE_LIMIT = "too many blocks or logs in one eth_getLogs"
    BEHIND = "the node that answered does not have this block or state yet"
    UNSUPPORTED = "the endpoint lacks a method or a block tag"
    KNOWN_TRANSACTION = "the node has this transaction already"
    NONCE_USED = "another transaction has this nonce"
    NONCE_AHEAD = "the node has not seen the transactions before this one"
    OTHER = "any other error"


class RpcError(Unavailable):
    """The endpoint returned an error that is not a revert. `number` is the JSON-RPC code, or the HTTP status.

    `reason` is the endpoint's own message; `pause` is how long it asks to wait, in seconds.
    """

    def __init__(
        self, method: str, number: int, message: str, *, kind: RpcErrorKind = RpcErrorKind.OTHER, pause: float = 0.0, at: str = ""
    ) -> None:
        text = f"{method}: {message} ({number})"
        if kind is RpcErrorKind.RATE_LIMIT:
            text = (
                f"the chain at {at} limits how many requests it answers: {text}; wait, or use another JSON-RPC URL (rpc) or plan"
            )
        super().__init__(Code.CHAIN_UNAVAILABLE, text)
        self.number, self.reason, self.kind, self.pause = number, message, kind, pause


_REVERTED = (3, -32015)
_RATE_LIMITED = (429, -32005, -32007, -32016, -32029, -32097)
_NO_METHOD = (-32601, -32004)
_NO_RESOURCE = (-32001, -32002)
_SPENDING = ("eth_sendRawTransaction", "eth_estimateGas", "eth_call")
_HEX = re.compile(r"0x[0-9a-fA-F]*")


_LIMIT_EXCEEDED = -32005
_BARE_LIMIT = re.compile(r"^\W*(?:request )?limit exceeded\W*$", re.IGNORECASE)


def _words(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_REVERT_WORDS = _words(r"\brevert", r"vm execution error", r"invalid opcode", r"vm exception")
_RATE_WORDS = _words(
    r"too many requests",
    r"rate.?limit",
    r"\brate\b.{0,20}\b(?:exceed|reach|limit)",
    r"^\W*429\b",
    r"\b(?:http|status|code|error)\W{0,3}(?:code\W{0,3})?429\b",
    r"requests? (?:per|/) ?(?:second|sec|minute|min|day|month)",
    r"(?:per|/) ?second (?:request )?(?:limit|capacity)",
    r"compute units? per second",
    r"throughput",
    r"throttl",
    r"slow(?:ing)? down",
    r"back.?off",
    r"\bquota\b",
    r"\bcapacity\b",
    r"request (?:count|limit|rate).{0,20}(?:exceed|reach)",
    r"(?:call|credit|usage|request|rps|daily|monthly|concurren\w+).{0,20}(?:limit|allowance).{0,20}(?:exceed|reach|exhaust|hit)",
    r"exceed\w*.{0,40}(?:call|credit|usage|request|rps|daily|monthly|concurren\w+).{0,12}(?:limit|rate|allowance)",
    r"(?:try|retry) (?:again )?(?:in|after) \d",
    _BARE_LIMIT.pattern,
)
_BATCH_WORDS = _words(
    r"\bbatch",
    r"response (?:is |size )?(?:too large|exceed)",
    r"too many (?:calls|requests|items) in",
    r"\b(?:multiple|array of|several) (?:json-?rpc )?(?:calls|requests)\b",
)
_RANGE_WORDS = _words(
    r"\bblocks? (?:height )?(?:range|span|limit|distance)",
    r"\brange\b",
    r"\d+k? ?-?blocks?\b",
    r"(?:limit|maximum|max|most|many|large|more|exceed\w*).{0,40}\b(?:blocks|logs|results|events|responses?|records)\b",
    r"\b(?:blocks|logs|results|events|responses?|records|query|size)\b.{0,40}(?:limit|max|most|many|large|more than|exceed)",
    r"query (?:timeout|timed out)",
    r"timed? ?out",
)
_BEHIND_WORDS = _words(
    r"header (?:for hash )?not found",
    r"missing trie node",
    r"unknown block",
    r"block (?:\w+ )?not (?:found|available|imported|yet)",
    r"(?:block|header|state)\b.{0,40}\bnot (?:be )?(?:found|available|exist)",
    r"(?:could|can|does) ?not (?:find|have|locate) (?:the )?(?:block|header|state)",
    r"no state (?:available|found)",
    r"state (?:\w+ ){0,4}unavailable",
    r"(?:beyond|above|after|greater than|higher than|past|exceeds) (?:the )?(?:current |latest |chain )?(?:head|latest|tip)\b",
    r"unfinalized data",
    r"cannot be found",
)
_TAG_WORDS = _words(r"\bpending\b", r"\bblock tag\b", r"\btag\b")
_UNSUPPORTED_WORDS = _words(
    r"method (?:.{1,60} )?(?:not|does not|is not|doesn't|isn't|unavailable|unsupported)",
    r"(?:un|not |n't )support",
    r"not (?:implemented|whitelisted|allowed|available)",
    r"unknown method",
    r"no such method",
)
_KNOWN_WORDS = _words(
    r"already (?:known|imported|exists|in (?:the )?(?:pool|mempool|system|queue))",
    r"known transaction",
    r"alreadyknown",
    r"already_exists",
    r"same hash was already",
    r"transaction (?:\w+ )?already",
)
_AHEAD_WORDS = _words(
    r"nonce.{0,20}too (?:high|far|large|big)", r"nonce.?gap", r"noncetoofar", r"gapped nonce", r"nonce too distant"
)
_NONCE_WORDS = _words(r"nonce", r"replac", r"same nonce", r"another transaction with")
_FUNDS_WORDS = _words(
    r"insufficient.{0,3}(?:funds|balance)",
    r"insufficient \w+ balance",
    r"upfront cost exceeds",
    r"not enough (?:funds|balance|eth|ether|coins)",
    r"(?:does ?n.?t|does not) have enough (?:funds|balance)",
    r"(?:exceeds|exceeding) (?:the )?(?:account )?balance",
    r"out of funds",
)
_PAUSE = re.compile(
    r"(?:again|retry|retrying|wait|available|backoff|back off|reset\w*)\D{0,24}?"
    r"(\d{1,9}(?:\.\d{1,9})?) ?(ms|milli\w*|s\b|sec\w*|m\b|min\w*)",
    re.IGNORECASE,
)


def read_rpc_error(method: str, error: Any, *, at: str = "", status: int = 200, batch: bool = False) -> TallyError:
    """Reads the error object of a response. `at` names the endpoint in messages; `status` is that of the HTTP response.

    `batch` says whether the request was one of several in a batch. Returns a ContractError or a Refusal for a revert, a Refusal
    for an account without enough coins, else an RpcError.
    """
    if not isinstance(error, dict):
        error = {"message": str(error)}
    number, message, data = error.get("code", 0), str(error.get("message") or "")[:MAX_MESSAGE], error.get("data")
    number, words = _number(number), _all_words(message, data)
    reverted = _REVERT_WORDS.search(message) is not None
    if method in _SPENDING and not reverted and _FUNDS_WORDS.search(message):
        return Refusal(Code.INSUFFICIENT_FUNDS, f"{method}: {message}")
    kind = _submission_kind(words) if method == "eth_sendRawTransaction" and not reverted else None
    if kind is None and (reverted or number in _REVERTED):  # zkSync has the code of a revert for every refused submission
        return _revert(data, message)
    if kind is None:
        kind = RpcErrorKind.BATCH_LIMIT if batch and _BATCH_WORDS.search(words) else _kind(method, number, words, status)
    return RpcError(method, number, message, kind=kind, pause=_pause(message, data), at=at)


def refuses_range(error: RpcError) -> bool:
    """Whether a shorter range may help after this error of eth_getLogs. Some chains say "limit exceeded" for both limits."""
    if error.kind is RpcErrorKind.RATE_LIMIT:
        return error.number == _LIMIT_EXCEEDED and _BARE_LIMIT.search(error.reason) is not None
    return error.kind in (RpcErrorKind.RANGE_LIMIT, RpcErrorKind.OTHER)


def _number(raw: object) -> int:
    if isinstance(raw, str) and re.fullmatch(r"-?\d{1,9}", raw):
        return int(raw)
    return raw if isinstance(raw, int) else 0


def _all_words(message: str, data: object) -> str:
    """The message and the text of the data; some proxies put the real message of their upstream there."""
    if isinstance(data, dict):
        data = data.get("message") or data.get("reason")
    return f"{message} {data[:MAX_MESSAGE]}" if isinstance(data, str) and not data.startswith("0x") else message


def _submission_kind(message: str) -> RpcErrorKind | None:
    """The meaning of an error that only a submission has; None for all others."""
    if _AHEAD_WORDS.search(message):
        return RpcErrorKind.NONCE_AHEAD
    if _NONCE_WORDS.search(message):
        return RpcErrorKind.NONCE_USED
    return RpcErrorKind.KNOWN_TRANSACTION if _KNOWN_WORDS.search(message) else None


def _kind(method: str, number: int, message: str, status: int) -> RpcErrorKind:
    said_rate = _RATE_WORDS.search(message) is not None
    if method == "eth_getLogs" and not said_rate and (status == 413 or _RANGE_WORDS.search(message)):
        return RpcErrorKind.RANGE_LIMIT if not _BEHIND_WORDS.search(message) else RpcErrorKind.BEHIND
    if status == 429 or number in _RATE_LIMITED or said_rate:
        return RpcErrorKind.RATE_LIMIT
    if number in _NO_METHOD:
        return RpcErrorKind.UNSUPPORTED
    if _TAG_WORDS.search(message):
        return RpcErrorKind.UNSUPPORTED
    if number in _NO_RESOURCE or _BEHIND_WORDS.search(message):
        return RpcErrorKind.BEHIND
    return RpcErrorKind.UNSUPPORTED if _UNSUPPORTED_WORDS.search(message) else RpcErrorKind.OTHER


def _pause(message: str, data: object) -> float:
    """Seconds that the endpoint asks to wait: in its text, or as data.rate.backoff_seconds (Infura)."""
    match = _PAUSE.search(message)
    if match:
        unit = match[2].lower()
        return float(match[1]) * (0.001 if unit.startswith(("ms", "milli")) else 60.0 if unit.startswith("m") else 1.0)
    rate = data.get("rate") if isinstance(data, dict) else None
    seconds = rate.get("backoff_seconds") if isinstance(rate, dict) else None
    return max(0.0, float(seconds)) if isinstance(seconds, int | float) else 0.0


def _revert(data: Any, message: str) -> TallyError:
    if isinstance(data, dict):  # some nodes nest the data
        data = data.get("data")
    match = _HEX.search(data) if isinstance(data, str) else None  # Nethermind puts text before the data
    digits = match[0][2:] if match else ""
    return revert_error(bytes.fromhex(digits) if len(digits) % 2 == 0 else b"", message)
