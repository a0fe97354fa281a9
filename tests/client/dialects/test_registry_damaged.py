"""Requests and answers with members of the wrong kind: every dialect translates them or says what is wrong."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick.client.dialects.messages_tokens import count_tokens
from tallystick.client.dialects.registry import DIALECTS
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.routes import MESSAGES, RESPONSES

TOOL_RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}], "is_error": True}
REQUESTS: dict[str, dict[str, Any]] = {
    MESSAGES: {
        "model": "m",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}},
                    {"type": "document", "source": {"type": "text", "data": "x"}, "citations": {"enabled": False}},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "t"}, {"type": "tool_use", "id": "a", "name": "n", "input": {}}],
            },
            {"role": "user", "content": [TOOL_RESULT]},
            {"role": "system", "content": "x"},
        ],
        "tools": [{"name": "n", "input_schema": {}}],
        "tool_choice": {"type": "tool", "name": "n"},
        "thinking": {"type": "enabled"},
        "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {}}},
        "stop_sequences": ["x"],
        "context_management": {"edits": [{"type": "clear_x"}]},
        "stream": True,
    },
    RESPONSES: {
        "model": "m",
        "instructions": "s",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "https://x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
            {"type": "function_call", "call_id": "a", "name": "n", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "x"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": []}]},
        ],
        "tools": [{"type": "function", "name": "n", "parameters": {}}],
        "tool_choice": {"type": "function", "name": "n"},
        "text": {"format": {"type": "json_schema", "name": "o", "schema": {}}},
        "reasoning": {"effort": "low"},
        "max_output_tokens": 5,
        "stream": True,
    },
}
CALLS = [{"index": 0, "id": "a", "type": "function", "function": {"name": "n", "arguments": "{}"}}]
OUTPUT = {"role": "assistant", "content": "x", "reasoning_content": "r", "refusal": None, "tool_calls": CALLS}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
MEMBERS = {"id": "c", "model": "m", "created": 1, "usage": USAGE}
ANSWER = MEMBERS | {"choices": [{"index": 0, "message": OUTPUT, "finish_reason": "stop"}]}
EVENT = MEMBERS | {"choices": [{"index": 0, "delta": OUTPUT, "finish_reason": "stop"}]}
WRONG: list[Any] = [
    "",
    "x",
    "user",
    "text",
    "auto",
    "\ud83d",
    0,
    1,
    -1,
    1.5,
    10**30,
    float("nan"),
    None,
    True,
    [],
    {},
    [[]],
    [{}],
    {"type": []},
]


def damaged(document: dict[str, Any], seed: int) -> bytes:
    """The document with up to three members or entries replaced or removed."""
    draw, result = random.Random(seed), copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        node: Any = result
        while True:
            place = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if draw.random() < 0.3 or not (isinstance(node[place], dict | list) and node[place]):
                break
            node = node[place]
        if draw.random() < 0.2:
            del node[place]
        else:
            node[place] = copy.deepcopy(draw.choice(WRONG))
        if not result:
            break
    return json.dumps(result).encode()


@pytest.mark.parametrize("path", DIALECTS)
@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_damaged_requests(path: str, seed: int) -> None:
    """The caller is told what is wrong."""
    body = damaged(REQUESTS[path], seed)
    with contextlib.suppress(BadMessage):
        DIALECTS[path].translate(body)
    with contextlib.suppress(BadMessage):
        count_tokens(body)


@pytest.mark.parametrize("path", DIALECTS)
@settings(max_examples=400, deadline=None)
@given(seeds=st.lists(st.integers(0, 1 << 32), min_size=1, max_size=4))
def test_damaged_answers(path: str, seeds: list[int]) -> None:
    """Whole answers are translated or refused; streams always end with an event, and never raise."""
    translation = DIALECTS[path].translate(json.dumps(REQUESTS[path]).encode())
    with contextlib.suppress(TallyError):
        translation.answer(damaged(ANSWER, seeds[0]), job="ab", billed=None)
    stream = translation.open_stream(job="ab")
    output = b"".join(stream.feed(b"data: " + damaged(EVENT, seed) + b"\n\n") for seed in seeds) + stream.finish(None)
    assert output.endswith(b"\n\n")
