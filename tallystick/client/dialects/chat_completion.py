"""Reads a chat completion, whole or a delta of its stream, as engines write it: what all dialects translate from. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tallystick.protocol.errors import BadMessage, Fault
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.openai_wire import choices_of


def read_completion(body: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns a whole completion, its first choice, and the message in it. Raises BadMessage, the engine's fault."""
    try:
        document = load_lenient(body)
    except ValueError:
        document = None
    choices = choices_of(document) if isinstance(document, dict) else []
    message = choices[0].get("message") if choices else None
    if not isinstance(message, dict):
        raise BadMessage("answer: expected a chat completion with a message in its first choice", fault=Fault.ENGINE)
    return document, choices[0], message


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning in a message or delta: vLLM's and DeepSeek's member, OpenRouter's, or Mistral's parts of the content."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(value := message.get(name), str) and value:
            return value
    return "".join(_part_text(part.get("thinking")) for part in _parts(message) if part.get("type") == "thinking")


def text_of(message: Mapping[str, Any]) -> str:
    """The text in a message or delta."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(_part_text(part.get("text")) for part in _parts(message) if part.get("type") in ("text", "output_text"))


def refusal_of(message: Mapping[str, Any]) -> str:
    """The words with which the model refuses."""
    refusal = message.get("refusal")
    return refusal if isinstance(refusal, str) else ""


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of tools in a message or delta, also in OpenAI's older form."""
    calls = message.get("tool_calls")
    listed = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    older = message.get("function_call")
    return listed or ([{"function": older}] if isinstance(older, dict) else [])


def function_of(call: Mapping[str, Any]) -> dict[str, str]:
    """The name and the arguments of a call; "" for what is missing. Arguments that are no text are written as JSON."""
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    name, arguments = function.get("name"), function.get("arguments")
    if arguments is None:
        arguments = ""
    return {
        "name": name if isinstance(name, str) else "",
        "arguments": arguments if isinstance(arguments, str) else dump_lenient(arguments).decode(),
    }


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _part_text(value: object) -> str:
    if isinstance(value, list):
        return "".join(_part_text(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""
