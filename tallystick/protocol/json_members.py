"""Reading JSON members, each of the type that it must have; the error names the member. Pure."""

from __future__ import annotations

from typing import Any

from tallystick.protocol.errors import BadMessage


def read_members(raw: object, what: str, *names: str) -> list[Any]:
    """These members of an object, in this order. Raises BadMessage."""
    if not isinstance(raw, dict) or not raw.keys() >= set(names):
        raise BadMessage(f"{what}: expected a JSON object with {', '.join(names)}")
    return [raw[name] for name in names]


def read_text(raw: object, what: str, limit: int = 256) -> str:
    """A text of at most so many characters. Raises BadMessage."""
    if not isinstance(raw, str) or len(raw) > limit:
        raise BadMessage(f"{what}: expected a string of at most {limit} characters")
    return raw


def read_items(raw: object, what: str, limit: int) -> list[Any]:
    """A list of at most so many items. Raises BadMessage."""
    if not isinstance(raw, list) or len(raw) > limit:
        raise BadMessage(f"{what}: expected a list of at most {limit} items")
    return raw


def read_count(raw: object, what: str, low: int = 0, high: int = (1 << 32) - 1) -> int:
    """A whole number in this range. Raises BadMessage."""
    if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
        raise BadMessage(f"{what}: expected a whole number from {low} to {high}")
    return raw


def read_content_type(raw: object, what: str) -> str:
    """What goes into an HTTP header at the other end: nothing that could end the header there."""
    text = read_text(raw, what)
    if not (text.isascii() and text.isprintable()):
        raise BadMessage(f"{what}: expected printable ASCII")
    return text
