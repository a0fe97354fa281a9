"""The query of a list: `limit` and `order`. Pure. Source: OpenAI's API reference."""

from __future__ import annotations

from collections.abc import Mapping

from tallystick.protocol.errors import BadMessage


def read_limit(query: Mapping[str, str], default: int, most: int) -> int:
    """The most objects of a page. Raises BadMessage."""
    text = query.get("limit", str(default))
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not 1 <= limit <= most:
        raise BadMessage(f"limit: expected 1 to {most}, got {text[:20]!r}")
    return limit


def read_order(query: Mapping[str, str]) -> str:
    """Whether the newest objects come first ("desc", the default) or last ("asc"). Raises BadMessage."""
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadMessage(f"order: expected asc or desc, got {order[:20]!r}")
    return order
