"""Events of a stream that equal an earlier one but for their text, recognised by their bytes, without a JSON parser. Pure.

An engine's events differ in `choices[0].delta.content` alone, most of the time. A JSON string without quotes, backslashes and
control characters can be replaced by another such string without changing anything else that a parser would find.
"""

from __future__ import annotations

import re

from tallystick.protocol.openai_wire import AnswerDocument

_CONTENT = re.compile(rb'"content": ?"')
"""The member before its text. Within a string its quotes would be escaped, so it is always a member."""
_PLAIN = re.compile(rb'[^"\\\x00-\x1f\x7f]+')
_PATIENCE = 16
"""Events that are learnt in a row without being repeated, before an engine's events are taken to differ otherwise."""


class RepeatedEvents:
    """The form of the last event that was parsed: its bytes before and after the text, as it came and as it is shown."""

    def __init__(self) -> None:
        self._before, self._after = b"", b""
        self._shown_before, self._shown_after = b"", b""
        self._other_bytes = 0
        """Bytes of text in the event's other members."""
        self._left = _PATIENCE

    def learn(self, event: bytes, shown: bytes, document: AnswerDocument) -> None:
        """Takes the form of an event that a parser has read as `document`, and that the client gets as `shown`."""
        self._before = b""
        if self._left <= 0:
            return
        self._left -= 1
        text = _only_text(document)
        parts, shown_parts = _split(event, text), _split(shown, text)
        if parts is not None and shown_parts is not None:
            (self._before, self._after), (self._shown_before, self._shown_after) = parts, shown_parts
            self._other_bytes = document.text_bytes - len(text)

    def read(self, event: bytes) -> tuple[bytes, int] | None:
        """The event as the client gets it, and its bytes of text; None if a parser must read it."""
        before, after = self._before, self._after
        if not before or not event.startswith(before) or not event.endswith(after):
            return None
        text = event[len(before) : len(event) - len(after)]
        if _PLAIN.fullmatch(text) is None or not (text.isascii() or _is_utf8(text)):
            return None
        self._left = _PATIENCE
        return self._shown_before + text + self._shown_after, self._other_bytes + len(text)


def _only_text(document: AnswerDocument) -> bytes:
    """The text of a document that says nothing but its only choice's delta; empty for any other."""
    if document.finish_reason is not None or document.usage is not None or document.is_last:
        return b""
    choices = document.members.get("choices")
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    delta = choice.get("delta") if isinstance(choice, dict) else None
    text = delta.get("content") if isinstance(delta, dict) else None
    return text.encode(errors="replace") if isinstance(text, str) else b""


def _split(event: bytes, text: bytes) -> tuple[bytes, bytes] | None:
    """What is before and after the text in an event; None if it is not the only `content`, or is written in another way."""
    places = [match.end() for match in _CONTENT.finditer(event)]
    if len(places) != 1 or _PLAIN.fullmatch(text) is None:
        return None
    start, end = places[0], places[0] + len(text)
    if event[start:end] != text or event[end : end + 1] != b'"':
        return None
    return event[:start], event[end:]


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
