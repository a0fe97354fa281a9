"""What is added to requests so that answers have evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from node.domain.logprob_request import EvidenceSupport, TokenIds
from node.domain.requests import EngineRequest, prepare
from tallystick.protocol.plaintext_heads import RequestHead
from tallystick.protocol.routes import CHAT, COMPLETIONS
from tallystick.protocol.wire import dumps, loads
from tests.node.harness import OFFER

MEMBER = EvidenceSupport(TokenIds.MEMBER, TokenIds.MEMBER, null_in_stream=True, null_in_completions=True)
TEXT = EvidenceSupport(TokenIds.TEXT, TokenIds.TEXT)
FIVE = {"logprobs": True, "top_logprobs": 5}


def prepared(fields: dict[str, Any], path: str = CHAT, support: EvidenceSupport | None = MEMBER) -> EngineRequest:
    """The engine's request for a client's request."""
    return prepare(RequestHead(path), dumps({"model": "m", "max_tokens": 9} | fields), replace(OFFER, evidence=support), 100)


def plain(fields: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    """The engine's request if it has no log-probabilities."""
    return loads(prepared(fields, path, None).body, "body")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("fields", "path", "support", "added", "top"),
    [
        ({}, CHAT, MEMBER, FIVE, None),
        ({"stream": True}, CHAT, MEMBER, FIVE, None),
        ({"logprobs": False}, CHAT, MEMBER, FIVE, None),
        ({"logprobs": None, "top_logprobs": None}, CHAT, MEMBER, FIVE, None),
        ({"tools": [{"type": "function"}]}, CHAT, MEMBER, FIVE, None),
        ({}, CHAT, TEXT, FIVE | {"return_tokens_as_token_ids": True}, None),
        ({"prompt": "a"}, COMPLETIONS, MEMBER, {"logprobs": 5}, None),
        ({"prompt": "a"}, COMPLETIONS, TEXT, {"logprobs": 5, "return_tokens_as_token_ids": True}, None),
        ({"logprobs": True, "top_logprobs": 2}, CHAT, MEMBER, FIVE, 2),
        ({"logprobs": 3, "prompt": "a"}, COMPLETIONS, MEMBER, {"logprobs": 5}, 3),
    ],
)
def test_each_request_asks_for_the_five_best(
    fields: dict[str, Any], path: str, support: EvidenceSupport, added: dict[str, Any], top: int | None
) -> None:
    """Nothing else of the request changes, and without the addition it is the one that the caller sent."""
    request = prepared(fields, path, support)
    assert loads(request.body, "body") == plain(fields, path) | added
    assert request.logprobs is not None
    assert (request.logprobs.top, request.logprobs.strip, request.logprobs.adds) == (top, top is None, True)
    assert loads(request.without_logprobs().body, "body") == plain(fields, path)
    assert request.without_logprobs().logprobs is None


@pytest.mark.parametrize(
    ("fields", "path", "support"),
    [
        ({"logprobs": True, "top_logprobs": 20}, CHAT, MEMBER),
        ({"logprobs": True, "top_logprobs": 5}, CHAT, TEXT),
        ({"logprobs": True, "top_logprobs": 2}, CHAT, TEXT),
        ({"logprobs": True, "top_logprobs": 0}, CHAT, MEMBER),
        ({"logprobs": True}, CHAT, MEMBER),
        ({"top_logprobs": 2}, CHAT, MEMBER),
        ({"n_probs": 2}, CHAT, MEMBER),
        ({"logprobs": 0, "prompt": "a"}, COMPLETIONS, MEMBER),
        ({"logprobs": 2, "prompt": "a"}, COMPLETIONS, TEXT),
    ],
)
def test_what_a_caller_asked_for_stays(fields: dict[str, Any], path: str, support: EvidenceSupport) -> None:
    """A request for log-probabilities that cannot be cut back is sent as it came. Its rows are taken if it has any."""
    request = prepared(fields, path, support)
    assert loads(request.body, "body") == plain(fields, path)
    assert request.logprobs is not None
    assert not request.logprobs.adds
    assert request.without_logprobs().body == request.body


@pytest.mark.parametrize(
    ("fields", "path", "support"),
    [
        ({"n": 2}, CHAT, MEMBER),
        ({"best_of": 2, "prompt": "a"}, COMPLETIONS, MEMBER),
        ({"prompt": ["a", "b"]}, COMPLETIONS, MEMBER),
        ({"echo": True, "prompt": "a"}, COMPLETIONS, MEMBER),
        ({"post_sampling_probs": True}, CHAT, MEMBER),
        ({}, CHAT, None),
        ({}, CHAT, EvidenceSupport(None, TokenIds.MEMBER)),
        ({"prompt": "a"}, COMPLETIONS, EvidenceSupport(TokenIds.MEMBER, None)),
    ],
)
def test_requests_whose_answers_give_no_rows(fields: dict[str, Any], path: str, support: EvidenceSupport | None) -> None:
    """Several choices, an echo, probabilities after sampling and engines without ids: the request stays as it is."""
    request = prepared(fields, path, support)
    assert (loads(request.body, "body"), request.logprobs) == (plain(fields, path), None)
    assert request.without_logprobs() is request


@pytest.mark.parametrize(("fields", "path", "null"), [({}, CHAT, False), ({"stream": True}, CHAT, True), ({}, COMPLETIONS, True)])
def test_what_an_answer_without_log_probabilities_says(fields: dict[str, Any], path: str, null: bool) -> None:
    """Engines differ in that, and between their routes."""
    request = prepared(fields | {"prompt": "a"}, path)
    assert request.logprobs is not None
    assert request.logprobs.null is null


def test_requests_that_an_engine_may_refuse_differ_in_shape() -> None:
    """llama.cpp refuses log-probabilities of streams with tools, and gives them otherwise."""
    shapes = {
        prepared(fields).shape
        for fields in ({}, {"stream": True}, {"tools": [1]}, {"tools": [1], "stream": True}, {"response_format": {"type": "a"}})
    }
    assert len(shapes) == 5
    assert prepared({"temperature": 1}).shape == prepared({}).shape
