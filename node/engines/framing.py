"""The form of an engine's answer, by its bytes, and answers in the form that the client asked for. Pure.

Some engines name no content type or a wrong one. Others answer a request for a stream with one document, or the other way round.
Whole and streamed answers are converted into each other by OpenAI's and Anthropic's API references.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from node.domain.requests import EngineRequest
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.openai_wire import choices_of
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, JSON, MESSAGES, RESPONSES
from tallystick.protocol.sse import BYTE_ORDER_MARK, DONE, EVENT_STREAM

_FIELD_STARTS = b":deir"
"""First bytes of a line of an event stream: a comment, or the fields data, event, id and retry."""
_KNOWN_ROUTES = frozenset({CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES})
_REPLACED = frozenset({"role", "id", "type", "name", "finish_reason", "object", "model", "system_fingerprint"})
"""Texts of a stream that are repeated or set once, and not continued."""


def answer_form(content_type: str, start: bytes, request: EngineRequest) -> str | None:
    """The media type of an answer that begins with `start`; None if it is none that the request can have.

    The content type decides only for routes that may answer with any bytes, such as speech.
    """
    if not (request.stream or request.path in _KNOWN_ROUTES or content_type in (JSON, EVENT_STREAM)):
        return content_type
    first = start.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if first and first in b"{[":
        return JSON
    if content_type == EVENT_STREAM or (first and first in _FIELD_STARTS):
        return EVENT_STREAM
    return JSON if content_type == JSON and not request.stream else None


def as_stream(document: dict[str, Any], request: EngineRequest) -> bytes:
    """A whole answer as the event stream that the client asked for."""
    if request.path == RESPONSES:
        return b"".join(map(_named_event, _response_events(document)))
    if request.path == MESSAGES:
        return b"".join(map(_named_event, _message_events(document)))
    if request.path not in (CHAT, COMPLETIONS):
        return _event(document)
    shared = {name: value for name, value in document.items() if name not in ("choices", "usage")}
    if request.path == CHAT:
        shared["object"] = "chat.completion.chunk"
    events = [shared | {"choices": [_as_delta(choice) for choice in choices_of(document)]}]
    if document.get("usage") and not request.strip_usage:
        events.append(shared | {"choices": [], "usage": document["usage"]})
    return b"".join(map(_event, events)) + b"data: " + DONE + b"\n\n"


def as_document(documents: Iterable[dict[str, Any]], request: EngineRequest) -> dict[str, Any] | None:
    """The events of a stream as the one document that the client asked for; None if they do not make one."""
    if request.path == RESPONSES:
        responses = [event["response"] for event in documents if isinstance(event.get("response"), dict)]
        return responses[-1] if responses else None
    if request.path == MESSAGES:
        return _assemble_message(documents)
    whole: dict[str, Any] = {}
    for document in documents:
        merge_delta(whole, document | {"choices": []})
        for position, choice in enumerate(choices_of(document)):
            delta = choice.get("delta")
            message = {"message": delta} if isinstance(delta, dict) else {}
            other = {name: value for name, value in choice.items() if name != "delta"}
            merge_delta(whole, {"choices": [other | message | {"index": choice.get("index", position)}]})
        if isinstance(document.get("usage"), dict):
            whole["usage"] = document["usage"]
    if request.path == CHAT:
        whole["object"] = "chat.completion"
        for choice in choices_of(whole):
            choice["message"] = {"role": "assistant", "content": None} | choice.get("message", {})
    return whole


def merge_delta(whole: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds a delta to `whole`: texts continue, entries of lists with an `index` are merged by it, and others are appended."""
    for name, value in delta.items():
        earlier = whole.get(name)
        if value is None:
            whole.setdefault(name, None)
        elif isinstance(value, str) and isinstance(earlier, str) and name not in _REPLACED:
            whole[name] = earlier + value
        elif isinstance(value, str) and earlier and not value:
            continue
        elif isinstance(value, dict):
            whole[name] = earlier if isinstance(earlier, dict) else {}
            merge_delta(whole[name], value)
        elif isinstance(value, list):
            whole[name] = earlier if isinstance(earlier, list) else []
            _merge_list(whole[name], value)
        else:
            whole[name] = value


def _merge_list(whole: list[Any], entries: list[Any]) -> None:
    for entry in entries:
        index = entry.get("index") if isinstance(entry, dict) else None
        if index is None:
            whole.append(entry)
            continue
        known = next((old for old in whole if isinstance(old, dict) and old.get("index") == index), None)
        if known is None:
            known = {"index": index}
            whole.append(known)
        merge_delta(known, entry)


def _as_delta(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    if not isinstance(message, dict):
        return choice
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message = message | {"tool_calls": [{"index": i} | c for i, c in enumerate(calls) if isinstance(c, dict)]}
    return {name: value for name, value in choice.items() if name != "message"} | {"delta": message}


def incomplete_response(response: dict[str, Any], text: str) -> bytes:
    """The event that ends the stream of a response at its output limit. `response`: what earlier events said of it."""
    output = [
        {"type": "message", "role": "assistant", "status": "incomplete", "content": [{"type": "output_text", "text": text}]}
    ]
    details = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return _named_event({"type": "response.incomplete", "response": response | details | {"output": output}})


def _response_events(response: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "response.created", "response": response | {"status": "in_progress", "output": []}}
    for position, item in enumerate(_dicts(response.get("output"))):
        for part, content in enumerate(_dicts(item.get("content"))):
            if isinstance(content.get("text"), str):
                place = {"item_id": item.get("id"), "output_index": position, "content_index": part}
                yield {"type": "response.output_text.delta", "delta": content["text"]} | place
    last = "response.incomplete" if response.get("status") == "incomplete" else "response.completed"
    yield {"type": last, "response": response}


def _message_events(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    usage = message.get("usage")
    yield {"type": "message_start", "message": message | {"content": [], "stop_reason": None}}
    for index, block in enumerate(_dicts(message.get("content"))):
        kind = block.get("type")
        member, delta = {"thinking": ("thinking", "thinking_delta"), "tool_use": ("input", "input_json_delta")}.get(
            str(kind), ("text", "text_delta")
        )
        empty: object = {} if kind == "tool_use" else ""
        yield {"type": "content_block_start", "index": index, "content_block": block | {member: empty}}
        value = block.get(member)
        text = {"partial_json": dump_lenient(value).decode()} if kind == "tool_use" else {member: value or ""}
        yield {"type": "content_block_delta", "index": index, "delta": {"type": delta} | text}
        yield {"type": "content_block_stop", "index": index}
    end = {"stop_reason": message.get("stop_reason"), "stop_sequence": message.get("stop_sequence")}
    yield {"type": "message_delta", "delta": end, "usage": usage if isinstance(usage, dict) else {}}
    yield {"type": "message_stop"}


def _assemble_message(documents: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    message: dict[str, Any] | None = None
    for event in documents:
        if event.get("type") == "message_start" and isinstance(event.get("message"), dict):
            message = event["message"] | {"content": []}
        elif message is None:
            continue
        elif event.get("type") == "content_block_start" and isinstance(event.get("content_block"), dict):
            message["content"].append(dict(event["content_block"]))
        elif event.get("type") == "content_block_delta" and message["content"] and isinstance(event.get("delta"), dict):
            _continue_block(message["content"][-1], event["delta"])
        elif event.get("type") == "message_delta":
            merge_delta(message, {"usage": event.get("usage"), **(event.get("delta") or {})})
    for block in message["content"] if message is not None else ():
        if isinstance(block.get("input"), str):
            block["input"] = load_lenient(block["input"].encode() or b"{}")
    return message


def _continue_block(block: dict[str, Any], delta: dict[str, Any]) -> None:
    if "partial_json" in delta:
        earlier = block.get("input")
        block["input"] = (earlier if isinstance(earlier, str) else "") + str(delta["partial_json"])
    else:
        merge_delta(block, {name: value for name, value in delta.items() if name != "type"})


def _dicts(value: object) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + dump_lenient(document) + b"\n\n"


def _named_event(document: dict[str, Any]) -> bytes:
    return f"event: {document['type']}\n".encode() + _event(document)
