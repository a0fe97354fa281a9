"""What an upstream gets, and where."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tallystick.client.upstream_settings import Upstream, UpstreamTarget
from tallystick.client.upstreams.requests import UpstreamRequest
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS

TARGET = UpstreamTarget("cloud", "org/big:latest")


def prepared(path: str = CHAT, url: str = "https://api.example.org/v1", **members: Any) -> UpstreamRequest:
    """A request as the upstream gets it."""
    body = orjson.dumps({"model": str(TARGET)} | members)
    return UpstreamRequest.of(Upstream(name="cloud", url=url), TARGET, path, body, None)


@pytest.mark.parametrize(
    ("base", "address"),
    [
        ("https://api.example.org/v1", "https://api.example.org/v1/chat/completions"),
        ("https://api.example.org/v1/", "https://api.example.org/v1/chat/completions"),
        ("https://api.example.org", "https://api.example.org/v1/chat/completions"),
        ("https://api.example.org/", "https://api.example.org/v1/chat/completions"),
        ("https://api.example.org/api/paas/v4", "https://api.example.org/api/paas/v4/chat/completions"),
        ("https://api.example.org/v1beta/openai/", "https://api.example.org/v1beta/openai/chat/completions"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions"),
    ],
)
def test_base_urls_are_meant_as_openais_sdks_mean_them(base: str, address: str) -> None:
    """A path is followed by the route; a host alone stands for /v1."""
    assert prepared(url=base).url == address


def test_members_pass_untouched() -> None:
    """Only the model's name changes, also with numbers and texts that other parsers change."""
    body = b'{"model":"upstream://cloud/org/big:latest","seed":1000000000000000000000007,"messages":[{"content":"\\ud83d"}]}'
    request = UpstreamRequest.of(Upstream(name="cloud", url="https://example.org"), TARGET, CHAT, body, None)
    assert request.body == body.replace(b"upstream://cloud/", b"")


@pytest.mark.parametrize(
    ("path", "members", "options", "strips"),
    [
        (CHAT, {"stream": True}, {"include_usage": True}, True),
        (COMPLETIONS, {"stream": True, "stream_options": None}, {"include_usage": True}, True),
        (CHAT, {"stream": True, "stream_options": {"include_usage": True}}, {"include_usage": True}, False),
        (CHAT, {"stream": True, "stream_options": {"x": 1}}, {"x": 1, "include_usage": True}, True),
        (CHAT, {}, None, False),
        (EMBEDDINGS, {"input": "x"}, None, False),
    ],
)
def test_usage_of_streams_is_asked_for(path: str, members: dict[str, Any], options: Any, strips: bool) -> None:
    """Costs are booked by it. It is withheld from callers that did not ask for it."""
    request = prepared(path, **members)
    assert orjson.loads(request.body).get("stream_options") == options
    assert request.strip_usage is strips


def test_an_api_without_usage_of_streams() -> None:
    """It is not asked for what it would refuse."""
    upstream = Upstream(name="cloud", url="https://example.org", supports_stream_usage=False)
    request = UpstreamRequest.of(upstream, TARGET, CHAT, b'{"model": "x", "stream": true}', None)
    assert orjson.loads(request.body) == {"model": "org/big:latest", "stream": True}


@pytest.mark.parametrize("body", [b"not JSON", b"[]", b'{"n": 0}'])
def test_a_body_that_is_no_request(body: bytes) -> None:
    """It is refused before anything is booked or sent."""
    with pytest.raises(BadMessage):
        UpstreamRequest.of(Upstream(name="cloud", url="https://example.org"), TARGET, CHAT, body, None)
