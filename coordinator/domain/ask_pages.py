"""Pages of the ask book: models by name, and a model's asks from the cheapest, bounded in entries and bytes. Pure.

A page ends with a cursor: the sort key of its last entry. Entries that come and go between two pages then neither repeat nor
hide others.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from coordinator.domain.ask_book import AskBook
from coordinator.domain.integrity_records import product_key
from coordinator.domain.listed_ask import ListedAsk
from coordinator.domain.ranking import Ranked
from coordinator.domain.resource_bounds import PAGE_BYTES
from coordinator.domain.scoring import RequestShape, Score
from tallystick.protocol.criteria import Reason, audience, is_batch_only
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import MAX_ASKS
from tallystick.protocol.log_facts import INTEGRITY_STEPS
from tallystick.protocol.payer_rules import payer_rule
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.routes import sold_routes
from tallystick.protocol.wire import dumps

MAX_LISTED, MAX_LISTED_NAME = 32, 64
"""Routes and features of a listed model, and the characters of each."""
MAX_MODEL_NAME = 1_024
"""Characters of a model's name. A longer name can be neither requested nor listed."""
CURSOR_PATTERN = "([0-9]{1,21})-(0x[0-9a-f]{40})-([0-9a-f]{64})"
"""Price, provider and digest of an ask."""
_SECONDS_PER_ASK = 1e-4
"""How long the entry of a model is used again for each of its asks: some fifty times as long as it takes to read the ask."""
_MAX_ENTRIES = 1_000
Page = tuple[list[dict[str, Any]], str | None]
"""Entries, and the cursor of the next page; None on the last page."""


class ModelEntries:
    """The JSON of listed models. Whoever asks how often, at most about a fiftieth of the time goes into reading all asks.

    `tick` arguments are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, dict[str, Any]]] = {}
        """Until when each entry is used again, and the entry."""

    def entry(self, name: str, listed_asks: list[ListedAsk], score: Score, tick: float) -> dict[str, Any]:
        """Returns the entry of a model, which is older the more asks the model has: up to 10 s with 100,000 asks."""
        until, entry = self._known.get(name, (tick, {}))
        if tick >= until:
            entry = model_entry(name, listed_asks, score)
            self._known.pop(name, None)
            self._known[name] = tick + len(listed_asks) * _SECONDS_PER_ASK, entry
            if len(self._known) > _MAX_ENTRIES:
                del self._known[next(iter(self._known))]
        return entry


def models_page(
    book: AskBook,
    entries: ModelEntries,
    count_waiting: Callable[[str], int],
    after: str,
    limit: int,
    *,
    score: Score,
    tick: float,
) -> Page:
    """Returns up to `limit` models whose names come after `after`. The cursor is a name.

    `count_waiting` returns the jobs that wait for a model, `score` a provider's availability. `tick`: see `ModelEntries`.
    """
    models = ((name, asks) for name, asks in book.models() if name > after and len(name) <= MAX_MODEL_NAME)
    listed = ((name, entries.entry(name, asks, score, tick) | {"waiting": count_waiting(name)}) for name, asks in models)
    return _take_page(listed, limit)


def asks_page(book: AskBook, model: str, after: str, limit: int, score: Score) -> Page:
    """Returns up to `limit` asks for a model after the cursor `after`, cheapest first. Raises BadMessage for a bad cursor."""
    of_model = book.of_model(model)
    begin, last = 0, None
    if after:
        cursor = re.fullmatch(CURSOR_PATTERN, after)
        if cursor is None:
            raise BadMessage("after: expected the `next` of a former page")
        last = (int(cursor[1]), cursor[2]), cursor[3]
        begin = bisect_left(of_model, last[0], key=lambda listed_ask: listed_ask.price_key)
    # Asks of one provider at one price are unsorted in the book. The window includes all of them at both ends of the page.
    window = sorted(of_model[begin : begin + limit + 2 * MAX_ASKS], key=_sort_key)
    following = (listed_ask for listed_ask in window if last is None or _sort_key(listed_ask) > last)
    return _take_page(((_cursor(listed_ask), ask_entry(listed_ask, score)) for listed_ask in following), limit)


def _sort_key(listed_ask: ListedAsk) -> tuple[tuple[int, str], str]:
    return listed_ask.price_key, listed_ask.digest.hex()


def _cursor(listed_ask: ListedAsk) -> str:
    (price, provider), digest = _sort_key(listed_ask)
    return f"{price}-{provider}-{digest}"


def _take_page(entries: Iterable[tuple[str, dict[str, Any]]], limit: int) -> Page:
    page: list[dict[str, Any]] = []
    size, last = 0, None
    for cursor, entry in entries:
        size += len(dumps(entry)) + len(cursor)
        if len(page) == limit or (page and size > PAGE_BYTES):
            return page, last
        page.append(entry)
        last = cursor
    return page, None


def model_entry(name: str, listed_asks: list[ListedAsk], score: Score) -> dict[str, Any]:
    """Returns the JSON of a listed model. Prices are base units per 1,000,000 tokens, as text; those for batch jobs or for
    some payers alone only if there are no others.

    `integrity` and `availability`: the highest of its asks, in percent; `audits`: those of all.
    `routes` and `features`: what at least one of its asks sells and declares, at most MAX_LISTED of each.
    """
    every = [listed_ask.message for listed_ask in listed_asks]
    asks = [ask for ask in every if not is_batch_only(ask) and payer_rule(ask.spec.features) is None] or every
    speeds = [listed_ask.speed for listed_ask in listed_asks]
    products = {product_key(listed_ask.message): listed_ask.audits for listed_ask in listed_asks}
    return {
        "id": name,
        "providers": len({ask.provider for ask in asks}),
        "live": sum(listed_ask.slot_group.free > 0 for listed_ask in listed_asks),
        "inputPrice": str(min(ask.input_price for ask in asks)),
        "cachedInputPrice": str(min(ask.cached_input_price for ask in asks)),
        "outputPrice": str(min(ask.output_price for ask in asks)),
        "contextTokens": max(ask.context_tokens for ask in asks),
        "maxOutputTokens": max(ask.max_output_tokens for ask in asks),
        "tokensPerSecond": max(speed.tokens_per_second for speed in speeds),
        "firstTokenMs": min((speed.first_token_ms for speed in speeds if speed.first_token_ms), default=0),
        "integrity": percent(max(listed_ask.integrity for listed_ask in listed_asks)),
        "audits": sum(products.values()),
        "availability": round(100 * max(score(ask.provider) for ask in asks)),
        "routes": _listed(path for ask in asks for path in sold_routes(ask.spec.features)),
        "features": _listed(name for ask in asks for name in ask.spec.features if not name.startswith(("-", "/"))),
    }


def _listed(names: Iterable[str]) -> list[str]:
    """The names in order, without repetitions and without those that are too long to be listed."""
    return sorted({name for name in names if len(name) <= MAX_LISTED_NAME})[:MAX_LISTED]


def percent(integrity: int) -> float:
    """Returns an integrity in percent, with one decimal."""
    return round(100 * integrity / INTEGRITY_STEPS, 1)


def ask_entry(listed_ask: ListedAsk, score: Score) -> dict[str, Any]:
    """Returns the JSON of a listed ask: as it was signed, with the free slots and queue places of its slot group.

    `integrity`: of what it sells, by `audits`; `availability`: the score of its provider, by its jobs; both in percent.
    """
    group = listed_ask.slot_group
    return {
        "ask": listed_ask.ask.to_json(),
        "free": group.free,
        "queue": group.places - group.free,
        "integrity": percent(listed_ask.integrity),
        "audits": listed_ask.audits,
        "availability": round(100 * score(listed_ask.provider)),
    }


def rating_entry(listed_ask: ListedAsk) -> dict[str, Any]:
    """Returns the JSON of how this coordinator rates what an ask sells: its integrity by audits in percent, and its speed.

    With its prices, in base units per 1,000,000 tokens, and whom they are for, in words; "" for everybody.
    """
    speed, ask = listed_ask.speed, listed_ask.message
    return {
        "model": ask.model,
        "precision": precision_class(ask.spec.precision),
        "integrity": percent(listed_ask.integrity),
        "audits": listed_ask.audits,
        "tokensPerSecond": speed.tokens_per_second,
        "firstTokenMs": speed.first_token_ms,
        "measured": listed_ask.measured is not None,
        "inputPrice": str(ask.input_price),
        "outputPrice": str(ask.output_price),
        "audience": audience(ask),
    }


def explained_entry(ranked: Ranked[ListedAsk], reason: Reason | None, shape: RequestShape) -> dict[str, Any]:
    """Returns the JSON of an explained ask: with the reason against it, and the terms of its score in dollars, as text."""
    listed_ask, speed = ranked.listed_ask, ranked.listed_ask.speed
    return ask_entry(listed_ask, lambda _provider: ranked.reputation) | {
        "why": None if reason is None else reason.value,
        "tokensPerSecond": speed.tokens_per_second,
        "firstTokenMs": speed.first_token_ms,
        "measured": listed_ask.measured is not None,
        "reputation": round(100 * ranked.reputation),
        "score": ranked.terms.to_json(),
        "expected": {"inputTokens": shape.input_tokens, "outputTokens": shape.output_tokens},
    }
