"""The list of models as Anthropic's API has it."""

from __future__ import annotations

from typing import Any

import pytest

from tallystick.client.dialects.messages_models import model_entry, models_page
from tallystick.protocol.errors import BadMessage

MODELS = [{"id": name, "object": "model", "created": 0, "owned_by": "tallystick", "contextTokens": 8_192} for name in "abcde"]


def test_an_entry() -> None:
    """The market's own members stand beside Anthropic's; OpenAI's are left out."""
    assert model_entry(MODELS[0]) == {
        "type": "model",
        "id": "a",
        "display_name": "a",
        "created_at": "1970-01-01T00:00:00Z",
        "contextTokens": 8_192,
        "max_input_tokens": 8_192,
    }


@pytest.mark.parametrize(
    ("query", "ids", "more"),
    [
        ({}, "abcde", False),
        ({"limit": "2"}, "ab", True),
        ({"limit": "2", "after_id": "b"}, "cd", True),
        ({"limit": "2", "after_id": "d"}, "e", False),
        ({"after_id": "e"}, "", False),
        ({"limit": "2", "before_id": "d"}, "bc", True),
        ({"limit": "3", "before_id": "d"}, "abc", False),
        ({"before_id": "a"}, "", False),
    ],
)
def test_pages(query: dict[str, str], ids: str, more: bool) -> None:
    """A page begins after one model, or ends before one."""
    page = models_page(MODELS, query)
    assert ("".join(entry["id"] for entry in page["data"]), page["has_more"]) == (ids, more)
    assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"after_id": "z"}, {"before_id": ""}])
def test_impossible_pages(query: dict[str, Any]) -> None:
    """The error names the parameter."""
    with pytest.raises(BadMessage, match=f"^{next(iter(query))}: "):
        models_page(MODELS, query)
