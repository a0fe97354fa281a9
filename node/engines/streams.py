"""Event streams of engines: which of their bytes are output, what they report, and whether they are complete. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from node.domain.requests import EngineRequest
from node.engines.framing import incomplete_response
from node.engines.logprobs import Changes, is_changed, rewrite, take_logprobs
from node.engines.repeated_events import RepeatedEvents
from node.ports import ResponseEnd, ResponsePart
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.openai_wire import (
    AnswerDocument,
    EngineError,
    choices_of,
    delta_text,
    read_completion,
    read_other_answer,
)
from tallystick.protocol.routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from tallystick.protocol.sse import DONE, EventReader, event_data, event_name
from tallystick.protocol.usage_reports import ReportedUsage


class EngineBroken(Exception):
    """A fault of the engine. The text completes "the engine answered with" and quotes nothing of the answer.

    `words`: the engine's own reason, which must travel sealed only. `permanent`: whether it would answer so again.
    """

    def __init__(self, text: str, words: str = "", *, permanent: bool = False) -> None:
        super().__init__(text)
        self.words, self.permanent = words, permanent


class _EventBatch:
    """Collects the events of one read into one ResponsePart."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.has_output = False
        self.text = 0
        self.usage: ReportedUsage | None = None

    def add(self, event: bytes, document: AnswerDocument) -> None:
        self.data += event
        if document.has_output or document.finish_reason:
            self.has_output = True
        self.text += document.text_bytes

    def add_text(self, event: bytes, text_bytes: int) -> None:
        self.data += event
        self.has_output = True
        self.text += text_bytes

    def piece(self) -> ResponsePart:
        return ResponsePart(bytes(self.data), self.has_output, self.text, self.usage)


class StreamReader:
    """Reads a stream's bytes into the events of an engine's answer, and knows whether the stream is complete.

    `has_output`: whether any output was read. `ended`: whether the stream ended with [DONE].
    """

    def __init__(self, request: EngineRequest, max_event_bytes: int) -> None:
        self._request = request
        self._events = EventReader(max_event_bytes)
        plain = request.is_completion and request.cut_after is None and not request.logprobs
        self._repeated = RepeatedEvents() if plain else None
        self._read = read_completion if request.is_completion else read_other_answer
        self._finish: str | None = None
        self._usage: ReportedUsage | None = None
        self._is_last = False
        self._tail = b""
        self._output_events = 0
        self._response: dict[str, Any] = {}
        self._texts: list[str] = []
        self.has_output = self.ended = False

    def feed(self, data: bytes) -> ResponsePart | None:
        """The part of the events that `data` completes; None if it completes none. Raises MalformedAnswer and EngineBroken."""
        batch = _EventBatch()
        read_repeated = self._repeated.read if self._repeated is not None else _read_nothing
        for event in self._events.feed(data):
            known = read_repeated(event)
            if known is not None:
                batch.add_text(*known)
                batch.usage, self.has_output = self._usage, True
                continue
            self._add(event, batch)
            if self.ended:
                break
        return batch.piece() if batch.data else None

    def finish(self) -> Iterator[ResponsePart | ResponseEnd]:
        """Yields what remains at the end of the stream, and the end. Raises MalformedAnswer and EngineBroken."""
        batch = _EventBatch()
        rest = None if self.ended else self._events.finish()
        if rest is not None:
            self._add(rest, batch)
            if not self.ended and event_data(rest) is None and not rest.startswith(b":"):
                raise EngineBroken("a stream that was cut off")
        self._check_end()
        if batch.data:
            yield batch.piece()
        yield ResponseEnd(self._tail, usage=self._usage, truncated=self._finish == "length")

    def _add(self, event: bytes, batch: _EventBatch) -> None:
        payload = event_data(event)
        if payload == DONE:
            self.ended, self._tail = True, event
            self._check_end()
            return
        if not payload:
            batch.data += event
            return
        document = self._read(payload)
        if event_name(event) == "error":
            raise EngineError(document.members)
        if self._request.cut_after is not None:
            if self._is_beyond_order(document):
                self._cut(document.members, batch)
                return
            self._texts.append(delta_text(document.members))
            response = document.members.get("response")
            self._response = response if isinstance(response, dict) else self._response
        if document.finish_reason or self._finish is None:
            self._finish = document.finish_reason
        if document.usage is not None:
            self._usage = document.usage if self._usage is None else self._usage.updated(document.usage)
        self._is_last = self._is_last or document.is_last
        changes = take_logprobs(document.members, self._request.logprobs, self._request.rows) if self._request.logprobs else ()
        if not (document.usage_only and self._request.strip_usage):
            self._show(event, _render(event, document, self._request, changes), document, batch)
        batch.usage = self._usage
        self.has_output = self.has_output or batch.has_output

    def _show(self, event: bytes, shown: bytes, document: AnswerDocument, batch: _EventBatch) -> None:
        batch.add(shown, document)
        if self._repeated is not None:
            self._repeated.learn(event, shown, document)

    def _is_beyond_order(self, document: AnswerDocument) -> bool:
        """Whether this is output that nobody pays for. Each event with text is at least one token."""
        self._output_events += document.text_bytes > 0
        limit = self._request.cut_after
        return limit is not None and not document.finish_reason and self._output_events > limit

    def _cut(self, members: dict[str, Any], batch: _EventBatch) -> None:
        """Ends the stream before this event as its engine does at an output limit, with the finish reason "length"."""
        if self._request.path == RESPONSES:
            event, self._is_last = incomplete_response(self._response, "".join(self._texts)), True
        else:
            part: dict[str, Any] = {"delta": {}} if self._request.path == CHAT else {"text": ""}
            end = {**part, "logprobs": None, "finish_reason": "length"}
            choices = [end | {"index": choice.get("index", 0)} for choice in choices_of(members)]
            event = b"data: " + dump_lenient(members | {"choices": choices, "usage": None}) + b"\n\n"
            self._tail = b"data: " + DONE + b"\n\n"
        last = self._read(event_data(event) or b"")
        batch.add(_render(event, last, self._request), last)
        known = self._usage or ReportedUsage(None, 0, None)
        batch.usage = self._usage = ReportedUsage(known.input, known.cached, self._request.cut_after)
        self._finish, self.ended = "length", True

    def _check_end(self) -> None:
        """Raises EngineBroken if the stream may not end here.

        [DONE] ends a stream that never had a finish reason; one whose finish reason was an empty text was cut off.
        """
        if self._request.path in (RESPONSES, MESSAGES):
            complete = self._is_last
        elif self._finish:
            complete = True
        else:
            without_reason = self.ended or self._request.path not in (CHAT, COMPLETIONS)
            complete = self.has_output and without_reason and self._finish is None
        if not complete:
            raise EngineBroken("a stream that was cut off" if self.has_output else "a stream without an answer")


def _read_nothing(_event: bytes) -> None:
    return None


def _render(event: bytes, document: AnswerDocument, request: EngineRequest, changes: Changes = ()) -> bytes:
    """The event as the client gets it: unchanged but for the model's name, and for log-probabilities that it did not ask for."""
    if request.rename is None and not changes:
        return event
    if not rename_model(document.members, request):
        if event.count(b"\n") == 2:  # one line of data
            return rewrite(event, document.members, changes)
        if not is_changed(changes):
            return event
    named = b"".join(line + b"\n" for line in event.splitlines() if line.startswith(b"event:"))
    return named + b"data: " + dump_lenient(document.members) + b"\n\n"


def rename_model(document: dict[str, Any], request: EngineRequest) -> bool:
    """Replaces the engine's name of the model by the name that it is sold under. Returns whether the document changed."""
    changed = False
    if request.rename is None:
        return changed
    for part in (document, document.get("response"), document.get("message")):
        named = isinstance(part, dict) and ("model" in part or (part is document and request.is_completion))
        if isinstance(part, dict) and named and part.get("model") != request.rename[1]:
            part["model"] = request.rename[1]
            changed = True
    return changed
