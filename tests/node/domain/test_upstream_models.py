from __future__ import annotations

import pytest

from node.domain.upstream_models import UpstreamModel, read_models
from tallystick.protocol.sse import MalformedAnswer
from tallystick.protocol.wire import dumps


def test_models_are_read_with_their_context() -> None:
    """Names, owners and context lengths are read in the formats of vLLM, hosted APIs and llama.cpp; others are dropped."""
    listed = [
        {"id": "a", "owned_by": "vllm", "max_model_len": 4_096},
        {"id": "b", "context_length": 8_192},
        {"id": "c", "meta": {"n_ctx": 512}},
        {"id": "d", "max_model_len": "many", "meta": None},
        {"id": 5},
        5,
        "",
        "e",
        {"id": "f", "metadata": {"context_length": 16}, "top_provider": {"context_length": 8}},
        {"id": "g", "context_window": 32},
        {"id": "h", "context_length": True, "max_context_length": 64},
    ]
    assert read_models(dumps({"data": listed})) == (
        UpstreamModel("a", 4_096, "vllm"),
        UpstreamModel("b", 8_192),
        UpstreamModel("c", 512),
        UpstreamModel("d"),
        UpstreamModel("e"),
        UpstreamModel("f", 16),
        UpstreamModel("g", 32),
        UpstreamModel("h", 64),
    )
    for body in (b"<html>", b"5", b"{}", b'{"data": 1}'):
        with pytest.raises(MalformedAnswer):
            read_models(body)


@pytest.mark.parametrize(
    "body", [b'[{"id": "a"}, 5]', b'{"models": [{"name": "a"}]}', b'{"data": null, "models": [{"model": "a"}]}']
)
def test_lists_in_other_forms(body: bytes) -> None:
    """A list may be bare, or stand under another name."""
    assert read_models(body) == (UpstreamModel("a"),)


@pytest.mark.parametrize("body", [b'{"data": null}', b"[]", b'{"object": "list", "data": []}'])
def test_a_list_may_be_empty(body: bytes) -> None:
    """An engine that lists nothing may still serve any model."""
    assert read_models(body) == ()
