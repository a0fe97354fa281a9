from __future__ import annotations

import os
import random
from typing import Any

import orjson
import pytest

from tallystick.client.audits.synthetic import make_up_request, request_shape
from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.routes import CHAT, COMPLETIONS

SECRET = "the merger with Acme is on Friday "
SAMPLING = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 77, "stream": True, "stream_options": {"include_usage": True}}
TOOL = {"type": "function", "function": {"name": "book_acme", "description": SECRET, "parameters": {"type": "object"}}}
LIKE: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": SECRET * 9},
        {"role": "user", "content": [{"type": "text", "text": SECRET * 3}]},
        {"role": "assistant", "content": SECRET * 2},
        {"role": "user", "content": SECRET * 40},
    ],
    "tools": [TOOL, TOOL],
    "user": "employee-7",
    "metadata": {"project": SECRET},
    "seed": 4711,
    **SAMPLING,
}


def made_up(like: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """A made-up request."""
    parsed: dict[str, Any] = orjson.loads(make_up_request(path, like, os.urandom))
    return parsed


def test_it_has_the_shape_of_the_real_one() -> None:
    """Model, sampling, limits, number and length of messages, tools."""
    body = made_up(LIKE)
    assert {name: body[name] for name in SAMPLING} == SAMPLING
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    for mine, theirs in zip(body["messages"], LIKE["messages"], strict=True):
        length = len(theirs["content"]) if isinstance(theirs["content"], str) else len(theirs["content"][0]["text"])
        assert length * 0.8 < len(mine["content"]) < length + 150
    assert len(body["tools"]) == 2
    assert body["seed"] != 4711
    request = ApiRequest.of(CHAT, orjson.dumps(body))
    assert request.summary.output_tokens == 77


TEXTS = tuple(f"Paragraph {number} speaks of " + "things that nobody at the release knows " * 3 for number in range(30))


def test_texts_of_the_user_hide_it() -> None:
    """No sentence of the release is in any message, and the lengths are those of the real request."""
    plain = orjson.loads(make_up_request(CHAT, LIKE, os.urandom, TEXTS))
    for mine, theirs in zip(plain["messages"], LIKE["messages"], strict=True):
        length = len(theirs["content"]) if isinstance(theirs["content"], str) else len(theirs["content"][0]["text"])
        assert length * 0.8 < len(mine["content"]) <= max(length, 24)
    words = {word for text in TEXTS for word in text.split()}
    texts = [message["content"] for message in plain["messages"]] + [tool["function"]["description"] for tool in plain["tools"]]
    assert {word for text in texts for word in text.split()} <= words
    assert len({orjson.loads(make_up_request(COMPLETIONS, LIKE, os.urandom, TEXTS))["prompt"] for _ in range(50)}) > 10


def test_it_says_nothing_of_the_user() -> None:
    """No word, name or identifier of the real request."""
    text = orjson.dumps(made_up(LIKE)).decode().lower()
    assert not any(word in text for word in ("acme", "merger", "employee", "book_", "4711", "metadata"))


def test_each_is_another_one() -> None:
    """A provider cannot keep a list of them."""
    texts = {made_up(LIKE)["messages"][-1]["content"] for _ in range(50)}
    assert len(texts) == 50


def test_completions_have_a_prompt() -> None:
    """Of the same length."""
    body = made_up({"model": "m", "prompt": SECRET * 5, "max_tokens": 5}, COMPLETIONS)
    assert len(SECRET) * 4 < len(body["prompt"]) < len(SECRET) * 10
    assert "messages" not in body


@pytest.mark.parametrize(
    "messages",
    [None, [], "x", [1], [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": [{"text": 1}, 2]}]],
)
def test_any_request_gives_a_valid_one(messages: Any) -> None:
    """Whatever the real one looks like, the last message is the user's."""
    body = made_up({"model": "m", "messages": messages})
    assert body["messages"][-1]["role"] == "user"
    assert body["messages"][-1]["content"]
    ApiRequest.of(CHAT, orjson.dumps(body))


def test_it_is_bounded() -> None:
    """A request of millions of characters is not copied in full."""
    body = made_up({"model": "m", "messages": [{"role": "user", "content": "x" * 2_000_000}] * 3})
    assert 990_000 < sum(len(message["content"]) for message in body["messages"]) < 1_010_000
    assert len(made_up({"model": "m", "prompt": "x" * 2_000_000}, COMPLETIONS)["prompt"]) < 1_010_000


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_shape_is_enough(path: str) -> None:
    """It has no text of the request, and makes one of the same size."""
    like = LIKE | {"prompt": SECRET * 50}
    shape = request_shape(path, like)
    assert SECRET.strip() not in repr(shape)
    mine, theirs = (orjson.loads(make_up_request(path, form, random.Random(5).randbytes)) for form in (shape, like))
    assert mine == theirs


@pytest.mark.parametrize(
    "member",
    [
        {"messages": 5},
        {"messages": {"a": 1}},
        {"messages": [1, None]},
        {"tools": 5},
        {"prompt": []},
        *({"prompt": size, "messages": [{"role": "user", "content": size}]} for size in (10**400, -1)),
    ],
)
def test_any_request_has_a_shape(member: dict[str, Any]) -> None:
    """Whatever an engine accepted."""
    for path in (CHAT, COMPLETIONS):
        assert orjson.loads(make_up_request(path, request_shape(path, LIKE | member), os.urandom))["model"] == "m"
