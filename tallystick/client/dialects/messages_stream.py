"""Translates the event stream of a chat completion into Anthropic's, event by event. Pure.

Anthropic's blocks follow one another, while the calls of a chat completion may be mixed. A block is sent as it comes while it is
the first one unfinished; what belongs to later blocks waits. Source: Anthropic's API reference, "Streaming Messages".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tallystick.client.dialects import messages_errors
from tallystick.client.dialects.chat_completion import calls_of, function_of, reasoning_of, refusal_of, text_of
from tallystick.client.dialects.chat_stream import ChatStreamTranslator, is_whole_call
from tallystick.client.dialects.messages_request import ChatRequest
from tallystick.client.dialects.messages_response import SIGNATURE, message_envelope, stop_reason, tool_id, usage_members
from tallystick.protocol.engine_errors import error_status
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.pricing import Usage
from tallystick.protocol.usage_reports import find_usage

_EMPTY = {"thinking": {"thinking": "", "signature": ""}, "text": {"text": ""}}
_DELTAS = {
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}


@dataclass(slots=True)
class _Block:
    """A content block. `key`: which call of a tool it is. `waiting`: what cannot be sent yet."""

    kind: str
    key: object = None
    id: str = ""
    name: str = ""
    waiting: list[str] = field(default_factory=list)
    arguments: str = ""

    @property
    def finished(self) -> bool:
        """Whether nothing can follow: text is finished once another block begins, a call once its arguments are JSON."""
        return self.kind != "tool_use" or is_whole_call(self.arguments)

    def start(self) -> dict[str, Any]:
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        return {"type": self.kind, **_EMPTY[self.kind]}


class MessageStream(ChatStreamTranslator):
    """See `StreamTranslator`."""

    def __init__(self, request: ChatRequest, *, job: str) -> None:
        super().__init__()
        self._request, self._job = request, job
        self._blocks: list[_Block] = []
        self._current = 0
        """The block that is being sent: its place among all blocks."""
        self._open = False
        self._started = self._refused = False
        self._calls = 0

    def _keep_alive(self, out: list[bytes]) -> None:
        self._emit(out, "ping", {})

    def _start(self, document: Mapping[str, Any], out: list[bytes]) -> None:
        if not self._started:
            self._started = True
            message = message_envelope(self._request, document, self._job)
            self._emit(out, "message_start", {"message": message | {"usage": usage_members(find_usage(document), None)}})
            self._emit(out, "ping", {})

    def _read_delta(self, delta: dict[str, Any], _choice: Mapping[str, Any], out: list[bytes]) -> None:
        reasoning, text = reasoning_of(delta), text_of(delta)
        if refusal := refusal_of(delta):
            self._refused, text = True, text + refusal
        if reasoning and not self._request.shows_thinking:
            self._keep_alive(out)  # the caller sees that the model works
        elif reasoning:
            self._add(self._block("thinking"), reasoning, out)
        if text:
            self._add(self._block("text"), text, out)
        for call in calls_of(delta):
            block, function = self._call_block(call), function_of(call)
            block.name = block.name or function["name"]
            self._add(block, function["arguments"], out)

    def _block(self, kind: str) -> _Block:
        """The last block if it is of this kind, else a new one."""
        if not self._blocks or self._blocks[-1].kind != kind:
            self._blocks.append(_Block(kind))
        return self._blocks[-1]

    def _call_block(self, call: Mapping[str, Any]) -> _Block:
        """The block of a call: by its index; by its id if the engine gives several calls the same index, or none."""
        index, given = call.get("index"), call.get("id")
        blocks = [block for block in self._blocks if block.kind == "tool_use"]
        if index is not None:
            blocks = [block for block in blocks if block.key == index]
        if blocks and (not given or blocks[-1].id == given):
            return blocks[-1]
        block = _Block("tool_use", index, tool_id(call, self._job, self._calls))
        self._calls += 1
        self._blocks.append(block)
        return block

    # Writing

    def _add(self, block: _Block, text: str, out: list[bytes]) -> None:
        block.waiting.append(text)
        self._send_waiting(out)

    def _send_waiting(self, out: list[bytes], *, last: bool = False) -> None:
        """Sends what may be sent: all of the current block, and of the next ones once the current one is finished."""
        while self._current < len(self._blocks):
            block = self._blocks[self._current]
            if block.kind == "tool_use" and not block.name and not last:
                return
            if not self._open:
                self._open = True
                self._emit(out, "content_block_start", {"index": self._current, "content_block": block.start()})
            kind, member = _DELTAS[block.kind]
            if text := "".join(block.waiting):
                self._emit(out, "content_block_delta", {"index": self._current, "delta": {"type": kind, member: text}})
            block.arguments += text if block.kind == "tool_use" else ""
            block.waiting.clear()
            if not last and (self._current + 1 == len(self._blocks) or not block.finished):
                return
            if block.kind == "thinking":
                signed = {"type": "signature_delta", "signature": SIGNATURE}
                self._emit(out, "content_block_delta", {"index": self._current, "delta": signed})
            self._emit(out, "content_block_stop", {"index": self._current})
            self._open = False
            self._current += 1

    def _end(self, billed: Usage | None, out: list[bytes]) -> None:
        if self._ended:
            return
        self._start({}, out)
        self._send_waiting(out, last=True)
        reason, stop = stop_reason(self._request, self._choice, refused=self._refused, calls=self._calls > 0)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        self._emit(out, "message_delta", {"delta": delta, "usage": usage_members(self._usage, billed)})
        self._emit(out, "message_stop", {})
        self._ended = True

    def _fail(self, document: dict[str, Any], out: list[bytes]) -> None:
        self.failed = self._ended = True
        out.append(messages_errors.render_engine_event(document, error_status(document) or 502))

    @staticmethod
    def _emit(out: list[bytes], name: str, members: dict[str, Any]) -> None:
        out.append(b"event: " + name.encode() + b"\ndata: " + dump_lenient({"type": name} | members) + b"\n\n")
