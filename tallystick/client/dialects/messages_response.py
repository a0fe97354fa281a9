"""Translates a whole chat completion into Anthropic's Message, and the parts that its stream has in common with it. Pure.

Source: Anthropic's API reference, "Create a Message", and engines' deviations from OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tallystick.client.dialects.messages_request import ChatRequest
from tallystick.protocol.errors import BadMessage, Fault
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.openai_wire import LENGTHS, choices_of
from tallystick.protocol.pricing import Usage
from tallystick.protocol.usage_reports import ReportedUsage, find_usage

SIGNATURE: Final = "unsigned"
"""Signature of translated reasoning, which nobody signed. Some clients drop reasoning that has none."""
_INVALID: Final = "INVALID_JSON"
"""The member that holds arguments of a tool that are no JSON object. Anthropic's documentation of streamed tools names it so."""


def to_message(request: ChatRequest, body: bytes, *, job: str, billed: Usage | None) -> bytes:
    """The Message of a chat completion. Raises BadMessage, the engine's fault, for anything else."""
    try:
        document = load_lenient(body)
    except ValueError:
        document = None
    choices = choices_of(document) if isinstance(document, dict) else []
    message = choices[0].get("message") if choices else None
    if not isinstance(message, dict):
        raise BadMessage("answer: expected a chat completion with a message in its first choice", fault=Fault.ENGINE)
    content: list[dict[str, Any]] = []
    if request.shows_thinking and (reasoning := reasoning_of(message)):
        content.append({"type": "thinking", "thinking": reasoning, "signature": SIGNATURE})
    if text := text_of(message) + refusal_of(message):
        content.append({"type": "text", "text": text})
    for number, call in enumerate(calls_of(message)):
        function = function_of(call)
        block_id = tool_id(call, job, number)
        content.append(
            {"type": "tool_use", "id": block_id, "name": function["name"], "input": _read_input(function["arguments"])}
        )
    reason, stop = stop_reason(request, choices[0], refused=bool(refusal_of(message)), calls=bool(calls_of(message)))
    envelope = message_envelope(request, document, job)
    envelope |= {"content": content, "stop_reason": reason, "stop_sequence": stop}
    return dump_lenient(envelope | {"usage": usage_members(find_usage(document), billed)})


def message_envelope(request: ChatRequest, document: Mapping[str, Any], job: str) -> dict[str, Any]:
    """The members of a Message that are known at its beginning."""
    model = document.get("model")
    return {
        "id": f"msg_{job}",
        "type": "message",
        "role": "assistant",
        "model": model if isinstance(model, str) and model else request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


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


def tool_id(call: Mapping[str, Any], job: str, number: int) -> str:
    """The id of a call; made from the job and the call's number if the engine gave none."""
    given = call.get("id")
    return given if isinstance(given, str) and given else f"toolu_{job}_{number}"


def stop_reason(request: ChatRequest, choice: Mapping[str, Any], *, refused: bool, calls: bool) -> tuple[str, str | None]:
    """Anthropic's stop_reason and stop_sequence.

    `refused`: whether the model refused in words of its own. `calls`: whether it calls tools. vLLM and SGLang say which sequence
    stopped the answer; of other engines it cannot be known, and their answers end with end_turn.
    """
    reason = str(choice.get("finish_reason") or "").strip().lower()
    if refused or reason in ("content_filter", "refusal", "safety"):
        return "refusal", None
    if reason in LENGTHS:
        return "max_tokens", None
    if calls or reason in ("tool_calls", "function_call", "tool_use"):
        return "tool_use", None
    for name in ("stop_reason", "matched_stop", "stop_sequence", "stopping_word"):
        if isinstance(stop := choice.get(name), str) and stop in request.stop_sequences:
            return "stop_sequence", stop
    return "end_turn", None


def usage_members(reported: ReportedUsage | None, billed: Usage | None) -> dict[str, int]:
    """Anthropic's counts, whose input excludes what came from the cache. An engine that counts nothing: what was billed."""
    counts = Usage(0, 0, 0) if billed is None else billed
    given, cached, output = counts.input, counts.cached, counts.output
    if reported is not None and not reported.is_empty:
        given = given if reported.input is None else reported.input
        cached = reported.cached
        output = output if reported.output is None else reported.output
    return {
        "input_tokens": max(given - cached, 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
    }


def _read_input(arguments: str) -> dict[str, Any]:
    if not arguments.strip():
        return {}
    try:
        value = load_lenient(arguments.encode(errors="surrogatepass"))
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {_INVALID: arguments}


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _part_text(value: object) -> str:
    if isinstance(value, list):
        return "".join(_part_text(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""
