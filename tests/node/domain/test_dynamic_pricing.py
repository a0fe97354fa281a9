"""Prices that follow the clock and the load."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from node.domain.dynamic_pricing import PriceRule, apply_price_rules, batch_rule
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.pricing import Prices

PRICES = Prices(1_000, 101, 3)


def at(text: str) -> datetime:
    """Returns a moment in UTC; 2026-11-20 is a Friday."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("rule", "when", "holds"),
    [
        ({}, "2026-11-20 12:00", True),
        ({"days": ("fri",)}, "2026-11-20 12:00", True),
        ({"days": ("sat", "sun")}, "2026-11-20 23:59", False),
        ({"days": ("sat", "sun")}, "2026-11-21 00:00", True),
        ({"hours": "08:00-12:00"}, "2026-11-20 07:59", False),
        ({"hours": "08:00-12:00"}, "2026-11-20 08:00", True),
        ({"hours": "08:00-12:00"}, "2026-11-20 12:00", False),
        ({"hours": "20:00-24:00"}, "2026-11-20 23:59", True),
        ({"hours": "22:00-06:00"}, "2026-11-20 22:00", True),
        ({"hours": "22:00-06:00"}, "2026-11-21 05:59", True),
        ({"hours": "22:00-06:00"}, "2026-11-21 06:00", False),
        ({"days": ("fri",), "hours": "22:00-06:00"}, "2026-11-21 03:00", True),
        ({"days": ("sat",), "hours": "22:00-06:00"}, "2026-11-21 03:00", False),
        ({"hours": "22:00-06:00", "zone": "America/New_York"}, "2026-11-21 03:30", True),
        ({"hours": "22:00-06:00", "zone": "Asia/Tokyo"}, "2026-11-21 03:30", False),
    ],
)
def test_when_a_rule_applies(rule: dict[str, Any], when: str, holds: bool) -> None:
    """Days and hours are those of the rule's zone; a night belongs to the day on which it begins."""
    assert PriceRule(percent=50, **({"zone": "UTC"} | rule)).applies(at(when), 0.0) is holds


def test_the_first_rule_that_applies_sets_the_price() -> None:
    """Prices are rounded up; without an applicable rule the prices are the model's own."""
    rules = (PriceRule(percent=250, min_load_percent=80), PriceRule(percent=50, hours="22:00-06:00", zone="UTC"))
    assert apply_price_rules(PRICES, rules, at("2026-11-20 12:00"), 0.5) == PRICES
    assert apply_price_rules(PRICES, rules, at("2026-11-20 23:00"), 0.5) == Prices(500, 51, 2)
    assert apply_price_rules(PRICES, rules, at("2026-11-20 23:00"), 0.8) == Prices(2_500, 253, 8)
    assert apply_price_rules(PRICES, (PriceRule(percent=0),), at("2026-11-20 12:00"), 0.0) == Prices(0, 0, 0)


@pytest.mark.parametrize(
    "rule",
    [
        {"percent": -1},
        {"percent": 10_001},
        {"days": ("friday",)},
        {"hours": "8-12"},
        {"hours": "24:30-25:00"},
        {"hours": "08:00-08:00"},
        {"hours": "20:00-24:01"},
        {"min_load_percent": 101},
        {"zone": "Mars/Olympus"},
        {"zone": "../../etc/passwd"},
    ],
)
def test_invalid_rules_are_refused(rule: dict[str, Any]) -> None:
    """The error names the wrong member when the config is read."""
    with pytest.raises(BadMessage, match=r"config: price_rules[.]"):
        PriceRule(**({"percent": 50} | rule))


def test_discounts_for_batch_jobs() -> None:
    """A discount takes its percentage off, in its hours or always."""
    assert batch_rule("50%", "").percent == 50
    assert batch_rule("0%", "").percent == 100
    assert batch_rule("99%", "22:00-06:00").hours == "22:00-06:00"


@pytest.mark.parametrize(
    ("discount", "hours", "member"),
    [(text, "", "batch_discount") for text in ("", "50", "100%", "-1%", "1.5%", "050%", "٣%")] + [("50%", "8-12", "batch_hours")],
)
def test_invalid_discounts_are_refused(discount: str, hours: str, member: str) -> None:
    """The error names the wrong setting."""
    with pytest.raises(BadMessage, match=rf"config: {member}: expected"):
        batch_rule(discount, hours)
