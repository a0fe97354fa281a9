"""OpenAI's JSON, as far as the market must read it: which model, how much output at most, whether it streams; and errors.

Pure. A body is read, never rewritten: the bytes that the caller sent are the bytes that the engine gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tallystick.protocol.errors import PUBLIC, BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, FORM, JSON, RESPONSES, check_route, media_type
from tallystick.protocol.wire import RequestHead, dumps, join_request, loads
from tallystick.runtime.multipart import read_field

MAX_CHOICES = 1_024
EVENT_STREAM = "text/event-stream"
RETRY_AFTER_SECONDS = 1
_TEXT_PARTS = ("text", "refusal", "input_text", "output_text")
_LIMITS = {CHAT: ("max_completion_tokens", "max_tokens"), COMPLETIONS: ("max_tokens",), RESPONSES: ("max_output_tokens",)}


@dataclass(frozen=True, slots=True)
class Call:
    """What a request asks for.

    `output_tokens`: the most that all its answers together may hold, None where the request sets no limit. `answers`: how
    many it asks for. `bounded`: whether its tokens are bounded by its bytes (false where it refers to images, audio, files).
    """

    model: str
    stream: bool
    output_tokens: int | None
    answers: int
    bounded: bool

    def most_output(self, default: int, sold: int) -> int:
        """The output tokens to order where at most `sold` are sold. `default` is per answer, for requests without a limit."""
        return min(default * self.answers, sold) if self.output_tokens is None else self.output_tokens


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as its caller sent it, what it asks for, and the workload that it belongs to."""

    head: RequestHead
    body: bytes = field(repr=False)
    call: Call
    label: str = ""
    json: Mapping[str, Any] | None = field(default=None, repr=False)
    """The body, where it is JSON."""

    @classmethod
    def of(cls, path: str, body: bytes, content_type: str = JSON, label: str = "") -> Asked:
        """Reads a request. Raises BadMessage or Refusal, see read_call."""
        call, request = _read(path, body, content_type)
        return cls(RequestHead(path, content_type), body, call, label, request)

    @property
    def plain(self) -> bytes:
        """What is sealed for the provider."""
        return join_request(self.head, self.body)


def read_call(path: str, body: bytes, content_type: str = JSON) -> Call:
    """Reads a request to a route of the market. Raises BadMessage that names the member, or Refusal for what is no route."""
    return _read(path, body, content_type)[0]


def _read(path: str, body: bytes, content_type: str) -> tuple[Call, dict[str, Any] | None]:
    check_route(path)
    if media_type(content_type) == FORM:
        model = _model(read_field(content_type, body, "model"))
        return Call(model, read_field(content_type, body, "stream") == "true", None, 1, bounded=False), None
    if media_type(content_type) != JSON:
        raise BadMessage(f"content-type: expected {JSON} or {FORM}, got {content_type[:60]!r}")
    request = loads(body, "request body")
    if not isinstance(request, dict):
        raise BadMessage("request body: expected a JSON object")
    return _call(path, request), request


def _call(path: str, request: dict[str, Any]) -> Call:
    model = _model(request.get("model"))
    if path == EMBEDDINGS:
        return Call(model, stream=False, output_tokens=0, answers=1, bounded=True)
    answers = _answers(path, request) if path in (CHAT, COMPLETIONS) else 1
    limits = (_count(request, name, 0) for name in _LIMITS.get(path, ()))
    each = next((limit for limit in limits if limit is not None), None)
    total = None if each is None else each * answers
    return Call(model, _flag(request, "stream"), total, answers, path in _LIMITS and _only_text(request))


def _model(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        raise BadMessage("model: expected the name of a model, of at most 256 characters")
    return name


def _only_text(request: dict[str, Any]) -> bool:
    """Whether what it says is all in it. An earlier response that it refers to is not."""
    messages = request.get("messages", request.get("input"))
    contents = [m.get("content") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    alone = not (request.get("previous_response_id") or request.get("conversation"))
    return alone and all(part.get("type") in _TEXT_PARTS for part in parts)


def _flag(request: dict[str, Any], name: str) -> bool:
    value = request.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadMessage(f"{name}: expected true or false")
    return bool(value)


def _count(request: dict[str, Any], name: str, least: int) -> int | None:
    value = request.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise BadMessage(f"{name}: expected a whole number from {least}")
    return value


def _answers(path: str, request: dict[str, Any]) -> int:
    answers = _count(request, "n", 1) or 1
    if path == COMPLETIONS:
        prompt = request.get("prompt")
        several = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
        answers = max(answers, _count(request, "best_of", 1) or 1) * (len(prompt) if several and prompt is not None else 1)
    if answers > MAX_CHOICES:
        raise BadMessage(f"n: {answers} answers asked for, at most {MAX_CHOICES} are allowed")
    return answers


@dataclass(frozen=True, slots=True)
class Rendered:
    """An error as an HTTP answer in OpenAI's shape."""

    status: int
    body: bytes
    headers: dict[str, str]


def render_error(error: TallyError, *, retry: bool | None = None) -> Rendered:
    """How an error is shown to an OpenAI client: says whether to retry, and blames nobody for the faults of others. `retry`: what
    more is known of that than the error says.
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
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return Rendered(status, dumps(document), headers)


def error_event(error: TallyError, *, retry: bool | None = None) -> bytes:
    """An error inside an event stream that has begun: OpenAI's clients raise it. `retry`: see render_error."""
    return b"data: " + render_error(error, retry=retry).body + b"\n\n"


def engine_error(status: int, body: bytes) -> TallyError:
    """What an engine's own error answer says, as an exception: the caller's fault from 400 to 499, else the engine's."""
    try:
        error = loads(body, "engine answer")["error"]
        message = str(error["message"] if isinstance(error, dict) else error)
    except (BadMessage, KeyError, TypeError):
        message = body[:500].decode(errors="replace")
    text = f"the engine answered {status}: {message[:2000]}"
    if status < 500:
        return Refusal(Code.BAD_MESSAGE, text, fault=Fault.CLIENT)
    return Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE)


def read_text(body: bytes) -> str:
    """The text of the first answer of a non-streamed completion. Raises BadMessage if there is none."""
    try:
        choice = loads(body, "answer")["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError):
        raise BadMessage("answer: not a completion with a text", fault=Fault.ENGINE) from None
    return "" if text is None else str(text)


def model_entry(name: str, market: dict[str, Any]) -> dict[str, Any]:
    """A model as GET /v1/models lists it, with what the market knows of it beside OpenAI's members."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "tallystick"} | market
