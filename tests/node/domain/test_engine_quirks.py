"""Requests that an engine reads under other names."""

from __future__ import annotations

from typing import Any

import pytest

from node.domain.engine_quirks import LLAMA_CPP, adapt
from tallystick.protocol.routes import CHAT, RESPONSES

SCHEMA = {"type": "json_schema", "name": "p", "schema": {"type": "object"}, "strict": True}
CHAT_SCHEMA = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "object"}, "strict": True}}


@pytest.mark.parametrize(
    ("path", "engine", "members", "added"),
    [
        (RESPONSES, LLAMA_CPP, {"text": {"format": SCHEMA}}, {"response_format": CHAT_SCHEMA}),
        (RESPONSES, LLAMA_CPP, {"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (RESPONSES, LLAMA_CPP, {"text": {"format": {"type": "text"}}}, {}),
        (RESPONSES, LLAMA_CPP, {"text": "x"}, {}),
        (RESPONSES, LLAMA_CPP, {}, {}),
        (RESPONSES, LLAMA_CPP, {"text": {"format": SCHEMA}, "response_format": {"type": "text"}}, {}),
        (RESPONSES, "vllm", {"text": {"format": SCHEMA}}, {}),
        (CHAT, LLAMA_CPP, {"text": {"format": SCHEMA}}, {}),
    ],
)
def test_the_format_of_responses(path: str, engine: str, members: dict[str, Any], added: dict[str, Any]) -> None:
    """llama.cpp gets the format of Responses as chat completions name it; nothing else changes."""
    adapted = dict(members)
    adapt(path, adapted, engine)
    assert adapted == members | added
