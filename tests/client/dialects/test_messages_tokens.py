"""Estimates of input tokens for Anthropic's route that counts them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick.client.dialects.messages_tokens import count_tokens
from tallystick.protocol.errors import BadMessage


def count(**members: Any) -> int:
    """The estimate for a request with these members."""
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | members
    counted: dict[str, int] = json.loads(count_tokens(json.dumps(request).encode()))
    assert counted.keys() == {"input_tokens"}
    return counted["input_tokens"]


def test_longer_requests_count_more() -> None:
    """System prompt, tools, calls and images count, without a limit of output and whatever else a request has."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 1_000_000}}
    called = {"type": "tool_use", "id": "a", "name": "write", "input": {"text": "word " * 400}}
    plain = count()
    assert 0 < plain < 20
    assert count(system="word " * 400) >= plain + 400
    assert count(tools=[{"name": "t", "input_schema": {}, "description": "word " * 400}]) >= plain + 400
    assert count(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": [called]}]) >= plain + 400
    assert plain < count(messages=[{"role": "user", "content": [image]}]) < 5_000
    assert count(tools=[{"type": "web_search_20250305", "name": "web_search"}], thinking={"type": "adaptive"}) >= plain


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"[]", "request body"),
        (b'{"messages":[{}]}', "model"),
        (b'{"model":"m"}', "messages"),
        (b'{"model":"m","messages":[]}', "messages"),
    ],
)
def test_what_is_no_request(body: bytes, named: str) -> None:
    """The error names the member."""
    with pytest.raises(BadMessage, match=f"^{named}"):
        count_tokens(body)
