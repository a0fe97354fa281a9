"""Extracts the texts of a request and of its answer, for a tokenizer to count. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tallystick.client.openai.answers import read_events
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import parse_lenient
from tallystick.protocol.openai_wire import TEXT_MEMBERS
from tallystick.protocol.routes import CHAT, COMPLETIONS, media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.wire import dumps

COUNTABLE_ROUTES = (CHAT, COMPLETIONS)
"""Routes whose texts this module can extract."""


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of an answer, one for each choice, or of a request: its messages, and its tools as they were sent."""

    parts: tuple[str, ...]


def request_texts(path: str, body: bytes) -> Texts | None:
    """The texts of a request. None for other routes, malformed requests and requests that contain more than text."""
    try:
        request = parse_lenient(body, "request body")
    except BadMessage:
        return None
    if not isinstance(request, dict):
        return None
    if path == COMPLETIONS:
        prompt = request.get("prompt")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        texts = tuple(text for text in prompts if isinstance(text, str))
        return Texts(texts) if texts and len(texts) == len(prompts) else None
    messages = request.get("messages")
    if path != CHAT or not isinstance(messages, list) or not all(map(_is_text_only, messages)):
        return None
    parts = [text for message in messages for text in _message_texts(message)]
    parts += [dumps(request[name]).decode() for name in ("tools", "functions", "response_format") if request.get(name)]
    return Texts(tuple(parts))


def answer_texts(content_type: str, body: bytes) -> Texts | None:
    """The texts of a completion, whole or streamed. None for any other or malformed answer."""
    by_choice: dict[int, list[str]] = {}
    try:
        documents = read_events(body) if media_type(content_type) == EVENT_STREAM else [body]
        for document in documents:
            for choice in parse_lenient(document, "answer").get("choices") or ():
                by_choice.setdefault(int(choice.get("index") or 0), []).extend(_choice_texts(choice))
    except (BadMessage, AttributeError, TypeError, ValueError):
        return None
    return Texts(tuple("".join(by_choice[index]) for index in sorted(by_choice))) if by_choice else None


def _choice_texts(choice: dict[str, Any]) -> Iterator[str]:
    message = choice.get("message") or choice.get("delta") or choice
    yield from (text for name in TEXT_MEMBERS if isinstance(text := message.get(name), str))
    for tool_call in message.get("tool_calls") or ():
        yield from _function_texts(tool_call.get("function") or {})


def _is_text_only(message: Any) -> bool:
    """Whether a message is all text. The tokens of an image cannot be counted here."""
    content = message.get("content") if isinstance(message, dict) else 0
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    return content is None or isinstance(content, str)


def _message_texts(message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    yield from (part["text"] for part in content or () if isinstance(part, dict))
    for tool_call in message.get("tool_calls") or ():
        if isinstance(tool_call, dict):
            yield from _function_texts(tool_call.get("function") or {})


def _function_texts(function: dict[str, Any]) -> Iterator[str]:
    yield from (text for name in ("name", "arguments") if isinstance(text := function.get(name), str))
