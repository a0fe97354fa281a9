"""The candidates of a job: which asks can hold its request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.client.jobs.candidates import draft_orders, estimate_cost
from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Spec
from tallystick.protocol.routes import CHAT
from tallystick.protocol.types import ZERO_HASH, JobId
from tallystick.protocol.wire import dumps
from tests.client.parties import ALICE

JOB = JobId(bytes(16))
CONTEXT = ALICE.ask.message.context_tokens


def request(text: str) -> ApiRequest:
    """A chat request with one message."""
    return ApiRequest.of(CHAT, dumps({"model": "model", "max_tokens": 10, "messages": [{"role": "user", "content": text}]}))


def test_a_request_longer_than_every_context_is_not_ordered() -> None:
    """Nobody could answer it, so nothing is signed; white space may be many bytes a token and does not count."""
    with pytest.raises(Refusal, match=f"maximum context length is {CONTEXT} tokens") as caught:
        draft_orders(request("word" * 4 * (CONTEXT + 1)), [ALICE.ask], JOB, ZERO_HASH, 4_096)
    assert caught.value.code is Code.CONTEXT_LENGTH_EXCEEDED
    for text in ("word" * 3 * CONTEXT, " " * 64 * CONTEXT):
        assert len(draft_orders(request(text), [ALICE.ask], JOB, ZERO_HASH, 4_096)) == 1


def test_a_picture_is_not_measured_by_its_bytes() -> None:
    """Its cap is what the context holds, and it is ordered however many bytes it has."""
    url = "data:image/png;base64," + "A" * 20 * CONTEXT
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = dumps({"model": "model", "max_tokens": 10, "messages": [{"role": "user", "content": content}]})
    ((_, terms),) = draft_orders(ApiRequest.of(CHAT, body), [ALICE.ask], JOB, ZERO_HASH, 4_096)
    highest = max(terms.input_price, terms.cached_input_price)
    assert terms.max_cost == -(-(CONTEXT * highest + 10 * terms.output_price) // 1_000_000)


def test_an_estimate_knows_of_every_refusal() -> None:
    """A request that would not be ordered on an ask has no cost there, and the reason says what the ask lacks."""
    cost, why = estimate_cost(request("word " * 2 * (CONTEXT + 1)), ALICE.ask.message, 4_096, None)
    assert (cost, str(CONTEXT) in why) == (0, True)
    blind = replace(ALICE.ask.message, spec=Spec(features=("tools", "-vision")))
    content = [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
    body = dumps({"model": "model", "messages": [{"role": "user", "content": content}]})
    picture = ApiRequest.of(CHAT, body)
    cost, why = estimate_cost(picture, blind, 4_096, None)
    assert (cost, why) == (0, "it declares that it lacks what the request needs: vision")
    cost, why = estimate_cost(picture, ALICE.ask.message, 4_096, None)
    assert cost > 0
    assert not why
