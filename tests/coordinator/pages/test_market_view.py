"""Filters, orders and charts of the market's pages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.model_history import Sample
from coordinator.pages.market_view import CHART_HEIGHT, CHART_WIDTH, SORTS, chart, fitting, read_filter


def _entry(name: str, **changes: Any) -> dict[str, Any]:
    entry = {
        "id": name,
        "outputPrice": "1000000",
        "contextTokens": 8_192,
        "integrity": 90.0,
        "availability": 99,
        "firstTokenMs": 100,
        "tokensPerSecond": 50,
        "live": 1,
        "features": [],
        "routes": ["/v1/chat/completions"],
    }
    return entry | changes


MODELS = [
    _entry("a/Small", outputPrice="50000", contextTokens=4_096, integrity=99.0, firstTokenMs=0, tokensPerSecond=0),
    _entry("b-large", outputPrice="3000000", contextTokens=131_072, features=["tools"], live=0, availability=100),
    _entry("c-medium", tokensPerSecond=90, firstTokenMs=20, live=7),
]


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ({}, ["a/Small", "c-medium", "b-large"]),
        ({"q": "SMALL"}, ["a/Small"]),
        ({"q": "  large "}, ["b-large"]),
        ({"price": "1"}, ["a/Small", "c-medium"]),
        ({"price": "0.05"}, ["a/Small"]),
        ({"price": "0.049999"}, []),
        ({"context": "8192"}, ["c-medium", "b-large"]),
        ({"integrity": "95"}, ["a/Small"]),
        ({"feature": "TOOL"}, ["b-large"]),
        ({"feature": "/v1/chat"}, ["a/Small", "c-medium", "b-large"]),
        ({"free": "1"}, ["a/Small", "c-medium"]),
        ({"sort": "name"}, ["a/Small", "b-large", "c-medium"]),
        ({"sort": "latency"}, ["c-medium", "b-large", "a/Small"]),
        ({"sort": "throughput"}, ["c-medium", "b-large", "a/Small"]),
        ({"sort": "context"}, ["b-large", "c-medium", "a/Small"]),
        ({"sort": "free"}, ["c-medium", "a/Small", "b-large"]),
        ({"sort": "availability"}, ["b-large", "a/Small", "c-medium"]),
        ({"sort": "nonsense"}, ["a/Small", "c-medium", "b-large"]),
    ],
)
def test_filters(parameters: dict[str, str], names: list[str]) -> None:
    """Each filter and each order; equal models by name; unknown speeds come last."""
    wanted = read_filter(parameters)
    assert not wanted.problem
    assert [entry["id"] for entry in fitting(MODELS, wanted)] == names


@pytest.mark.parametrize(
    "parameters",
    [
        {"price": "cheap"},
        {"price": "-1"},
        {"price": "NaN"},
        {"price": "Infinity"},
        {"price": "1e99"},
        {"context": "-1"},
        {"context": "1.5"},
        {"context": "\N{ARABIC-INDIC DIGIT ONE}"},
        {"context": "9" * 5_000},
        {"context": "0" * 20 + "1" * 5_000},
        {"integrity": "101"},
        {"page": "0"},
    ],
)
def test_a_wrong_filter_is_left_out_and_named(parameters: dict[str, str]) -> None:
    """The page says what was expected, and lists as without it."""
    wanted = read_filter(parameters)
    assert "expected" in wanted.problem
    assert len(fitting(MODELS, wanted)) == len(MODELS)


@given(st.dictionaries(st.sampled_from(["q", "price", "context", "integrity", "feature", "free", "sort", "page"]), st.text()))
def test_no_address_breaks_the_page(parameters: dict[str, str]) -> None:
    """Whatever is asked for."""
    assert len(fitting(MODELS, read_filter(parameters))) <= len(MODELS)


def test_every_order_has_a_name() -> None:
    """For the page's menu."""
    assert all(SORTS.values())


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**9)), max_size=20))
def test_a_chart_stays_in_its_frame(values: list[tuple[int, int]]) -> None:
    """Unknown values (0) are left out; fewer than two are no line."""
    samples = [Sample(at, price, 0, 0) for at, price in sorted(values)]
    drawn = chart("price", samples, lambda sample: sample.output_price, str)
    known = [price for _, price in sorted(values) if price]
    if drawn is None:
        assert len(known) < 2
        return
    places = [tuple(map(float, point.split(","))) for point in drawn.points.split()]
    assert len(places) == len(known) == drawn.count
    assert all(0 <= x <= CHART_WIDTH and 0 <= y <= CHART_HEIGHT for x, y in places)
    assert (drawn.lowest, drawn.highest) == (str(min(known)), str(max(known)))
