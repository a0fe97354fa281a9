"""Errors in OpenAI's format: renders those of this client, and reads those of engines. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.errors import PUBLIC, BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.lenient_json import load_lenient, parse_lenient
from tallystick.protocol.routes import CHAT, RESPONSES
from tallystick.protocol.wire import dumps, loads
from tallystick.runtime.content_encoding import SUPPORTED

MAX_ERROR_BYTES = 256 * 1024
_MESSAGES = ("error", "message", "detail", "msg", "error_message", "errors", "title")
RETRY_AFTER_SECONDS = 1
"""The wait that a client is asked for if no party said how long it takes."""


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An error as an HTTP response in OpenAI's format."""

    status: int
    body: bytes
    headers: dict[str, str]


def render_error(error: TallyError, *, retry: bool | None = None) -> ErrorResponse:
    """Renders an error for an OpenAI client. Status 400 or 401 is only for the caller's own faults.

    `retry` overrides the error's own word on whether the same request may be sent again.
    """
    retry = error.retry if retry is None else retry
    document = error.as_json()
    document["error"]["retry"] = retry
    status = error.status
    if status in (400, 401) and error.fault in (Fault.PROVIDER, Fault.COORDINATOR, Fault.ENGINE):
        status = 502
        document["error"]["type"] = PUBLIC[Code.PROVIDER_FAILED].type
    headers = {"x-should-retry": "true" if retry else "false"}
    if retry:
        headers["retry-after"] = str(error.retry_after or RETRY_AFTER_SECONDS)
    if error.code is Code.UNSUPPORTED_ENCODING:
        headers["accept-encoding"] = ", ".join(SUPPORTED)  # RFC 9110, 12.5.3
    return ErrorResponse(status, dumps(document), headers)


def render_error_event(error: TallyError, *, path: str = CHAT, retry: bool | None = None) -> bytes:
    """Renders an error as an event of a stream of the route `path` that has begun, in the form that the route's clients raise.

    `retry`: see render_error. Source: OpenAI's API reference (chat; responses).
    """
    response = render_error(error, retry=retry)
    if path != RESPONSES:
        return b"data: " + response.body + b"\n\n"
    shown = loads(response.body, "error")["error"]
    event = {"type": "error", "code": shown["code"], "message": shown["message"], "param": None} | {"error": shown}
    return b"event: error\ndata: " + dumps(event) + b"\n\n"


def error_words(body: bytes, limit: int = 1_000) -> str:
    """What an error answer says to a person, in any of the usual forms: printable, and at most `limit` characters."""
    try:
        document = load_lenient(body[:MAX_ERROR_BYTES])
    except ValueError:
        document = body[: 4 * limit].decode(errors="replace")
    for _ in range(4):
        if isinstance(document, list) and document:
            document = document[0]
        if not isinstance(document, dict):
            break
        document = next((document[name] for name in _MESSAGES if document.get(name)), "")
    text = " ".join(document.split()) if isinstance(document, str) else ""
    return "".join(character for character in text if character.isprintable())[:limit]


def read_engine_error(status: int, body: bytes) -> TallyError:
    """An engine's error answer as an exception: the caller's fault for status 400 to 499, else the engine's."""
    try:
        error = parse_lenient(body, "engine answer")["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (BadMessage, KeyError, TypeError):
        message = body[:500].decode(errors="replace")
    text = f"the engine answered {status}: {message[:2000]}"
    if status < 500:
        return Refusal(Code.BAD_MESSAGE, text, fault=Fault.CLIENT)
    return Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE)
