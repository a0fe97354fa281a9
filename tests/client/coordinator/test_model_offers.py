"""A model on offer, as a coordinator lists it."""

from __future__ import annotations

from typing import Any

import pytest

from tallystick.client.coordinator.model_offers import ModelOffer
from tallystick.protocol.errors import BadMessage

ENTRY: dict[str, Any] = {
    "id": "m",
    "providers": 2,
    "live": 1,
    "inputPrice": "5",
    "cachedInputPrice": "5",
    "outputPrice": "7",
    "contextTokens": 8_192,
    "maxOutputTokens": 4_096,
}


def test_what_it_sells() -> None:
    """Routes, features and waiting jobs pass on; a coordinator that lists none is understood."""
    listed = {"tokensPerSecond": 0, "firstTokenMs": 0, "routes": ["/v1/chat/completions"], "features": ["tools"], "waiting": 3}
    ratings = {"integrity": 88.2, "audits": 50, "availability": 93}
    listed = listed | ratings
    assert ModelOffer.from_json(ENTRY | listed).to_json() == ENTRY | listed
    assert (ModelOffer.from_json(ENTRY).routes, ModelOffer.from_json(ENTRY).waiting) == ((), 0)


@pytest.mark.parametrize("member", ["routes", "features"])
@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, ["x"] * 65])
def test_malformed_names(member: str, value: Any) -> None:
    """The error names the member."""
    with pytest.raises(BadMessage, match=f"models.{member}"):
        ModelOffer.from_json(ENTRY | {member: value})


@pytest.mark.parametrize("member", ["integrity", "availability"])
@pytest.mark.parametrize("value", ["x", -1, 100.1, True, [1], {}])
def test_malformed_ratings(member: str, value: Any) -> None:
    """The error names the member; a coordinator that does not rate is understood."""
    with pytest.raises(BadMessage, match=f"models.{member}"):
        ModelOffer.from_json(ENTRY | {member: value})
    assert (ModelOffer.from_json(ENTRY).integrity, ModelOffer.from_json(ENTRY).audits) == (None, 0)
