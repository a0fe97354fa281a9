"""The lines of a batch's output and error files. Pure. Source: OpenAI's API reference, "Batch", the request output object."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from typing import Any, Final

from tallystick.client.batches.ports import LineAnswer
from tallystick.client.batches.records import Usage
from tallystick.protocol.lenient_json import dump_lenient, load_lenient

MAX_ERROR_BODY: Final = 16 << 10
"""Bytes of an error's body that are kept; nobody paid for more."""
UNANSWERED: Final = {
    "batch_expired": "This request could not be executed before the completion window expired.",
    "batch_cancelled": "This request was not executed, because the batch was cancelled.",
    "answer_lost": "The job of this request was billed, but its answer did not arrive and can no longer be had.",
    "answer_unresolved": "The job of this request was placed, gave no answer in time, and may still be billed.",
}
"""Why a request has no answer, by error code."""


def request_id(batch: str, line: int) -> str:
    """The id of a line's request, always the same."""
    return "batch_req_" + hashlib.sha256(f"{batch}:{line}".encode()).hexdigest()[:32]


def answered_line(batch: str, line: int, custom_id: str, answer: LineAnswer) -> bytes:
    """The line of a request that was answered, also with an error."""
    failed = answer.status >= HTTPStatus.BAD_REQUEST
    body = answer.body[:MAX_ERROR_BODY] if failed else answer.body
    response = {"status_code": answer.status, "request_id": answer.id, "body": _document(body)}
    return _line(batch, line, custom_id, response, None)


def unanswered_line(batch: str, line: int, custom_id: str, code: str) -> bytes:
    """The line of a request that has no answer. `code`: one of UNANSWERED."""
    return _line(batch, line, custom_id, None, {"code": code, "message": UNANSWERED[code]})


def longest_unanswered(batch: str, line: int, custom_id: str) -> int:
    """Bytes of the longest line that a request without an answer may have."""
    return _LONGEST + len(_line(batch, line, custom_id, None, None))


_LONGEST: Final = max(len(dump_lenient({"code": code, "message": text})) for code, text in UNANSWERED.items())


def _line(batch: str, line: int, custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    members = {"id": request_id(batch, line), "custom_id": custom_id, "response": response, "error": error}
    return dump_lenient(members) + b"\n"


def _document(body: bytes) -> Any:
    try:
        return load_lenient(body)
    except ValueError:
        return body.decode(errors="replace")


def read_usage(body: bytes) -> Usage:
    """The tokens that an answer reports, of a chat, a completion, an embedding or a response; zeros if it reports none."""
    document = _document(body)
    usage = document.get("usage") if isinstance(document, dict) else None
    if not isinstance(usage, dict):
        return Usage()
    inputs, outputs = _count(usage, "prompt_tokens", "input_tokens"), _count(usage, "completion_tokens", "output_tokens")
    cached = _count(_details(usage, "prompt_tokens_details", "input_tokens_details"), "cached_tokens")
    reasoning = _count(_details(usage, "completion_tokens_details", "output_tokens_details"), "reasoning_tokens")
    return Usage(inputs, cached, outputs, reasoning)


def _details(usage: dict[str, Any], *names: str) -> dict[str, Any]:
    return next((usage[name] for name in names if isinstance(usage.get(name), dict)), {})


def _count(counts: dict[str, Any], *names: str) -> int:
    values = (counts.get(name) for name in names)
    return next((value for value in values if type(value) is int and 0 <= value < 1 << 40), 0)
