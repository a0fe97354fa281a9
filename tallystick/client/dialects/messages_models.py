"""The list of models as Anthropic's API has it. Pure. Source: Anthropic's API reference, "List Models" and "Get a Model"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tallystick.protocol.errors import BadMessage

DEFAULT_PAGE: Final = 20
MAX_PAGE: Final = 1_000
_UNKNOWN_DATE: Final = "1970-01-01T00:00:00Z"
"""The time of creation of every model, which Anthropic's reference allows if the date of release is unknown."""


def model_entry(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model of this market, with the market's members beside Anthropic's."""
    market = {name: value for name, value in model.items() if name not in ("object", "created", "owned_by")}
    entry = {"type": "model", "id": model["id"], "display_name": model["id"], "created_at": _UNKNOWN_DATE}
    limits = {"max_input_tokens": model.get("contextTokens"), "max_tokens": model.get("maxOutputTokens")}
    return market | entry | {name: value for name, value in limits.items() if value is not None}


def models_page(models: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The page of models that a query's `limit`, `after_id` and `before_id` ask for. Raises BadMessage."""
    limit = _read_limit(query.get("limit"))
    ids = [model["id"] for model in models]
    first, last = 0, len(ids)
    if (after := query.get("after_id")) is not None:
        first = _place(ids, after, "after_id") + 1
    if (before := query.get("before_id")) is not None:
        last = _place(ids, before, "before_id")
    page = models[first:last]
    has_more = len(page) > limit
    page = page[-limit:] if before is not None else page[:limit]
    data = [model_entry(model) for model in page]
    ends = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": has_more, "first_id": ends[0], "last_id": ends[1]}


def _read_limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_PAGE
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_PAGE):
        raise BadMessage(f"limit: expected 1 to {MAX_PAGE}, got {text[:20]!r}")
    return int(text)


def _place(ids: Sequence[str], wanted: str, name: str) -> int:
    if wanted not in ids:
        raise BadMessage(f"{name}: expected the id of a model on offer, got {wanted[:100]!r}")
    return ids.index(wanted)
