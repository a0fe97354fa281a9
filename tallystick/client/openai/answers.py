"""Reads the text of an engine's answers, whole or as it streams. Pure."""

from __future__ import annotations

from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.lenient_json import load_lenient
from tallystick.protocol.openai_wire import completion_text, delta_text
from tallystick.protocol.sse import DONE, EventReader, event_data

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""The largest event of a stream that the client reads."""


class TextDeltas:
    """Extracts the text of the first choice from the bytes of an event stream: of a chat, a completion or a response.

    Tool calls and reasoning are not part of the text.
    """

    def __init__(self) -> None:
        self._events = EventReader(MAX_EVENT_BYTES)
        self._half = ""

    def feed(self, data: bytes) -> list[str]:
        """Returns the texts of the events that `data` completes, in order.

        Raises BadMessage for a malformed event and Unavailable for an error event, both with the engine's fault.
        """
        events = (event_data(event) for event in self._events.feed(data))
        deltas = (_read_delta(payload) for payload in events if payload and payload != DONE)
        return [text for delta in deltas if delta and (text := self._join_halves(delta))]

    def _join_halves(self, delta: str) -> str:
        """The delta with whole characters: the first half of a UTF-16 pair at its end waits for the second half."""
        text, self._half = self._half + delta, ""
        if "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return join_surrogates(text)


def join_surrogates(text: str) -> str:
    """The text with each pair of UTF-16 surrogates as the character that it stands for, and a lone one as U+FFFD."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_events(body: bytes) -> list[bytes]:
    """The data of each event in a whole event stream, without the event that ends it. Raises MalformedAnswer."""
    events = map(event_data, EventReader(MAX_EVENT_BYTES).feed(body + b"\n\n"))
    return [payload for payload in events if payload and payload != DONE]


def read_text(body: bytes) -> str:
    """The text of the first choice of an answer that was not streamed. Raises BadMessage if it is no completion."""
    text = completion_text(_load(body))
    if text is None:
        raise BadMessage("answer: expected a completion with a text in its first choice", fault=Fault.ENGINE)
    return join_surrogates(text)


def _load(data: bytes) -> object:
    try:
        return load_lenient(data)
    except ValueError:
        raise BadMessage("answer: not JSON", fault=Fault.ENGINE) from None


def _read_delta(payload: bytes) -> str:
    document = _load(payload)
    if not isinstance(document, dict):
        return ""
    if (reported := document.get("error")) is not None:
        message = reported.get("message", reported) if isinstance(reported, dict) else reported
        raise Unavailable(
            Code.ENGINE_UNAVAILABLE, f"the engine ended the stream with an error: {str(message)[:2000]}", fault=Fault.ENGINE
        )
    return delta_text(document)
