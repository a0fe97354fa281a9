from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick.client.jobs.captured_content import MAX_TEXT, captured_request
from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def _captured(path: str, **members: Any) -> Any:
    text = captured_request(ApiRequest.of(path, json.dumps({"model": "m", **members}).encode()))
    return json.loads(text) if text else None


def _user(*texts: str) -> dict[str, Any]:
    return {"role": "user", "parts": [{"type": "text", "content": text} for text in texts]}


@pytest.mark.parametrize(
    ("path", "members", "expected"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hi"}]}, [_user("hi")]),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, IMAGE]}]},
            [{"role": "user", "parts": [*_user("hi")["parts"], {"type": "image_url"}]}],
        ),
        (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, [{"role": "assistant", "parts": []}]),
        (COMPLETIONS, {"prompt": "once"}, [_user("once")]),
        (COMPLETIONS, {"prompt": ["a", "b"]}, [_user("a", "b")]),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, [{"role": "user", "parts": []}]),
        (EMBEDDINGS, {"input": "text"}, [_user("text")]),
        (RESPONSES, {"input": "hi", "instructions": "be brief"}, [{**_user("be brief"), "role": "system"}, _user("hi")]),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}, [_user("hi")]),
        (
            MESSAGES,
            {"system": "s", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
            [{**_user("s"), "role": "system"}, _user("hi")],
        ),
    ],
)
def test_the_texts_of_each_api_are_captured(path: str, members: dict[str, Any], expected: Any) -> None:
    """And of images, files and calls the kind alone."""
    assert _captured(path, **members) == expected


def test_long_texts_are_cut_together() -> None:
    """A span has a bounded size."""
    (first, second) = _captured(CHAT, messages=[{"role": "user", "content": "x" * MAX_TEXT}, {"role": "user", "content": "y"}])
    assert (len(first["parts"][0]["content"]), second["parts"][0]["content"]) == (MAX_TEXT, "")


@pytest.mark.parametrize("messages", [[], [[]], [7], [{"role": 7, "content": {"a": 1}}], [{"content": "\ud800"}]])
def test_odd_messages_are_no_error(messages: list[Any]) -> None:
    """What an engine would refuse is not this module's business."""
    _captured(CHAT, messages=messages)
