"""Readers of JSON members that check the type; each error names the member. Pure."""

from __future__ import annotations

from typing import Any

from tallystick.protocol.errors import BadMessage


def read_members(raw: object, member: str, *names: str) -> list[Any]:
    """The named members of an object, in this order; other members are ignored. Raises BadMessage."""
    if not isinstance(raw, dict) or not raw.keys() >= set(names):
        raise BadMessage(f"{member}: expected a JSON object with {', '.join(names)}")
    return [raw[name] for name in names]


def read_text(raw: object, member: str, limit: int = 256) -> str:
    """A string of at most `limit` characters. Raises BadMessage."""
    if not isinstance(raw, str) or len(raw) > limit:
        raise BadMessage(f"{member}: expected a string of at most {limit} characters")
    return raw


def read_items(raw: object, member: str, limit: int) -> list[Any]:
    """A list of at most `limit` items. Raises BadMessage."""
    if not isinstance(raw, list) or len(raw) > limit:
        raise BadMessage(f"{member}: expected a list of at most {limit} items")
    return raw


def read_count(raw: object, member: str, low: int = 0, high: int = (1 << 32) - 1) -> int:
    """An integer from `low` to `high`, both included. Raises BadMessage."""
    if isinstance(raw, bool) or not isinstance(raw, int) or not low <= raw <= high:
        raise BadMessage(f"{member}: expected a whole number from {low} to {high}")
    return raw


def read_flag(raw: object, member: str) -> bool:
    """Reads true or false. Raises BadMessage."""
    if not isinstance(raw, bool):
        raise BadMessage(f"{member}: expected true or false, got {str(raw)[:80]!r}")
    return raw


def read_content_type(raw: object, member: str) -> str:
    """A content type of printable ASCII, which cannot break the HTTP header that it is put into. Raises BadMessage."""
    text = read_text(raw, member)
    if not (text.isascii() and text.isprintable()):
        raise BadMessage(f"{member}: expected printable ASCII")
    return text
