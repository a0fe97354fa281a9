"""Translates a whole chat completion into OpenAI's Response, and the parts that its stream has in common with it. Pure.

Ids are made from the job's id, so that no two responses of a gateway share one. Source: OpenAI's API reference, "The response
object".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tallystick.client.dialects.chat_completion import calls_of, function_of, read_completion, reasoning_of, refusal_of, text_of
from tallystick.client.dialects.responses_request import ChatRequest
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.openai_wire import LENGTHS
from tallystick.protocol.pricing import Usage
from tallystick.protocol.usage_reports import find_usage

_FILTERED: Final = frozenset({"content_filter", "refusal", "safety"})


def to_response(request: ChatRequest, body: bytes, *, job: str, billed: Usage | None) -> bytes:
    """The Response of a chat completion. Raises BadMessage, the engine's fault, for anything else."""
    document, choice, message = read_completion(body)
    output: list[dict[str, Any]] = []
    if reasoning := reasoning_of(message):
        output.append(reasoning_item(f"rs_{job}_0", reasoning, summarises=request.summarises))
    parts = []
    if text := text_of(message):
        parts.append(text_part(text, logprobs_of(choice)))
    if refusal := refusal_of(message):
        parts.append({"type": "refusal", "refusal": refusal})
    calls = calls_of(message)
    if parts or not calls:
        output.append(message_item(f"msg_{job}_{len(output)}", parts or [text_part("")]))
    for number, call in enumerate(calls):
        function = function_of(call)
        output.append(call_item(f"fc_{job}_{len(output)}", call_id(call, job, number), function["name"], function["arguments"]))
    usage = usage_members(document, billed)
    return dump_lenient(finished(response_object(request, document, job), output, choice, usage))


def response_object(request: ChatRequest, document: Mapping[str, Any], job: str) -> dict[str, Any]:
    """A response in progress, as its stream begins with it."""
    model, created = document.get("model"), document.get("created")
    return {
        "id": f"resp_{job}",
        "object": "response",
        "created_at": created if isinstance(created, int) and created > 0 else 0,
        "status": "in_progress",
        "model": model if isinstance(model, str) and model else request.model,
        "output": [],
        **request.members,
        "usage": None,
    }


def finished(
    response: Mapping[str, Any], output: list[dict[str, Any]], choice: Mapping[str, Any], usage: dict[str, Any]
) -> dict[str, Any]:
    """A response that ended: completed, or incomplete because of its limit or of a filter."""
    reason = incomplete_reason(choice)
    details = None if reason is None else {"reason": reason}
    if reason is not None and output:  # the last item is the one that was cut off
        output = [*output[:-1], output[-1] | {"status": "incomplete"}]
    status = "completed" if reason is None else "incomplete"
    return {**response, "status": status, "output": output, "incomplete_details": details, "usage": usage}


def incomplete_reason(choice: Mapping[str, Any]) -> str | None:
    """Why an answer is incomplete; None if it is complete."""
    reason = str(choice.get("finish_reason") or "").strip().lower()
    if reason in LENGTHS:
        return "max_output_tokens"
    return "content_filter" if reason in _FILTERED else None


def reasoning_item(item_id: str, text: str, *, summarises: bool, status: str = "completed") -> dict[str, Any]:
    """Reasoning, as its summary if the caller asked for one, else as content."""
    item = {"id": item_id, "type": "reasoning", "summary": [], "status": status}
    if summarises:
        return item | {"summary": [{"type": "summary_text", "text": text}]}
    return item | {"content": [{"type": "reasoning_text", "text": text}]}


def message_item(item_id: str, parts: list[dict[str, Any]], status: str = "completed") -> dict[str, Any]:
    """A message of the assistant."""
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": parts}


def text_part(text: str, logprobs: list[Any] | None = None) -> dict[str, Any]:
    """A part of a message that is text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def call_item(item_id: str, called: str, name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    """A call of a function."""
    item = {"id": item_id, "type": "function_call", "status": status}
    return item | {"call_id": called, "name": name, "arguments": arguments}


def call_id(call: Mapping[str, Any], job: str, number: int) -> str:
    """The id of a call; made from the job and the call's number if the engine gave none."""
    given = call.get("id")
    return given if isinstance(given, str) and given else f"call_{job}_{number}"


def logprobs_of(choice: Mapping[str, Any]) -> list[Any]:
    """The log-probabilities of the tokens of a choice or of an event's choice."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [
        _logprob(token) | {"top_logprobs": list(map(_logprob, _entries(token.get("top_logprobs"))))}
        for token in _entries(content)
    ]


def _logprob(token: Mapping[str, Any]) -> dict[str, Any]:
    """The probability of one token. Responses always have its bytes, which chat completions may leave out."""
    text = str(token.get("token", ""))
    listed = token.get("bytes")
    return {
        "token": text,
        "logprob": token.get("logprob"),
        "bytes": listed if isinstance(listed, list) else list(text.encode(errors="replace")),
    }


def _entries(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def usage_members(document: Mapping[str, Any], billed: Usage | None) -> dict[str, Any]:
    """The token counts of an answer. An engine that counts nothing: what was billed."""
    counts = Usage(0, 0, 0) if billed is None else billed
    given, cached, output = counts.input, counts.cached, counts.output
    reported = find_usage(document)
    if reported is not None and not reported.is_empty:
        given = given if reported.input is None else reported.input
        cached = reported.cached
        output = output if reported.output is None else reported.output
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": min(_reasoning_tokens(document), output)},
        "total_tokens": given + output,
    }


def _reasoning_tokens(document: Mapping[str, Any]) -> int:
    usage = document.get("usage")
    for holder, name in (("completion_tokens_details", "reasoning_tokens"), ("output_tokens_details", "reasoning_tokens")):
        details = usage.get(holder) if isinstance(usage, dict) else None
        count = details.get(name) if isinstance(details, dict) else None
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            return count
    return 0
