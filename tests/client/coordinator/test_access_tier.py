"""The access tier that a coordinator names: read from whatever it sends, and bounded."""

from __future__ import annotations

import pytest

from tallystick.client.coordinator.access_tier import MAX_TEXT, AccessTier


def test_a_tier() -> None:
    """Its name, its refusal and what lifts it; no refusal is null."""
    raw: dict[str, object] = {"name": "new", "refusal": None, "next": "tier 'known' needs 2 dollars", "models": []}
    tier = AccessTier.from_json(raw)
    assert tier == AccessTier("new", "", "tier 'known' needs 2 dollars")
    assert tier.to_json() == {"name": "new", "refusal": None, "next": "tier 'known' needs 2 dollars"}
    refusing = AccessTier.from_json(raw | {"refusal": "no"})
    assert refusing is not None
    assert refusing.to_json()["refusal"] == "no"


@pytest.mark.parametrize("raw", [None, "x", [], {}, {"name": 5}, {"name": None, "next": "x"}])
def test_what_is_no_tier(raw: object) -> None:
    """A coordinator without tiers, or with nonsense, names none."""
    assert AccessTier.from_json(raw) is None


def test_long_texts() -> None:
    """What a coordinator says is cut; what is no text is empty."""
    assert AccessTier.from_json({"name": "x" * 9_000, "refusal": 5, "next": []}) == AccessTier("x" * MAX_TEXT, "", "")
