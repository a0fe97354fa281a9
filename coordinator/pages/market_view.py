"""What the market's pages show, from the entries of the ask book: filters, orders and charts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from coordinator.domain.model_history import Sample

PAGE_ROWS = 100
MAX_TEXT = 200
"""Characters of a filter that count."""
_MAX_NUMBER, _DIGITS = 10**12, 20
CHART_WIDTH, CHART_HEIGHT = 600, 120

Entry = Mapping[str, Any]
"""An entry of /v1/models."""
_SORTS: dict[str, tuple[str, Callable[[Entry], Any]]] = {
    "price": ("price of output", lambda entry: int(entry["outputPrice"])),
    "name": ("name", lambda entry: entry["id"].lower()),
    "free": ("free slots", lambda entry: -entry["live"]),
    "latency": ("first token", lambda entry: entry["firstTokenMs"] or 1 << 62),
    "throughput": ("speed", lambda entry: -entry["tokensPerSecond"]),
    "context": ("context", lambda entry: -entry["contextTokens"]),
    "integrity": ("integrity", lambda entry: -entry["integrity"]),
    "availability": ("availability", lambda entry: -entry["availability"]),
}
SORTS = {name: text for name, (text, _) in _SORTS.items()}
"""The orders in which models are listed: those of a request, and others that people look for."""


@dataclass(frozen=True, slots=True)
class ModelFilter:
    """Which models are listed, and how. `price`: the highest for output, in dollars; 0 asks for nothing."""

    text: str = ""
    price: str = ""
    context: int = 0
    integrity: int = 0
    feature: str = ""
    free: bool = False
    sort: str = "price"
    page: int = 1
    problem: str = ""
    """What is wrong with the filter that was asked for; such a member is left out."""

    @property
    def highest_price(self) -> Decimal | None:
        """The highest price in base units, or None."""
        return Decimal(self.price) * 1_000_000 if self.price else None


def read_filter(parameters: Mapping[str, str]) -> ModelFilter:
    """Reads the parameters of the page's address. What is wrong is left out, and `problem` says what."""
    problems: list[str] = []

    def number(name: str, label: str, low: int, high: int, default: int) -> int:
        text = parameters.get(name, "").strip()
        if not text:
            return default
        if len(text) <= _DIGITS and text.isascii() and text.isdecimal() and low <= int(text) <= high:
            return int(text)
        problems.append(f"{label}: expected a whole number from {low} to {high}")
        return default

    price = parameters.get("price", "").strip()[:MAX_TEXT]
    if price and not _is_price(price):
        problems.append("Price: expected dollars for 1,000,000 tokens, such as 0.25")
        price = ""
    sort = parameters.get("sort", "price")
    return ModelFilter(
        text=parameters.get("q", "").strip()[:MAX_TEXT],
        price=price,
        context=number("context", "Context", 0, _MAX_NUMBER, 0),
        integrity=number("integrity", "Integrity", 0, 100, 0),
        feature=parameters.get("feature", "").strip()[:MAX_TEXT],
        free="free" in parameters,
        sort=sort if sort in _SORTS else "price",
        page=number("page", "Page", 1, 10_000, 1),
        problem=". ".join(problems),
    )


def _is_price(text: str) -> bool:
    try:
        value = Decimal(text)
    except InvalidOperation:
        return False
    return value.is_finite() and 0 <= value <= _MAX_NUMBER


def fitting(entries: Iterable[Entry], wanted: ModelFilter) -> list[Entry]:
    """Returns the models that fit, in the order of the filter; equal ones by name."""
    text, feature, highest = wanted.text.lower(), wanted.feature.lower(), wanted.highest_price
    chosen = [
        entry
        for entry in entries
        if text in entry["id"].lower()
        and (highest is None or int(entry["outputPrice"]) <= highest)
        and entry["contextTokens"] >= wanted.context
        and entry["integrity"] >= wanted.integrity
        and (not feature or any(feature in name.lower() for name in (*entry["features"], *entry["routes"])))
        and (not wanted.free or entry["live"])
    ]
    key = _SORTS[wanted.sort][1]
    return sorted(chosen, key=lambda entry: (key(entry), entry["id"]))


@dataclass(frozen=True, slots=True)
class Chart:
    """A line of values over time as SVG `points`, and the values in words for those who do not see it."""

    title: str
    points: str
    first: str
    last: str
    lowest: str
    highest: str
    count: int


def chart(title: str, samples: Sequence[Sample], value: Callable[[Sample], int], words: Callable[[int], str]) -> Chart | None:
    """Returns the chart of the samples with a known value (not 0); None with fewer than two."""
    known = [(sample.at, value(sample)) for sample in samples if value(sample)]
    if len(known) < 2:
        return None
    values = [number for _, number in known]
    begin, span = known[0][0], max(1, known[-1][0] - known[0][0])
    top = max(values)
    places = (
        (round(CHART_WIDTH * (at - begin) / span, 1), round(CHART_HEIGHT - (CHART_HEIGHT - 4) * number / top, 1))
        for at, number in known
    )
    points = " ".join(f"{x},{y}" for x, y in places)
    return Chart(title, points, words(values[0]), words(values[-1]), words(min(values)), words(top), len(known))
