"""Translates a request to Anthropic's Messages into one for chat completions. Pure.

What chat completions cannot express is refused with the name of its member, unless leaving it out does not change the answer:
marks of the prompt cache, the caller's metadata, and the place of processing are left out. Members that this module does not know
pass to the engine as they are. Source: Anthropic's API reference, "Create a Message".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tallystick.client.dialects.messages_content import translate_turns
from tallystick.client.dialects.messages_errors import untranslatable
from tallystick.client.dialects.messages_tools import translate_tool_choice, translate_tools
from tallystick.client.openai.requests import load_body
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient

_SAME: Final = ("model", "temperature", "top_p", "top_k")
"""Members with the same name and meaning in both APIs."""
_IGNORED: Final = frozenset(
    {"metadata", "service_tier", "cache_control", "anthropic_version", "anthropic_beta", "betas", "speed", "diagnostics"}
)
"""Members that do not change the answer, or that would tell a provider who the caller is (metadata)."""
_TRANSLATED: Final = frozenset(
    {
        "messages",
        "system",
        "max_tokens",
        "stop_sequences",
        "stream",
        "tools",
        "tool_choice",
        "thinking",
        "output_config",
        "output_format",
        "context_management",
        "container",
        "mcp_servers",
        "inference_geo",
    }
)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A translated request, and what its answer depends on.

    `shows_thinking`: whether the caller wants to see the model's reasoning.
    """

    body: bytes = field(repr=False)
    model: str
    stream: bool
    stop_sequences: tuple[str, ...] = ()
    shows_thinking: bool = True


def to_chat(body: bytes) -> ChatRequest:
    """Translates a request. The same bytes always give the same bytes. Raises BadMessage, which names the member."""
    request = load_body(body)
    if not isinstance(request, dict):
        raise BadMessage("request body: expected a JSON object")
    model, stream = request.get("model"), request.get("stream")
    if not isinstance(model, str):
        raise BadMessage("model: expected the name of a model")
    if stream is not None and not isinstance(stream, bool):
        raise BadMessage("stream: expected true or false")
    _refuse_untranslatable(request)
    chat: dict[str, Any] = {name: request[name] for name in _SAME if request.get(name) is not None}
    chat["messages"] = translate_turns(request.get("system"), request.get("messages"))
    chat["max_tokens"] = _read_limit(request)
    if stops := _read_stops(request):
        chat["stop"] = list(stops)
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    if tools := translate_tools(request.get("tools")):
        chat |= {"tools": tools} | translate_tool_choice(request.get("tool_choice"))
    chat |= _translate_output(request)
    chat |= {name: value for name, value in request.items() if name not in _IGNORED | _TRANSLATED and name not in _SAME}
    return ChatRequest(dump_lenient(chat), model, bool(stream), stops, _shows_thinking(request.get("thinking")))


def _refuse_untranslatable(request: Mapping[str, Any]) -> None:
    for name in ("container", "mcp_servers"):
        if request.get(name):
            raise untranslatable(name, "what runs on Anthropic's servers", "leave it out")
    if request.get("inference_geo") not in (None, "global"):
        advice = "to choose the provider's region, send the header x-tally-options with require.region"
        raise untranslatable("inference_geo", "a place of processing", advice)
    management = request.get("context_management")
    edits = management.get("edits") if isinstance(management, dict) else None
    for number, edit in enumerate(edits if isinstance(edits, list) else ()):
        kind = str(edit.get("type") if isinstance(edit, dict) else None)[:60]
        if not kind.startswith("clear_"):
            raise untranslatable(f"context_management.edits[{number}].type", repr(kind), "leave it out")
    if request.get("n") not in (None, 1):
        raise BadMessage("n: expected 1, because a message has one answer")


def _read_limit(request: Mapping[str, Any]) -> int | float:
    limit = request.get("max_tokens")
    if limit is None:
        raise BadMessage("max_tokens: expected the most tokens to generate, got none")
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise BadMessage("max_tokens: expected a whole number")
    return limit


def _read_stops(request: Mapping[str, Any]) -> tuple[str, ...]:
    stops = request.get("stop_sequences")
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise BadMessage("stop_sequences: expected a list of texts")
    return tuple(stops)


def _translate_output(request: Mapping[str, Any]) -> dict[str, Any]:
    """The member for the JSON schema of the answer. The effort is left out: see `_shows_thinking`."""
    config = request.get("output_config")
    if config is not None and not isinstance(config, dict):
        raise BadMessage("output_config: expected an object")
    chat: dict[str, Any] = {}
    for name, output in (("output_config.format", (config or {}).get("format")), ("output_format", request.get("output_format"))):
        if output is not None:
            chat["response_format"] = _translate_format(output, name)
    return chat


def _translate_format(output: object, member: str) -> dict[str, Any]:
    if not isinstance(output, dict) or output.get("type") != "json_schema" or not isinstance(output.get("schema"), dict):
        raise BadMessage(f'{member}: expected {{"type": "json_schema", "schema": {{…}}}}')
    schema = {"name": "output", "schema": output["schema"], "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def _shows_thinking(thinking: object) -> bool:
    """Whether reasoning is shown.

    Nothing of it is passed on, nor is the effort: engines refuse OpenAI's reasoning_effort if their model does not reason, and
    clients such as Claude Code send both with every request. Models that reason do so by themselves.
    """
    if thinking is None:
        return True
    if not isinstance(thinking, dict) or thinking.get("type") not in ("enabled", "disabled", "adaptive"):
        raise BadMessage('thinking: expected an object with the type "enabled", "adaptive" or "disabled"')
    return thinking["type"] != "disabled" and thinking.get("display") != "omitted"
