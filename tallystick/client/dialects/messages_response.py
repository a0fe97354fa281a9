"""Translates a whole chat completion into Anthropic's Message, and the parts that its stream has in common with it. Pure.

Source: Anthropic's API reference, "Create a Message", and engines' deviations from OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tallystick.client.dialects.chat_completion import calls_of, function_of, read_completion, reasoning_of, refusal_of, text_of
from tallystick.client.dialects.messages_request import ChatRequest
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.openai_wire import LENGTHS
from tallystick.protocol.pricing import Usage
from tallystick.protocol.usage_reports import ReportedUsage, find_usage

SIGNATURE: Final = "unsigned"
"""Signature of translated reasoning, which nobody signed. Some clients drop reasoning that has none."""
_INVALID: Final = "INVALID_JSON"
"""The member that holds arguments of a tool that are no JSON object. Anthropic's documentation of streamed tools names it so."""


def to_message(request: ChatRequest, body: bytes, *, job: str, billed: Usage | None) -> bytes:
    """The Message of a chat completion. Raises BadMessage, the engine's fault, for anything else."""
    document, choice, message = read_completion(body)
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
    reason, stop = stop_reason(request, choice, refused=bool(refusal_of(message)), calls=bool(calls_of(message)))
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
