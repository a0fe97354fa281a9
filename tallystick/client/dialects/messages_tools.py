"""Translates the tools of Anthropic's Messages into functions of chat completions. Pure.

Tools that run on Anthropic's servers, and tools whose schema only Anthropic's models know, are refused.
"""

from __future__ import annotations

from typing import Any, Final

from tallystick.client.dialects.messages_errors import untranslatable
from tallystick.protocol.errors import BadMessage

_CHOICES: Final = {"auto": "auto", "any": "required", "none": "none"}


def translate_tools(tools: object) -> list[dict[str, Any]]:
    """The tools as functions. Raises BadMessage, which names the tool."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise BadMessage("tools: expected a list")
    return [_translate_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]


def _translate_tool(tool: object, member: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise BadMessage(f"{member}: expected an object")
    kind, name = tool.get("type"), tool.get("name")
    if kind not in (None, "custom"):
        value = f"a tool of the type {str(kind)[:60]!r}, which Anthropic runs or defines,"
        raise untranslatable(f"{member}.type", value, "describe a tool of your own with an input_schema, or leave it out")
    if not isinstance(name, str) or not name:
        raise BadMessage(f"{member}.name: expected the name of the tool")
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise BadMessage(f"{member}.input_schema: expected a JSON schema")
    function: dict[str, Any] = {"name": name, "parameters": schema}
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    if isinstance(tool.get("strict"), bool):
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def translate_tool_choice(choice: object) -> dict[str, Any]:
    """The members `tool_choice` and `parallel_tool_calls`. Raises BadMessage."""
    if choice is None:
        return {}
    kind = choice.get("type") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or kind not in (*_CHOICES, "tool"):
        raise BadMessage("tool_choice.type: expected auto, any, tool or none")
    if kind != "tool":
        translated: dict[str, Any] = {"tool_choice": _CHOICES[kind]}
    elif isinstance(choice.get("name"), str):
        translated = {"tool_choice": {"type": "function", "function": {"name": choice["name"]}}}
    else:
        raise BadMessage("tool_choice.name: expected the name of a tool")
    return translated | ({"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") is True else {})
