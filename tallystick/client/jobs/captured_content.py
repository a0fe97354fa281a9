"""Prompts and answers as spans have them, if the user captures content: messages by the conventions for generative AI.

Text alone is captured. Of images, audio and files, only the kind is. Nothing here raises: what cannot be read is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tallystick.client.jobs.response import JobResponse
from tallystick.client.openai.answers import TextDeltas, read_text
from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.errors import TallyError
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.routes import media_type
from tallystick.protocol.sse import EVENT_STREAM

MAX_CAPTURED_BYTES = 1 << 20
"""Bytes of an answer up to which it is captured."""
MAX_TEXT = 65_536
"""Characters of all texts of a request or an answer that are captured."""
_MAX_MESSAGES = 1_000
_TEXT_KINDS = (None, "text", "input_text", "output_text")


def captured_request(request: ApiRequest) -> str:
    """The messages of a request as JSON; "" if it has none."""
    members = request.json
    if members is None:
        return ""
    messages = list(_messages(members))[:_MAX_MESSAGES]
    return _dump(messages)


def captured_answer(response: JobResponse) -> str:
    """The answer as JSON; "" if there is none, or if it is too long."""
    head, kept = response.head, response.kept
    if head is None or not kept or head.status >= 400:
        return ""
    body = b"".join(kept[1:])  # the first chunk is the head
    try:
        text = "".join(TextDeltas().feed(body)) if media_type(head.content_type) == EVENT_STREAM else read_text(body)
    except (TallyError, ValueError):
        return ""
    return _dump([{"role": "assistant", "parts": [_text(text)]}]) if text else ""


def _messages(members: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("system", "instructions"):
        if name in members:
            yield {"role": "system", "parts": _parts(members[name])}
    for name in ("messages", "input", "prompt", "query"):
        value = members.get(name)
        if not isinstance(value, list) or not any(isinstance(entry, dict) and "role" in entry for entry in value):
            if value is not None:
                yield {"role": "user", "parts": _parts(value)}
            continue
        for message in value:
            if isinstance(message, dict):
                yield {"role": str(message.get("role", "user"))[:64], "parts": _parts(message.get("content"))}


def _parts(content: object) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [_text(content)]
    parts = []
    for part in content if isinstance(content, list) else []:
        if isinstance(part, str):
            parts.append(_text(part))
        elif isinstance(part, dict) and part.get("type") in _TEXT_KINDS and isinstance(part.get("text"), str):
            parts.append(_text(part["text"]))
        elif isinstance(part, dict):
            parts.append({"type": str(part.get("type"))[:64]})
    return parts


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "content": text}


def _dump(messages: list[dict[str, Any]]) -> str:
    """The messages as JSON, with their texts cut to MAX_TEXT characters together."""
    left = MAX_TEXT
    for message in messages:
        for part in message["parts"]:
            if "content" in part:
                part["content"] = part["content"][:left]
                left -= len(part["content"])
    try:
        return dump_lenient(messages).decode() if messages else ""
    except (TallyError, ValueError):
        return ""
