"""What an engine's answers say: server-sent events cut out of a byte stream, OpenAI's JSON read for what is billed, lists of
models. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from node.domain.meter import Counted

DONE = b"[DONE]"
_SILENT = frozenset({"role", "index", "type", "id", "name"})
"""Members of a delta that carry no output by themselves."""


class Malformed(Exception):
    """The engine's answer is not what it should be. The text names the rule, never the content."""


class EventReader:
    """Cuts a byte stream into events (with their blank line), holding at most one unfinished event of `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The events completed by `data`. Raises Malformed for one longer than the limit."""
        self._buffer += data
        if b"\r" in self._buffer:
            # A CR that ends the buffer may be half of a CRLF; it is looked at again with what follows.
            held = b"\r" if self._buffer.endswith(b"\r") else b""
            body = self._buffer[: len(self._buffer) - len(held)]
            self._buffer = bytearray(body.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held)
        *events, rest = self._buffer.split(b"\n\n")
        self._buffer = rest
        for event in events:
            if len(event) > self._limit:
                break
            if event.strip(b"\n"):
                yield bytes(event) + b"\n\n"
        else:
            if len(rest) <= self._limit:
                return
        raise Malformed(f"an event of more than {self._limit} bytes")

    @property
    def rest(self) -> bytes:
        """What came after the last complete event."""
        return bytes(self._buffer)


def data_of(event: bytes) -> bytes | None:
    """The data of an event: None if it has none (a comment, a keep-alive)."""
    if event.startswith(b"data:") and event.count(b"\n") == 2:
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


@dataclass(frozen=True, slots=True)
class Reading:
    """What one JSON document of an answer says. `text`: bytes of generated text in it; `output`: anything a user would see."""

    document: dict[str, Any]
    output: bool
    text: int
    finish: str | None
    counted: Counted | None
    usage_only: bool


def _load(data: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise Malformed("invalid JSON") from None
    if not isinstance(document, dict):
        raise Malformed("not a JSON object")
    if document.get("error"):
        raise Malformed("an error instead of an answer")
    return document


_PREAMBLE = frozenset({"response.created", "response.queued", "response.in_progress"})
_ENDS = {"response.completed": "stop", "response.incomplete": "length", "completed": "stop", "incomplete": "length"}
_FAILED = frozenset({"error", "response.failed", "failed"})


def read_other(data: bytes) -> Reading:
    """Like `read_document`, of a route other than completions: a response and its events (OpenAI's Responses API), images, ranks.

    What is not known is output, and passes through. Raises Malformed.
    """
    document = _load(data)
    inner = document.get("response")
    whole = inner if isinstance(inner, dict) else document
    said = str(document.get("type") or document.get("status") or "")
    if said in _FAILED or (inner is whole and whole.get("status") in _FAILED):
        raise Malformed("an error instead of an answer")
    finish = _ENDS.get(said)
    delta = document.get("delta")
    text = _text_bytes(delta) if delta is not None else _text_bytes(document.get("output"))
    bare = said in _PREAMBLE or (said.endswith(".added") and not text)
    return Reading(document, not bare, text, finish, _counted(whole.get("usage")), usage_only=False)


def read_document(data: bytes) -> Reading:
    """Reads an event's data, or a whole answer that was not streamed. Raises Malformed."""
    document = _load(data)
    choices = document.get("choices")
    listed = [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []
    text, seen, finish = 0, False, None
    for choice in listed:
        size, shown = _weigh(choice)
        text, seen = text + size, seen or shown
        if isinstance(choice.get("finish_reason"), str):
            finish = "length" if finish == "length" else choice["finish_reason"]
    counted = _counted(document.get("usage"))
    return Reading(document, seen, text, finish, counted, counted is not None and choices == [])


def _weigh(choice: dict[str, Any]) -> tuple[int, bool]:
    """Bytes of generated text in one choice, and whether there is any output in it at all."""
    written = choice.get("delta") or choice.get("message") or {}
    size, shown = 0, False
    plain = choice.get("text")
    if isinstance(plain, str) and plain:
        size, shown = len(plain.encode(errors="replace")), True
    if isinstance(written, dict):
        for name, value in written.items():
            if name in _SILENT or not value:
                continue
            shown = True
            size += _text_bytes(value)
    return size, shown


def _text_bytes(value: Any, depth: int = 8) -> int:
    """Bytes of all strings inside a member of a delta: contents, tool names and arguments, reasoning."""
    if isinstance(value, str):
        return len(value.encode(errors="replace"))
    if isinstance(value, dict):
        value = [inner for name, inner in value.items() if name not in {"id", "type", "index"}]
    if isinstance(value, list) and depth:
        return sum(_text_bytes(inner, depth - 1) for inner in value)
    return 0


def _counted(usage: Any) -> Counted | None:
    """OpenAI's usage object, of completions or of responses and images; None if it is missing or makes no sense.

    A total alone (embeddings, ranks) is all input.
    """
    if not isinstance(usage, dict):
        return None
    given, written = ("input", "output") if "input_tokens" in usage else ("prompt", "completion")
    details = usage.get(f"{given}_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    count = usage.get(f"{given}_tokens", usage.get("total_tokens"))
    counts: list[Any] = [count, cached or 0, usage.get(f"{written}_tokens") or 0]
    if any(isinstance(count, bool) or not isinstance(count, int) for count in counts):
        return None
    return Counted(*counts)


@dataclass(frozen=True, slots=True)
class UpstreamModel:
    """A model that an engine says it has; the context length where it says that too; who it says owns it."""

    name: str
    context_tokens: int | None = None
    owner: str = ""


def read_models(body: bytes) -> tuple[UpstreamModel, ...]:
    """The models in an answer to GET /v1/models. Raises Malformed."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Malformed("invalid JSON") from None
    listed = document.get("data") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise Malformed("a list of models that is none")
    return tuple(
        UpstreamModel(entry["id"], _context(entry), str(entry.get("owned_by") or ""))
        for entry in listed
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"]
    )


def _context(entry: dict[str, Any]) -> int | None:
    """The context length as vLLM, SGLang, llama.cpp and hosted APIs tell it."""
    meta = entry.get("meta")
    for value in (entry.get("max_model_len"), entry.get("context_length"), meta.get("n_ctx") if isinstance(meta, dict) else None):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
