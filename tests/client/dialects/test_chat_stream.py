"""What every dialect's stream does with what an engine sends, apart from how it says so."""

from __future__ import annotations

import json

import pytest

from tallystick.client.dialects.dialect import StreamTranslator
from tallystick.client.dialects.registry import DIALECTS
from tallystick.client.openai.answers import MAX_EVENT_BYTES
from tallystick.protocol.routes import MESSAGES, RESPONSES

REQUESTS = {
    MESSAGES: {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], "stream": True},
    RESPONSES: {"model": "m", "input": "hi", "stream": True},
}
TEXT = b'data: {"choices":[{"index":0,"delta":{"content":"Hello"}}]}\n\n'
COUNTED = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n'


def opened(route: str) -> StreamTranslator:
    """The translator of a stream's answer."""
    return DIALECTS[route].translate(json.dumps(REQUESTS[route]).encode()).open_stream(job="ab")


@pytest.mark.parametrize("route", REQUESTS)
@pytest.mark.parametrize("malformed", [b"data: " + b"x" * (MAX_EVENT_BYTES + 1), b"data: [1]\n\n"])
def test_nothing_follows_an_error(route: str, malformed: bytes) -> None:
    """A malformed stream ends with one error, whatever else comes or has come."""
    stream = opened(route)
    assert b"Hello" in stream.feed(TEXT)
    assert stream.feed(malformed).count(b"\ndata: ") == 1
    assert stream.failed
    assert stream.feed(malformed) + stream.feed(TEXT) + stream.finish(None) == b""


@pytest.mark.parametrize("route", REQUESTS)
def test_nothing_follows_the_end(route: str) -> None:
    """[DONE] after a usage ends the answer; what an engine sends after it is ignored, and so is the end of the stream."""
    stream = opened(route)
    assert stream.feed(TEXT + COUNTED + b"data: [DONE]\n\n")
    assert stream.feed(TEXT + b"data: [1]\n\n") + stream.finish(None) == b""
    assert not stream.failed
