"""What requests to upstreams cost: at most, and by what their answers report."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tallystick.client.openai.requests import summarise
from tallystick.client.upstream_settings import UpstreamModel
from tallystick.client.upstreams.metering import UNKNOWN_CONTEXT, AnswerMeter, most_cost, prices_of_model
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Prices, Usage
from tallystick.protocol.routes import CHAT, EMBEDDINGS, RESPONSES
from tallystick.protocol.types import Amount
from tests.client.upstreams.hosted_api import ANSWER, USAGE, delta

# One base unit an input token and two an output token.
MODEL = UpstreamModel(name="m", input_price=Amount(1_000_000), output_price=Amount(2_000_000), max_output_tokens=1_000)
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]


def most(model: UpstreamModel = MODEL, path: str = CHAT, **members: Any) -> Amount | None:
    """The most that a request of 1,000 bytes costs."""
    return most_cost(model, summarise(path, orjson.dumps({"model": "m"} | members)), 1_000)


def test_the_most_that_a_request_costs() -> None:
    """A token has at least one byte, and each choice has as much output as it asks for, or as the model gives."""
    text = 1_000 + TEMPLATE_ALLOWANCE
    assert most(messages=[], max_tokens=10) == text + 20
    assert most(messages=[], max_tokens=10, n=3) == text + 60
    assert most(messages=[]) == text + 2_000
    assert most(messages=[], n=2) == text + 4_000
    assert most(messages=[], max_tokens=10**6) == text + 2_000
    assert most(path=EMBEDDINGS, input="x") == text
    assert most(messages=PICTURE, max_tokens=10) == UNKNOWN_CONTEXT + 20


def test_a_context_bounds_the_input() -> None:
    """No input is longer than a context that the config names."""
    small = UpstreamModel(name="m", input_price=Amount(1_000_000), output_price=Amount(0), context_tokens=700)
    assert most(small, messages=[]) == 700
    assert most(small, messages=PICTURE) == 700


def test_prices() -> None:
    """Cached input costs as much as input unless the config says so; the dearer of both bounds a request."""
    assert prices_of_model(MODEL) == Prices(1_000_000, 1_000_000, 2_000_000)
    assert prices_of_model(UpstreamModel(name="m")) is None
    assert most(UpstreamModel(name="m"), messages=[]) is None
    dear = UpstreamModel(name="m", input_price=Amount(0), cached_input_price=Amount(1_000_000), output_price=Amount(0))
    assert most(dear, messages=[]) == 1_000 + TEMPLATE_ALLOWANCE


@pytest.mark.parametrize(
    ("path", "documents", "usage", "finished"),
    [
        (CHAT, [ANSWER], Usage(1_000, 0, 100), True),
        (CHAT, [ANSWER | {"usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 600}}}], Usage(1_000, 600, 100), True),
        (CHAT, [ANSWER | {"usage": None}], Usage(10, 0, 4), True),
        (CHAT, [ANSWER | {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}], Usage(10, 0, 4), True),
        (CHAT, [delta("abcdefgh"), delta(None, "stop"), {"choices": [], "usage": USAGE}], Usage(1_000, 0, 100), True),
        (CHAT, [delta("abcdefgh"), delta("a")], Usage(10, 0, 3), False),
        (EMBEDDINGS, [{"data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}], Usage(7, 0, 0), False),
        (
            RESPONSES,
            [{"status": "completed", "output": [], "usage": {"input_tokens": 5, "output_tokens": 6}}],
            Usage(5, 0, 6),
            False,
        ),
        ("/v1/rerank", [{"results": []}], Usage(10, 0, 0), False),
        (CHAT, [ANSWER | {"usage": {"prompt_tokens": 10**15, "completion_tokens": 1}}], Usage(1 << 40, 0, 1), True),
    ],
)
def test_usage(path: str, documents: list[dict[str, Any]], usage: Usage, finished: bool) -> None:
    """Reported counts, else four bytes a token."""
    meter = AnswerMeter(path, 37)
    for document in documents:
        meter.add(orjson.dumps(document))
    assert meter.usage == usage
    assert meter.finished is finished or path == RESPONSES


def test_what_passes_and_what_fails() -> None:
    """An event that has nothing but usage may be withheld; an error ends the answer; garbage counts as nothing."""
    meter = AnswerMeter(CHAT, 1)
    assert [meter.add(part) for part in (b"[DONE]", b"not JSON", orjson.dumps(delta("a")))] == [False] * 3
    assert meter.add(orjson.dumps({"choices": [], "usage": USAGE}))
    assert not meter.failed
    meter.add(b'{"error": {"message": "x"}}')
    assert meter.failed
    assert meter.cost(MODEL) == 1_000 + 200
    assert meter.cost(UpstreamModel(name="m")) == 0


@pytest.mark.parametrize(
    ("documents", "usage"),
    [
        ([], Usage(0, 0, 0)),
        ([delta("abcd")], Usage(10, 0, 1)),
        ([{"choices": [], "usage": USAGE}], Usage(1_000, 0, 100)),
    ],
)
def test_an_error_costs_what_came_before_it(documents: list[dict[str, Any]], usage: Usage) -> None:
    """An error instead of an answer costs nothing; an answer that broke off costs what it reported, or what came of it."""
    meter = AnswerMeter(CHAT, 37)
    for document in (*documents, {"error": {"message": "x"}}):
        meter.add(orjson.dumps(document))
    assert meter.usage == usage
