"""Translates a request to OpenAI's Responses into one for chat completions. Pure.

What chat completions cannot express is refused with the name of its member, unless leaving it out does not change the answer:
what the caller stores or labels, and hints to a cache or a queue, are left out. Members that this module does not know pass to
the engine as they are. Source: OpenAI's API reference, "Create a model response".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tallystick.client.dialects.responses_items import translate_items, translate_tools, untranslatable
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient, parse_lenient

_SAME: Final = ("model", "temperature", "top_p", "user")
"""Members with the same name and meaning in both APIs."""
_IGNORED: Final = frozenset(
    {
        "store",
        "metadata",
        "include",
        "truncation",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "max_tool_calls",
        "stream_options",
        "context_management",
    }
)
"""Members that do not change the answer, or that would tell a provider who the caller is (metadata)."""
_TRANSLATED: Final = frozenset(
    {
        "input",
        "instructions",
        "max_output_tokens",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "text",
        "reasoning",
        "stream",
        "top_logprobs",
        "background",
        "conversation",
        "prompt",
        "previous_response_id",
    }
)
_LOGPROBS: Final = "message.output_text.logprobs"
_DEFAULTS: Final[Mapping[str, Any]] = {
    "background": False,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A translated request, and what its answer depends on.

    `members`: those of the request that the response repeats. `summarises`: whether the caller asked for a summary of the
    reasoning, and so reads the reasoning there.
    """

    body: bytes = field(repr=False)
    model: str
    stream: bool
    members: Mapping[str, Any] = field(default_factory=dict, repr=False)
    summarises: bool = False


def read_request(body: bytes) -> dict[str, Any]:
    """Parses a request. Raises BadMessage."""
    request = parse_lenient(body, "request body")
    if not isinstance(request, dict):
        raise BadMessage("request body: expected a JSON object")
    return request


def to_chat(body: bytes) -> ChatRequest:
    """Translates a request. The same bytes always give the same bytes. Raises BadMessage, which names the member."""
    request = read_request(body)
    model, stream = request.get("model"), request.get("stream")
    if not isinstance(model, str):
        raise BadMessage("model: expected the name of a model")
    if stream is not None and not isinstance(stream, bool):
        raise BadMessage("stream: expected true or false")
    refuse_background(request)
    if request.get("prompt") is not None:
        raise _unsupported("prompt", "prompts that are stored at OpenAI are not available; send instructions and input")
    if request.get("previous_response_id") is not None:
        raise BadMessage("previous_response_id: expected the input of the whole conversation instead")
    chat: dict[str, Any] = {name: request[name] for name in _SAME if request.get(name) is not None}
    chat["messages"] = translate_items(request.get("instructions"), request.get("input"))
    if request.get("max_output_tokens") is not None:
        chat["max_tokens"] = request["max_output_tokens"]
    if stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    reasoning = _read_object(request, "reasoning")
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    chat |= translate_tools(request) | _text_members(_read_object(request, "text")) | _logprobs(request)
    known = _IGNORED | _TRANSLATED | frozenset(_SAME)
    chat |= {name: value for name, value in request.items() if name not in known and value is not None}
    summarises = any(reasoning.get(name) is not None for name in ("summary", "generate_summary"))
    return ChatRequest(dump_lenient(chat), model, bool(stream), repeated_members(request), summarises)


def repeated_members(request: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a response that repeat its request, with OpenAI's defaults for what the request leaves out."""
    repeated = {name: default if request.get(name) is None else request[name] for name, default in _DEFAULTS.items()}
    reasoning = request.get("reasoning")
    repeated["reasoning"] = {"effort": None, "summary": None} | (reasoning if isinstance(reasoning, dict) else {})
    text = request.get("text")
    repeated["text"] = {"format": {"type": "text"}, "verbosity": "medium"} | (text if isinstance(text, dict) else {})
    return repeated


def refuse_background(request: Mapping[str, Any]) -> None:
    """Raises BadMessage for work in the background and for conversations with an id of their own, which no gateway keeps."""
    if request.get("background"):
        raise _unsupported("background", "expected false: a gateway answers while its caller waits")
    if request.get("conversation") is not None:
        raise _unsupported("conversation", "not kept by this gateway; use previous_response_id, or send the whole input")


def _unsupported(member: str, reason: str) -> BadMessage:
    error = BadMessage(f"{member}: {reason}")
    error.param = member
    return error


def _read_object(request: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = request.get(name)
    if value is not None and not isinstance(value, dict):
        raise BadMessage(f"{name}: expected an object")
    return value or {}


def _text_members(text: Mapping[str, Any]) -> dict[str, Any]:
    """The members for the format of the answer and for how much it says."""
    chat = {"verbosity": text["verbosity"]} if text.get("verbosity") not in (None, "medium") else {}
    wanted = text.get("format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return chat
    if isinstance(wanted, dict) and kind == "json_object":
        return chat | {"response_format": {"type": "json_object"}}
    if isinstance(wanted, dict) and kind == "json_schema":
        described = wanted["json_schema"] if isinstance(wanted.get("json_schema"), dict) else wanted
        if not isinstance(described.get("schema"), dict):
            raise BadMessage("text.format.schema: expected a JSON schema")
        schema = {
            name: described[name] for name in ("name", "description", "schema", "strict") if described.get(name) is not None
        }
        return chat | {"response_format": {"type": "json_schema", "json_schema": {"name": "output"} | schema}}
    raise untranslatable("text.format.type", repr(str(kind)[:60]), "expected text, json_object or json_schema")


def _logprobs(request: Mapping[str, Any]) -> dict[str, Any]:
    """The members for log-probabilities, which a request of Responses includes by name."""
    include, top = request.get("include"), request.get("top_logprobs")
    if not (isinstance(include, list) and _LOGPROBS in include) and not top:
        return {}
    return {"logprobs": True} | ({"top_logprobs": top} if top else {})
