"""Requests to Anthropic's Messages as chat completions: members that are translated, left out, passed on or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick.client.dialects.messages_request import to_chat
from tallystick.protocol.errors import BadMessage

BASE: dict[str, Any] = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


def chat(**members: Any) -> dict[str, Any]:
    """The chat completion that a request with these members becomes. None removes a member."""
    request = {name: value for name, value in (BASE | members).items() if value is not None}
    translated: dict[str, Any] = json.loads(to_chat(json.dumps(request).encode()).body)
    return translated


def test_the_plainest_request() -> None:
    """Model, limit and text have the same meaning in both APIs; no other member is made up."""
    assert chat() == {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def test_the_same_request_gives_the_same_bytes() -> None:
    """An idempotency key recognises a request by its translated bytes."""
    body = json.dumps(BASE | {"stop_sequences": ["a", "b"], "stream": True, "metadata": {"user_id": "x"}}).encode()
    assert to_chat(body).body == to_chat(body).body


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3}, {"temperature": 0.0, "top_p": 0.5, "top_k": 3}),
        ({"stop_sequences": ["###", "\n\nHuman:"]}, {"stop": ["###", "\n\nHuman:"]}),
        ({"stop_sequences": []}, {}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"stream": False}, {}),
        ({"metadata": {"user_id": "secret"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, {}),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, {}),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}, {}),
        ({"inference_geo": "global", "mcp_servers": [], "container": None}, {}),
        ({"seed": 7, "frequency_penalty": 0.5, "chat_template_kwargs": {"a": 1}},) * 2,
    ],
)
def test_members(members: dict[str, Any], expected: dict[str, Any]) -> None:
    """What has a counterpart is translated, what does not change the answer is left out, what is unknown passes on."""
    assert chat(**members) == chat() | expected


@pytest.mark.parametrize("where", ["output_config", "output_format"])
def test_a_schema_of_the_answer(where: str) -> None:
    """Structured output is a response_format of chat completions."""
    output = {"type": "json_schema", "schema": {"type": "object"}}
    translated = chat(**{where: {"format": output, "effort": "low"} if where == "output_config" else output})
    schema = translated["response_format"]["json_schema"]
    assert (translated["response_format"]["type"], schema["schema"], schema["strict"]) == (
        "json_schema",
        {"type": "object"},
        True,
    )


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"stop_sequences": "###"}, "stop_sequences"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "deep"}}, "thinking"),
        ({"container": "c1"}, "container"),
        ({"mcp_servers": [{"type": "url", "url": "https://x"}]}, "mcp_servers"),
        ({"inference_geo": "us"}, "inference_geo"),
        (
            {"context_management": {"edits": [{"type": "clear_tool_uses_1"}, {"type": "compact_1"}]}},
            "context_management.edits[1].type",
        ),
        ({"output_config": []}, "output_config"),
        ({"output_config": {"format": {"type": "grammar"}}}, "output_config.format"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_refused_names_its_member(members: dict[str, Any], named: str) -> None:
    """What a chat completion cannot express is refused, and so is what breaks the rules."""
    with pytest.raises(BadMessage, match=rf"^{named.replace('[', chr(92) + '[').replace('.', chr(92) + '.')}: "):
        chat(**members)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b'"x"'])
def test_what_is_no_request(body: bytes) -> None:
    """A body must be a JSON object."""
    with pytest.raises(BadMessage, match="request body"):
        to_chat(body)


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "adaptive", "display": "summarized"}, True),
        ({"type": "adaptive", "display": "omitted"}, False),
        ({"type": "disabled"}, False),
    ],
)
def test_whether_reasoning_is_shown(thinking: dict[str, Any] | None, shown: bool) -> None:
    """Reasoning is hidden only from callers that say so."""
    members = {} if thinking is None else {"thinking": thinking}
    assert to_chat(json.dumps(BASE | members).encode()).shows_thinking is shown
