"""Reads the event stream of a chat completion, as engines write it, for the dialects that translate it. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from tallystick.client.openai.answers import MAX_EVENT_BYTES
from tallystick.protocol.engine_errors import has_error
from tallystick.protocol.lenient_json import load_lenient
from tallystick.protocol.openai_wire import choices_of
from tallystick.protocol.pricing import Usage
from tallystick.protocol.sse import DONE, EventReader, MalformedAnswer, event_data
from tallystick.protocol.usage_reports import ReportedUsage, find_usage


class ChatStreamTranslator(ABC):
    """A `StreamTranslator` but for the dialect's own events, which the abstract methods add to `out`.

    What follows the end of the stream or an error is ignored. The end is `[DONE]` after a usage, or the call of `finish`.
    """

    def __init__(self) -> None:
        self.failed = False
        self._events = EventReader(MAX_EVENT_BYTES)
        self._ended = False
        self._choice: dict[str, Any] = {}
        """The first choice, without its deltas: the last value of each member."""
        self._usage: ReportedUsage | None = None
        self._usage_document: dict[str, Any] = {}
        """The event with the last usage that counts anything."""

    def feed(self, data: bytes) -> bytes:
        """See StreamTranslator."""
        out: list[bytes] = []
        if self._ended:
            return b""
        try:
            for event in self._events.feed(data):
                self._read_event(event, out)
        except MalformedAnswer as error:
            if not self._ended:  # what was read of the same bytes may have ended it
                self._fail({"message": str(error)}, out)
        return b"".join(out)

    def finish(self, billed: Usage | None) -> bytes:
        """See StreamTranslator."""
        out: list[bytes] = []
        rest = self._events.finish()
        if rest is not None:
            self._read_event(rest, out)
        self._end(billed, out)
        return b"".join(out)

    def _read_event(self, event: bytes, out: list[bytes]) -> None:
        if self._ended:
            return
        payload = event_data(event)
        if not payload:  # a comment, which keeps the connection alive
            self._keep_alive(out)
            return
        if payload == DONE:
            if self._usage is not None and not self._usage.is_empty:
                self._end(None, out)
            return
        try:
            document = load_lenient(payload)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            self._fail({"message": "the engine sent an event that is not a JSON object"}, out)
        elif has_error(document):
            self._fail(document, out)
        else:
            self._read_document(document, out)

    def _read_document(self, document: dict[str, Any], out: list[bytes]) -> None:
        self._start(document, out)
        reported = find_usage(document)
        if reported is not None:
            self._usage = reported if self._usage is None else self._usage.updated(reported)
            self._usage_document = self._usage_document if reported.is_empty else document
        for choice in choices_of(document):
            if choice.get("index", 0) == 0:
                self._choice |= {name: value for name, value in choice.items() if value is not None}
                delta = choice.get("delta") or choice.get("message")
                self._read_delta(delta if isinstance(delta, dict) else {}, choice, out)

    @abstractmethod
    def _keep_alive(self, out: list[bytes]) -> None:
        """Says that the engine is at work."""

    @abstractmethod
    def _start(self, document: Mapping[str, Any], out: list[bytes]) -> None:
        """Opens the answer if it is not open. `document`: the event that begins it; empty if there is none."""

    @abstractmethod
    def _read_delta(self, delta: dict[str, Any], choice: Mapping[str, Any], out: list[bytes]) -> None:
        """Translates a delta of the first choice. `choice`: what it stands in."""

    @abstractmethod
    def _end(self, billed: Usage | None, out: list[bytes]) -> None:
        """Completes the answer and sets `_ended`, if it did not end before. `billed`: as for `finish`."""

    @abstractmethod
    def _fail(self, document: dict[str, Any], out: list[bytes]) -> None:
        """Ends the answer with the error in this document; sets `failed` and `_ended`."""


def is_whole_call(arguments: str) -> bool:
    """Whether the arguments of a call are complete: a JSON object."""
    try:
        return isinstance(load_lenient(arguments.encode(errors="surrogatepass")), dict)
    except ValueError:
        return False
