"""The texts of a request and of its answer, for a tokenizer to count. Pure; whatever has another shape has no texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tallystick.client.openai.requests import EVENT_STREAM
from tallystick.client.openai.sse import Events
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.routes import CHAT, COMPLETIONS, media_type
from tallystick.protocol.wire import dumps, loads

COUNTED = (CHAT, COMPLETIONS)
"""Routes whose texts are known."""

_SPOKEN = ("content", "reasoning_content", "reasoning", "refusal", "text")


@dataclass(frozen=True, slots=True)
class Texts:
    """What was said: one text for each choice of an answer; the messages of a request, with its tools as they were sent."""

    parts: tuple[str, ...]


def request_texts(path: str, body: bytes) -> Texts | None:
    """The texts of a request; None where it is of another kind, or says more than text."""
    try:
        request = loads(body, "request body")
    except BadMessage:
        return None
    if not isinstance(request, dict):
        return None
    if path == COMPLETIONS:
        prompt = request.get("prompt")
        listed = prompt if isinstance(prompt, list) else [prompt]
        spoken = tuple(one for one in listed if isinstance(one, str))
        return Texts(spoken) if spoken and len(spoken) == len(listed) else None
    messages = request.get("messages")
    if path != CHAT or not isinstance(messages, list) or not all(map(_readable, messages)):
        return None
    parts = [text for message in messages for text in _of_message(message)]
    parts += [dumps(request[name]).decode() for name in ("tools", "functions", "response_format") if request.get(name)]
    return Texts(tuple(parts))


def answer_texts(content_type: str, body: bytes) -> Texts | None:
    """The texts of a completion's answer, whole or streamed; None if it is none."""
    spoken: dict[int, list[str]] = {}
    try:
        events = Events().feed(body + b"\n\n") if media_type(content_type) == EVENT_STREAM else [body]
        for event in events:
            document = loads(event, "answer")
            for choice in document.get("choices") or ():
                spoken.setdefault(int(choice.get("index") or 0), []).extend(_of_choice(choice))
    except (BadMessage, AttributeError, TypeError, ValueError):
        return None
    return Texts(tuple("".join(spoken[index]) for index in sorted(spoken))) if spoken else None


def _of_choice(choice: dict[str, Any]) -> Iterator[str]:
    said = choice.get("message") or choice.get("delta") or choice
    yield from (text for name in _SPOKEN if isinstance(text := said.get(name), str))
    for call in said.get("tool_calls") or ():
        yield from _of_call(call.get("function") or {})


def _readable(message: Any) -> bool:
    """Whether a message is all text: an image's tokens cannot be counted here."""
    content = message.get("content") if isinstance(message, dict) else 0
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    return content is None or isinstance(content, str)


def _of_message(message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    yield from (part["text"] for part in content or () if isinstance(part, dict))
    for call in message.get("tool_calls") or ():
        if isinstance(call, dict):
            yield from _of_call(call.get("function") or {})


def _of_call(function: dict[str, Any]) -> Iterator[str]:
    yield from (text for name in ("name", "arguments") if isinstance(text := function.get(name), str))
