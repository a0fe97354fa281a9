"""Requests to Responses as chat completions: every member is translated, left out, passed on, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick.client.dialects.responses import ResponsesDialect
from tallystick.protocol.errors import BadMessage

TOOL = {"type": "function", "name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": True}
FUNCTION = {"name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"city":"Rome"}'}
CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
HI = {"role": "user", "content": "hi"}
PNG = "data:image/png;base64,AA=="


def chat(**members: Any) -> dict[str, Any]:
    """The chat completion of a request with these members."""
    body = {"model": "m", "input": "hi"} | members
    translated: dict[str, Any] = json.loads(ResponsesDialect().translate(json.dumps(body).encode()).body)
    return translated


def messages(*items: Any, **members: Any) -> list[dict[str, Any]]:
    """The chat messages of these items."""
    translated: list[dict[str, Any]] = chat(input=list(items), **members)["messages"]
    return translated


def test_the_smallest_request() -> None:
    """A text is a message of the user; nothing is added."""
    assert chat() == {"model": "m", "messages": [HI]}


@pytest.mark.parametrize(
    ("given", "translated"),
    [
        ({"max_output_tokens": 7}, {"max_tokens": 7}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"stream": False}, {}),
        ({"temperature": 0.5, "top_p": 0.9, "user": "u"}, {"temperature": 0.5, "top_p": 0.9, "user": "u"}),
        ({"temperature": None, "metadata": None, "tools": None, "text": None, "reasoning": None}, {}),
        ({"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
        ({"reasoning": {"effort": None}}, {}),
        ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {}),
        ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ({"tools": [TOOL]}, {"tools": [{"type": "function", "function": FUNCTION}]}),
        (
            {"tools": [{"type": "function", "function": {"name": "weather"}, "strict": None}]},
            {"tools": [{"type": "function", "function": {"name": "weather"}}]},
        ),
        (
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}},
            {
                "tools": [{"type": "function", "function": FUNCTION}],
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
            },
        ),
        (
            {
                "tools": [TOOL, TOOL | {"name": "other"}],
                "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
            },
            {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
        ),
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"include": ["reasoning.encrypted_content"]}, {}),
        (
            {
                "store": True,
                "metadata": {"a": "b"},
                "truncation": "auto",
                "service_tier": "auto",
                "prompt_cache_key": "k",
                "safety_identifier": "s",
                "background": False,
                "max_tool_calls": 3,
                "stream_options": {"include_obfuscation": False},
            },
            {},
        ),
        ({"seed": 7, "top_k": 40, "chat_template_kwargs": {"x": 1}}, {"seed": 7, "top_k": 40, "chat_template_kwargs": {"x": 1}}),
    ],
)
def test_members(given: dict[str, Any], translated: dict[str, Any]) -> None:
    """What has a counterpart is translated, what labels or stores is left out, and what is unknown passes on."""
    assert chat(**given) == {"model": "m", "messages": [HI]} | translated


@pytest.mark.parametrize(
    ("items", "translated"),
    [
        ([{"role": "user", "content": "hi"}], [HI]),
        ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}], [HI]),
        (
            [{"role": "developer", "content": "a"}, {"role": "system", "content": [{"type": "input_text", "text": "b"}]}, HI],
            [{"role": "system", "content": "Be kind.\n\na\n\nb"}, HI],
        ),
        (
            [HI, {"role": "developer", "content": "now in French"}, HI],
            [{"role": "system", "content": "Be kind."}, HI, {"role": "system", "content": "now in French"}, HI],
        ),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": PNG, "detail": "low"}]}],
            [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG, "detail": "low"}}]},
            ],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "a"},
                        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
                        {"type": "input_file", "filename": "f.pdf", "file_data": "data:,x"},
                    ],
                }
            ],
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
                        {"type": "file", "file": {"filename": "f.pdf", "file_data": "data:,x"}},
                    ],
                }
            ],
        ),
        (
            [
                HI,
                {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
                CALL,
                CALL | {"call_id": "c2"},
                {"type": "function_call_output", "call_id": "c1", "output": "20"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "21"}]},
                {
                    "type": "message",
                    "role": "assistant",
                    "id": "msg",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "Mild.", "annotations": []}],
                },
                HI,
            ],
            [
                HI,
                {
                    "role": "assistant",
                    "reasoning_content": "hm",
                    "tool_calls": [CALLED, CALLED | {"id": "c2"}],
                    "content": None,
                },
                {"role": "tool", "tool_call_id": "c1", "content": "20"},
                {"role": "tool", "tool_call_id": "c2", "content": "21"},
                {"role": "assistant", "content": "Mild."},
                HI,
            ],
        ),
        (
            [
                {"role": "assistant", "content": "Let me look."},
                CALL,
                {"type": "function_call_output", "call_id": "c1", "output": {"t": 1}},
            ],
            [
                {"role": "assistant", "content": "Let me look.", "tool_calls": [CALLED]},
                {"role": "tool", "tool_call_id": "c1", "content": '{"t":1}'},
            ],
        ),
        (
            [
                CALL,
                CALL | {"call_id": "c2"},
                {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_image", "image_url": PNG}]},
                {"type": "function_call_output", "call_id": "c2", "output": "b"},
            ],
            [
                {"role": "assistant", "tool_calls": [CALLED, CALLED | {"id": "c2"}], "content": None},
                {"role": "tool", "tool_call_id": "c1", "content": ""},
                {"role": "tool", "tool_call_id": "c2", "content": "b"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]},
            ],
        ),
        (
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": ""}],
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, HI],
            [{"role": "assistant", "content": "No."}, HI],
        ),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "x"}, HI], [HI]),
    ],
)
def test_items(items: list[Any], translated: list[dict[str, Any]]) -> None:
    """Items become messages; those of one turn become one message; instructions come first."""
    with_instructions = messages(*items, instructions="Be kind.")
    if translated[0]["role"] == "system":
        assert with_instructions == translated
    else:
        assert messages(*items) == translated
        assert with_instructions == [{"role": "system", "content": "Be kind."}, *translated]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"model": None}, "model"),
        ({"stream": "yes"}, "stream"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [7]}, r"input\[0\]"),
        ({"input": [{"role": "narrator", "content": "x"}]}, r"input\[0\].role.*narrator"),
        ({"input": [{"role": "user", "content": 7}]}, r"input\[0\].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, r"input\[0\].content\[0\].text"),
        ({"input": [{"role": "user", "content": [{"type": "video"}]}]}, r"input\[0\].content\[0\].type.*video"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "file_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "file_data"),
        ({"input": [{"role": "system", "content": [{"type": "input_image", "image_url": PNG}]}]}, r"content\[0\].*this role"),
        ({"input": [{"type": "web_search_call", "id": "ws"}]}, r"input\[0\].type.*web_search_call"),
        ({"input": [{"type": "item_reference", "id": "msg_9"}]}, r"input\[0\].id.*msg_9"),
        ({"input": [{"type": "function_call", "name": "f"}]}, r"input\[0\].call_id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, r"input\[0\].call_id"),
        ({"tools": {}}, "tools: expected a list"),
        ({"tools": [7]}, r"tools\[0\]: expected an object"),
        ({"tools": [TOOL, {"type": "web_search"}]}, r"tools\[1\].type.*'web_search'"),
        ({"tools": [{"type": "file_search", "vector_store_ids": ["v"]}]}, "'file_search'"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "'mcp'"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.*web_search"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice.mode"),
        ({"text": []}, "text: expected an object"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type.*grammar"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt"}}, "prompt"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ],
)
def test_refusals(members: dict[str, Any], words: str) -> None:
    """What cannot be translated is refused with the member's name."""
    with pytest.raises(BadMessage, match=words):
        chat(**members)


@pytest.mark.parametrize("body", [b"[]", b"{", b"7"])
def test_what_is_no_request(body: bytes) -> None:
    """Anything but a JSON object is refused."""
    with pytest.raises(BadMessage, match="request body"):
        ResponsesDialect().translate(body)
