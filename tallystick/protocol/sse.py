"""Server-sent events (WHATWG HTML, section 9.2) as OpenAI-compatible servers stream them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tallystick.protocol.errors import BadMessage, Fault

EVENT_STREAM: Final = "text/event-stream"
"""The media type of an event stream."""
DONE: Final = b"[DONE]"
"""The data of the event that ends OpenAI's streams."""
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""The mark that may precede a stream, and is no part of its first line."""


class MalformedAnswer(BadMessage):
    """An engine's answer breaks the rules of its format. The engine's fault.

    The text names the rule and never quotes the answer, because it may travel unsealed.
    """

    fault = Fault.ENGINE


class EventReader:
    """Splits a byte stream into events. Holds at most one unfinished event, of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self._ends_with_cr = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields each event that `data` completes, with LF line ends and its blank line.

        Raises MalformedAnswer for an event of more than `limit` bytes, after yielding the events before it.
        """
        data = self._normalise(data)
        if self._buffer:
            scanned = len(self._buffer) - 1
            self._buffer += data
            if self._buffer.find(b"\n\n", scanned) < 0:
                self._check_size(self._buffer)
                return
            data = bytes(self._buffer)
        *events, rest = data.split(b"\n\n")
        self._buffer = bytearray(rest)
        for event in events:
            self._check_size(event)
            if event.strip(b"\n"):
                yield event + b"\n\n"
        self._check_size(rest)

    def finish(self) -> bytes | None:
        """The event that the end of the stream completes, with the blank line that it lacks; None if there is none."""
        rest = bytes(self._buffer).strip(b"\n")
        self._buffer.clear()
        return rest + b"\n\n" if rest.strip() else None

    def _normalise(self, data: bytes) -> bytes:
        """`data` with LF line ends. A CR at its end is held back, because it may be the first half of a CRLF."""
        if self._ends_with_cr:
            data = b"\r" + data
        self._ends_with_cr = data.endswith(b"\r")
        if b"\r" not in data:
            return data
        return data[: len(data) - self._ends_with_cr].replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _check_size(self, event: bytes | bytearray) -> None:
        if len(event) > self._limit:
            raise MalformedAnswer(f"event: expected at most {self._limit} bytes, got {len(event)}")


def event_name(event: bytes) -> str:
    """The name of an event, from its `event` line; empty if it has none."""
    names = [line[6:].strip() for line in event.splitlines() if line.startswith(b"event:")] if b"event:" in event else ()
    return names[-1].decode(errors="replace") if names else ""


def event_data(event: bytes) -> bytes | None:
    """The data of an event: its `data` lines, joined by LF. None for an event without any, such as a comment."""
    event = event.removeprefix(BYTE_ORDER_MARK)
    if event.startswith(b"data:") and event.count(b"\n") == 2:
        return event[5:].strip()
    lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
