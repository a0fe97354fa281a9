"""Translates the event stream of a chat completion into that of a Response, event by event. Pure.

The items of a response follow one another, while the calls of a chat completion may be mixed. An item is sent as it comes while
it is the first one unfinished; what belongs to later items waits. Source: OpenAI's API reference, "Streaming events" of
responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tallystick.client.dialects.chat_completion import calls_of, function_of, reasoning_of, refusal_of, text_of
from tallystick.client.dialects.chat_stream import ChatStreamTranslator, is_whole_call
from tallystick.client.dialects.messages_errors import message_of
from tallystick.client.dialects.responses_request import ChatRequest
from tallystick.client.dialects.responses_response import (
    call_id,
    call_item,
    finished,
    logprobs_of,
    message_item,
    reasoning_item,
    response_object,
    text_part,
    usage_members,
)
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.pricing import Usage

_PREFIXES = {"reasoning": "rs", "text": "msg", "refusal": "msg", "call": "fc"}


@dataclass(slots=True)
class _Item:
    """An item of the output. `key`: which call of a function it is. `waiting`: what cannot be sent yet."""

    kind: str
    id: str
    key: object = None
    call_id: str = ""
    name: str = ""
    waiting: list[str] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    new_logprobs: list[Any] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing can follow: text is finished once another item begins, a call once its arguments are JSON."""
        return self.kind != "call" or is_whole_call(self.text)

    def part(self) -> dict[str, Any]:
        """The part that holds the text so far."""
        return {"type": "refusal", "refusal": self.text} if self.kind == "refusal" else text_part(self.text, self.logprobs)

    def item(self, *, summarises: bool, status: str = "completed") -> dict[str, Any]:
        """The item as it is so far. One that only began has no parts yet."""
        begun = status == "in_progress"
        if self.kind == "call":
            return call_item(self.id, self.call_id, self.name, self.text, status)
        if self.kind == "reasoning":
            item = reasoning_item(self.id, self.text, summarises=summarises, status=status)
            return item | ({"summary": []} if summarises else {"content": []}) if begun else item
        return message_item(self.id, [] if begun else [self.part()], status)


class ResponseStream(ChatStreamTranslator):
    """See `StreamTranslator`."""

    def __init__(self, request: ChatRequest, *, job: str) -> None:
        super().__init__()
        self._request, self._job = request, job
        self._items: list[_Item] = []
        self._current = 0
        """The item that is being sent: its place among all items."""
        self._open = False
        self._response: dict[str, Any] = {}
        self._sequence = 0

    def _keep_alive(self, out: list[bytes]) -> None:
        out.append(b": keep-alive\n\n")

    def _start(self, document: Mapping[str, Any], out: list[bytes]) -> None:
        if not self._response:
            self._response = response_object(self._request, document, self._job)
            self._emit(out, "response.created", {"response": self._response})
            self._emit(out, "response.in_progress", {"response": self._response})

    def _read_delta(self, delta: dict[str, Any], choice: Mapping[str, Any], out: list[bytes]) -> None:
        logprobs = logprobs_of(choice)
        for kind, text in (("reasoning", reasoning_of(delta)), ("text", text_of(delta)), ("refusal", refusal_of(delta))):
            if text:
                item = self._text_item(kind)
                item.new_logprobs += logprobs if kind == "text" else []
                item.waiting.append(text)
                self._send_waiting(out)
        for call in calls_of(delta):
            item, function = self._call(call), function_of(call)
            item.name = item.name or function["name"]
            item.waiting.append(function["arguments"])
            self._send_waiting(out)

    def _new(self, kind: str, **members: Any) -> _Item:
        item = _Item(kind, f"{_PREFIXES[kind]}_{self._job}_{len(self._items)}", **members)
        self._items.append(item)
        return item

    def _text_item(self, kind: str) -> _Item:
        """The last item if it is of this kind, else a new one."""
        return self._items[-1] if self._items and self._items[-1].kind == kind else self._new(kind)

    def _call(self, call: Mapping[str, Any]) -> _Item:
        """The item of a call: by its index; by its id if the engine gives several calls the same index, or none."""
        index, given = call.get("index"), call.get("id")
        calls = [item for item in self._items if item.kind == "call"]
        known = calls if index is None else [item for item in calls if item.key == index]
        if known and (not given or known[-1].call_id == given):
            return known[-1]
        return self._new("call", key=index, call_id=call_id(call, self._job, len(calls)))

    # Writing

    def _send_waiting(self, out: list[bytes], *, last: bool = False) -> None:
        """Sends what may be sent: all of the current item, and of the next ones once the current one is finished."""
        while self._current < len(self._items):
            item = self._items[self._current]
            if item.kind == "call" and not item.name and not last:
                return
            if not self._open:
                self._open = True
                self._begin(item, out)
            if text := "".join(item.waiting):
                item.text += text
                self._delta(item, text, out)
            item.waiting.clear()
            if not last and (self._current + 1 == len(self._items) or not item.finished):
                return
            self._complete(item, out, cut=last and self._current + 1 == len(self._items))
            self._open = False
            self._current += 1

    def _begin(self, item: _Item, out: list[bytes]) -> None:
        added = item.item(summarises=self._request.summarises, status="in_progress")
        self._emit(out, "response.output_item.added", {"output_index": self._current, "item": added})
        if item.kind == "reasoning" and self._request.summarises:
            part = {"type": "summary_text", "text": ""}
            self._emit(out, "response.reasoning_summary_part.added", self._place(item, "summary_index") | {"part": part})
        elif item.kind != "call":
            part = {"type": "reasoning_text", "text": ""} if item.kind == "reasoning" else item.part()
            self._emit(out, "response.content_part.added", self._place(item, "content_index") | {"part": part})

    def _delta(self, item: _Item, text: str, out: list[bytes]) -> None:
        name, index = self._event_of(item)
        members = self._place(item, index) | {"delta": text}
        if item.kind == "text":
            members["logprobs"] = item.new_logprobs
            item.logprobs += item.new_logprobs
            item.new_logprobs = []
        self._emit(out, f"response.{name}.delta", members)

    def _complete(self, item: _Item, out: list[bytes], *, cut: bool) -> None:
        name, index = self._event_of(item)
        place, member = self._place(item, index), {"call": "arguments", "refusal": "refusal"}.get(item.kind, "text")
        done = place | {member: item.text}
        done |= {"logprobs": item.logprobs} if item.kind == "text" else {"name": item.name} if item.kind == "call" else {}
        self._emit(out, f"response.{name}.done", done)
        if item.kind == "reasoning":
            if self._request.summarises:
                part = {"type": "summary_text", "text": item.text}
                self._emit(out, "response.reasoning_summary_part.done", place | {"part": part})
            else:
                self._emit(out, "response.content_part.done", place | {"part": {"type": "reasoning_text", "text": item.text}})
        elif item.kind != "call":
            self._emit(out, "response.content_part.done", place | {"part": item.part()})
        shown = item.item(summarises=self._request.summarises)
        if cut and finished({}, [], self._choice, {})["status"] == "incomplete":
            shown["status"] = "incomplete"
        self._emit(out, "response.output_item.done", {"output_index": self._current, "item": shown})

    def _event_of(self, item: _Item) -> tuple[str, str | None]:
        """The name of an item's events, and the member that says which of its parts they are about."""
        if item.kind == "call":
            return "function_call_arguments", None
        if item.kind == "reasoning":
            return (
                ("reasoning_summary_text", "summary_index") if self._request.summarises else ("reasoning_text", "content_index")
            )
        return ("refusal" if item.kind == "refusal" else "output_text"), "content_index"

    def _place(self, item: _Item, index: str | None) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": item.id, "output_index": self._current}
        return place if index is None else place | {index: 0}

    def _end(self, billed: Usage | None, out: list[bytes]) -> None:
        if self._ended:
            return
        self._start({}, out)
        if not self._items:
            self._new("text")
        self._send_waiting(out, last=True)
        output = [item.item(summarises=self._request.summarises) for item in self._items]
        response = finished(self._response, output, self._choice, usage_members(self._usage_document, billed))
        self._emit(out, f"response.{response['status']}", {"response": response})
        self._ended = True

    def _fail(self, document: dict[str, Any], out: list[bytes]) -> None:
        self._start({}, out)
        self.failed = self._ended = True
        error = {"code": "server_error", "message": message_of(document)}
        output = [item.item(summarises=self._request.summarises) for item in self._items[: self._current]]
        self._emit(out, "response.failed", {"response": self._response | {"status": "failed", "error": error, "output": output}})

    def _emit(self, out: list[bytes], name: str, members: dict[str, Any]) -> None:
        document = {"type": name, "sequence_number": self._sequence} | members
        self._sequence += 1
        out.append(b"event: " + name.encode() + b"\ndata: " + dump_lenient(document) + b"\n\n")
