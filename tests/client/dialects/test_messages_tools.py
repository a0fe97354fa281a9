"""Tools of Anthropic's Messages as functions of chat completions."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tallystick.client.dialects.messages_tools import translate_tool_choice, translate_tools
from tallystick.protocol.errors import BadMessage

SCHEMA = {"type": "object", "properties": {}}


def test_tools_of_the_callers_own() -> None:
    """Marks for Anthropic's prompt cache and streaming do not change what a tool is."""
    tools = [
        {"name": "a", "input_schema": SCHEMA},
        {"type": "custom", "name": "b", "description": "B.", "input_schema": SCHEMA, "strict": True}
        | {"cache_control": {"type": "ephemeral"}, "eager_input_streaming": True, "input_examples": []},
    ]
    assert translate_tools(tools) == [
        {"type": "function", "function": {"name": "a", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "b", "parameters": SCHEMA, "description": "B.", "strict": True}},
    ]
    assert translate_tools(None) == translate_tools([]) == []


@pytest.mark.parametrize(
    "kind", ["web_search_20250305", "code_execution_20250825", "bash_20250124", "computer_20250124", "mcp_toolset", "later"]
)
def test_tools_that_only_anthropic_has(kind: str) -> None:
    """They are refused by their place and name, wherever they stand."""
    with pytest.raises(BadMessage, match=rf"^tools\[1\]\.type: .*{kind}"):
        translate_tools([{"name": "a", "input_schema": SCHEMA}, {"type": kind, "name": "b"}])


@pytest.mark.parametrize(
    ("tools", "named"),
    [
        ({}, "tools"),
        (["a"], "tools[0]"),
        ([{"input_schema": SCHEMA}], "tools[0].name"),
        ([{"name": "", "input_schema": SCHEMA}], "tools[0].name"),
        ([{"name": "a"}], "tools[0].input_schema"),
    ],
)
def test_malformed_tools(tools: Any, named: str) -> None:
    """The error names the member."""
    with pytest.raises(BadMessage, match=f"^{re.escape(named)}: "):
        translate_tools(tools)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, {}),
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "a"}, {"tool_choice": {"type": "function", "function": {"name": "a"}}}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"tool_choice": "auto", "parallel_tool_calls": False}),
        ({"type": "auto", "disable_parallel_tool_use": False}, {"tool_choice": "auto"}),
    ],
)
def test_the_choice_of_a_tool(choice: Any, expected: dict[str, Any]) -> None:
    """Each of Anthropic's choices has a counterpart."""
    assert translate_tool_choice(choice) == expected


@pytest.mark.parametrize(
    ("choice", "named"), [("auto", "type"), ({"type": "some"}, "type"), ({}, "type"), ({"type": "tool"}, "name")]
)
def test_a_malformed_choice(choice: Any, named: str) -> None:
    """The error names the member."""
    with pytest.raises(BadMessage, match=rf"^tool_choice\.{named}: "):
        translate_tool_choice(choice)
