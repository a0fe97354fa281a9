"""Errors in the form of Anthropic's API. Pure. Source: Anthropic's API reference, "Errors"."""

from __future__ import annotations

import re
from typing import Any, Final

from tallystick.client.openai.errors import ErrorResponse, render_error
from tallystick.protocol.errors import BadMessage, Code, TallyError
from tallystick.protocol.lenient_json import dump_lenient, load_lenient

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


_TOO_LONG: Final = "prompt is too long: "
"""Anthropic's words for a request that exceeds the context. Claude Code then shortens the conversation."""
_CONTEXT: Final = re.compile(r"context.{0,10}(length|size|window)|(prompt|input).{0,20}too long", re.IGNORECASE)


def error_type(status: int) -> str:
    """The type of an error with this HTTP status."""
    return _TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")


def untranslatable(member: str, value: str, advice: str) -> BadMessage:
    """The error for a member that a chat completion cannot express. `value`: what it says; `advice`: what to do instead."""
    reason = "cannot be translated to a chat completion, and no provider of this model serves /v1/messages itself"
    return BadMessage(f"{member}: {value} {reason}; {advice}")


def render(error: TallyError, *, request_id: str, retry: bool | None = None) -> ErrorResponse:
    """Renders an error. The members `code`, `fault` and `retry` stand beside Anthropic's own; see `render_error`."""
    response = render_error(error, retry=retry)
    members = load_lenient(response.body)["error"]
    if error.code is Code.CONTEXT_LENGTH_EXCEEDED:
        members["message"] = _TOO_LONG + members["message"]
    return ErrorResponse(response.status, _document(members, response.status, request_id), response.headers)


def render_event(error: TallyError, *, request_id: str, retry: bool | None = None) -> bytes:
    """Renders an error as the last event of a stream."""
    return b"event: error\ndata: " + render(error, request_id=request_id, retry=retry).body + b"\n\n"


def render_engine_event(document: dict[str, Any], status: int) -> bytes:
    """An error that an engine reported in its stream, as an event."""
    return b"event: error\ndata: " + _document({"message": message_of(document)}, status, None) + b"\n\n"


def translate_engine_error(status: int, body: bytes, *, request_id: str) -> bytes:
    """An engine's error answer in Anthropic's form, with the engine's own words; as it is if it has that form already."""
    try:
        document = load_lenient(body)
    except ValueError:
        document = body[:2000].decode(errors="replace")
    if isinstance(document, dict) and document.get("type") == "error" and isinstance(document.get("error"), dict):
        return body
    message = message_of(document)
    if status in (400, 413, 422) and _CONTEXT.search(message):
        message = _TOO_LONG + message
    return _document({"message": message}, status, request_id)


def message_of(document: object) -> str:
    """The words of an engine's error, in whichever member they stand."""
    if not isinstance(document, dict):
        return str(document)[:2000]
    for name in ("error", "message", "detail", "errors", "error_message", "title"):
        if (value := document.get(name)) is not None:
            return message_of(value) if isinstance(value, dict) else str(value)[:2000]
    return dump_lenient(document).decode()[:2000]


def _document(members: dict[str, Any], status: int, request_id: str | None) -> bytes:
    shown = {"type": error_type(status)} | {name: value for name, value in members.items() if name not in ("type", "param")}
    return dump_lenient({"type": "error", "error": shown, "request_id": request_id})
