"""The text in an event stream of OpenAI's, as it comes. Pure."""

from __future__ import annotations

from typing import Any

from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.wire import loads

MAX_EVENT_BYTES = 16 * 1024 * 1024


class Events:
    """Feed it an event stream's bytes, cut anywhere; it gives the data of each event but the last mark. Raises BadMessage."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that a piece completes, in order."""
        self._rest += piece
        if b"\n" not in piece:
            if len(self._rest) > MAX_EVENT_BYTES:
                raise BadMessage(f"answer: an event of more than {MAX_EVENT_BYTES} bytes", fault=Fault.ENGINE)
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return [data for line in lines if (data := self._line(bytes(line).removesuffix(b"\r")))]

    def _line(self, line: bytes) -> bytes:
        """The data of the event that a line ends; none otherwise."""
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        if line or not self._data:
            return b""
        data = b"\n".join(self._data)
        self._data = []
        return b"" if data == b"[DONE]" else data


class Deltas:
    """Feed it the stream's bytes, cut anywhere; it gives the text of the first answer: of a chat, a completion or a response.

    Tool calls and reasoning are no text. Raises BadMessage for what is no such stream, Unavailable for an error event in it: the
    engine's fault, both.
    """

    def __init__(self) -> None:
        self._events = Events()

    def feed(self, piece: bytes) -> list[str]:
        """The texts that a piece completes, in order."""
        return [text for data in self._events.feed(piece) if (text := _text(data))]


def _text(data: bytes) -> str:
    try:
        event = loads(data, "answer")
    except BadMessage as error:
        error.fault = Fault.ENGINE
        raise
    if not isinstance(event, dict):
        return ""
    if (fault := event.get("error")) is not None:
        told = fault.get("message", fault) if isinstance(fault, dict) else fault
        raise Unavailable(Code.ENGINE_UNAVAILABLE, f"the engine broke off: {str(told)[:2000]}", fault=Fault.ENGINE)
    if event.get("type") == "response.output_text.delta":
        return _said(event.get("delta"))
    choices = event.get("choices")
    return "".join(_delta(choice) for choice in choices if isinstance(choice, dict)) if isinstance(choices, list) else ""


def _delta(choice: dict[str, Any]) -> str:
    if choice.get("index", 0) != 0:
        return ""
    delta = choice.get("delta")
    return _said(delta.get("content") if isinstance(delta, dict) else choice.get("text"))


def _said(text: object) -> str:
    return text if isinstance(text, str) else ""
