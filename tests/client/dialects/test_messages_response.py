"""Whole chat completions as Anthropic's messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick.client.dialects.messages_request import ChatRequest
from tallystick.client.dialects.messages_response import to_message
from tallystick.protocol.errors import BadMessage, Fault
from tallystick.protocol.pricing import Usage

REQUEST = ChatRequest(b"", "asked", stream=False, stop_sequences=("###",))
HIDING = ChatRequest(b"", "asked", stream=False, shows_thinking=False)


def message(
    answer: Any,
    request: ChatRequest = REQUEST,
    billed: Usage | None = None,
    *,
    finish: Any = "stop",
    choice: Any = None,
    **members: Any,
) -> dict[str, Any]:
    """The message of a chat completion with this answer in its choice."""
    choices = [{"index": 0, "message": answer, "finish_reason": finish} | (choice or {})]
    document = {"id": "c", "object": "chat.completion", "model": "engine/m", "choices": choices} | members
    read: dict[str, Any] = json.loads(to_message(request, json.dumps(document).encode(), job="ab", billed=billed))
    return read


def call(arguments: Any, **members: Any) -> dict[str, Any]:
    """A call of a tool."""
    return {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": arguments}} | members


def test_the_envelope() -> None:
    """The id names the job, and the model is the one that the engine names."""
    assert message({"role": "assistant", "content": "Hi."}, usage={"prompt_tokens": 9, "completion_tokens": 2}) == {
        "id": "msg_ab",
        "type": "message",
        "role": "assistant",
        "model": "engine/m",
        "content": [{"type": "text", "text": "Hi."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 9, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 2},
    }
    assert message({"content": "Hi."}, model=None)["model"] == "asked"


@pytest.mark.parametrize(
    ("answer", "kinds"),
    [
        ({"content": "a"}, ["text:a"]),
        ({"content": ""}, []),
        ({"content": None}, []),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ["text:ab"]),
        ({"content": "a", "reasoning_content": "r"}, ["thinking:r", "text:a"]),
        ({"content": "a", "reasoning": "r"}, ["thinking:r", "text:a"]),
        ({"content": "a", "reasoning": None, "reasoning_content": ""}, ["text:a"]),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}, {"type": "text", "text": "a"}]},
            ["thinking:r", "text:a"],
        ),
        ({"content": "a", "tool_calls": [call("{}")]}, ["text:a", "tool_use:look"]),
        ({"content": None, "tool_calls": [call("{}"), call("{}", id="call_2")]}, ["tool_use:look", "tool_use:look"]),
        ({"content": None, "function_call": {"name": "old", "arguments": "{}"}}, ["tool_use:old"]),
        ({"content": None, "refusal": "No."}, ["text:No."]),
    ],
)
def test_content(answer: dict[str, Any], kinds: list[str]) -> None:
    """Reasoning, text and calls become blocks, in this order; nothing becomes an empty block."""
    content = message(answer)["content"]
    assert [f"{block['type']}:{block.get(block['type'], block.get('name'))}" for block in content] == kinds


def test_reasoning_that_the_caller_hides() -> None:
    """It is not shown to callers with thinking disabled; to others it comes with a signature, without which some drop it."""
    answer = {"content": "a", "reasoning_content": "r"}
    assert [block["type"] for block in message(answer, HIDING)["content"]] == ["text"]
    assert message(answer)["content"][0]["signature"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Rome", "n": [1]}', {"city": "Rome", "n": [1]}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ({"city": "Rome"}, {"city": "Rome"}),
        ('{"city": "Ro', {"INVALID_JSON": '{"city": "Ro'}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('{"smile": "\\ud83d\\ude00"}', {"smile": "\U0001f600"}),
    ],
)
def test_the_input_of_a_tool_is_an_object(arguments: Any, expected: dict[str, Any]) -> None:
    """Also if the model wrote none, or if the engine sent one already; what is no JSON object is not lost."""
    assert message({"tool_calls": [call(arguments)]})["content"][0]["input"] == expected


def test_calls_without_ids_get_different_ones() -> None:
    """A result names its call by id."""
    content = message({"tool_calls": [call("{}", id=None), call("{}", id="")]})["content"]
    assert [block["id"] for block in content] == ["toolu_ab_0", "toolu_ab_1"]


@pytest.mark.parametrize(
    ("finish", "choice", "answer", "expected"),
    [
        ("stop", {}, {}, ("end_turn", None)),
        (None, {}, {}, ("end_turn", None)),
        ("eos", {}, {}, ("end_turn", None)),
        ("length", {}, {}, ("max_tokens", None)),
        ("max_tokens", {}, {}, ("max_tokens", None)),
        ("model_length", {}, {}, ("max_tokens", None)),
        ("length", {}, {"tool_calls": [call("{")]}, ("max_tokens", None)),
        ("tool_calls", {}, {"tool_calls": [call("{}")]}, ("tool_use", None)),
        ("stop", {}, {"tool_calls": [call("{}")]}, ("tool_use", None)),
        ("function_call", {}, {"function_call": {"name": "f", "arguments": "{}"}}, ("tool_use", None)),
        ("content_filter", {}, {}, ("refusal", None)),
        ("stop", {}, {"refusal": "No."}, ("refusal", None)),
        ("stop", {"stop_reason": "###"}, {}, ("stop_sequence", "###")),
        ("stop", {"matched_stop": "###"}, {}, ("stop_sequence", "###")),
        ("stop", {"stop_reason": 128009}, {}, ("end_turn", None)),
        ("stop", {"matched_stop": "<|im_end|>"}, {}, ("end_turn", None)),
    ],
)
def test_why_the_answer_ended(
    finish: Any, choice: dict[str, Any], answer: dict[str, Any], expected: tuple[str, str | None]
) -> None:
    """Each finish reason has its counterpart; a stop sequence is told if the engine names it."""
    read = message({"content": "a"} | answer, finish=finish, choice=choice)
    assert (read["stop_reason"], read["stop_sequence"]) == expected


@pytest.mark.parametrize(
    ("usage", "billed", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 3}, None, (10, 0, 3)),
        ({"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 8}}, None, (2, 8, 3)),
        ({"prompt_tokens": 10, "completion_tokens": 3, "prompt_cache_hit_tokens": 8}, None, (2, 8, 3)),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 10}, Usage(10, 0, 4), (10, 0, 4)),
        (None, Usage(10, 4, 3), (6, 4, 3)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, Usage(10, 4, 3), (6, 4, 3)),
        (None, None, (0, 0, 0)),
        ({"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 8}}, None, (0, 8, 1)),
    ],
)
def test_usage(usage: Any, billed: Usage | None, expected: tuple[int, int, int]) -> None:
    """Anthropic's input excludes what came from the cache. What was billed stands in for what was not reported."""
    counts = message({"content": "a"}, billed=billed, usage=usage)["usage"]
    assert (counts["input_tokens"], counts["cache_read_input_tokens"], counts["output_tokens"]) == expected


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{"text":"x"}]}', b'{"choices":[{"message":"x"}]}']
)
def test_what_is_no_chat_completion(body: bytes) -> None:
    """The engine is at fault."""
    with pytest.raises(BadMessage) as caught:
        to_message(REQUEST, body, job="ab", billed=None)
    assert caught.value.fault is Fault.ENGINE
