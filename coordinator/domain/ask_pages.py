"""Pages of the book: models by name, and a model's asks from the cheapest, bounded in entries and bytes. Pure.

Where a page ends is told as the last entry's place in the order, so that entries which come and go in between neither repeat
others nor hide them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from coordinator.domain.ask_book import AskBook, ListedAsk
from coordinator.domain.resource_bounds import PAGE_BYTES
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import MAX_ASKS
from tallystick.protocol.wire import dumps

MAX_MODEL_NAME = 1_024
"""Characters of a model's name: a longer one cannot be asked for, and is not listed."""
CURSOR_PATTERN = "([0-9]{1,21})-(0x[0-9a-f]{40})-([0-9a-f]{64})"
Page = tuple[list[dict[str, Any]], str | None]


def models_page(book: AskBook, after: str, limit: int) -> Page:
    """Up to `limit` models after this name, and the name to go on after; None on the last page."""
    listed = ((name, listed_asks) for name, listed_asks in book.models() if name > after and len(name) <= MAX_MODEL_NAME)
    return _cut(((name, model_entry(name, listed_asks)) for name, listed_asks in listed), limit)


def asks_page(book: AskBook, model: str, after: str, limit: int) -> Page:
    """Up to `limit` asks for a model after this place, cheapest first, and the place to go on after; None on the last page.
    Raises BadMessage for a place that no page told.
    """
    listed = book.of_model(model)
    begin, last = 0, None
    if after:
        found = re.fullmatch(CURSOR_PATTERN, after)
        if found is None:
            raise BadMessage("after: expected the `next` of a former page")
        last = (int(found[1]), found[2]), found[3]
        begin = bisect_left(listed, last[0], key=lambda listed_ask: listed_ask.price_key)
    # Asks of one provider at one price stand in no order: all that the page may begin and end with are taken in.
    window = sorted(listed[begin : begin + limit + 2 * MAX_ASKS], key=_place)
    left = (listed_ask for listed_ask in window if last is None or _place(listed_ask) > last)
    return _cut(((_told(listed_ask), ask_entry(listed_ask)) for listed_ask in left), limit)


def _place(listed_ask: ListedAsk) -> tuple[tuple[int, str], str]:
    return listed_ask.price_key, listed_ask.ask.digest.hex()


def _told(listed_ask: ListedAsk) -> str:
    (price, provider), digest = _place(listed_ask)
    return f"{price}-{provider}-{digest}"


def _cut(entries: Iterable[tuple[str, dict[str, Any]]], limit: int) -> Page:
    page: list[dict[str, Any]] = []
    size, last = 0, None
    for place, entry in entries:
        size += len(dumps(entry)) + len(place)
        if len(page) == limit or (page and size > PAGE_BYTES):
            return page, last
        page.append(entry)
        last = place
    return page, None


def model_entry(name: str, listed_asks: list[ListedAsk]) -> dict[str, Any]:
    """A model as it is listed. Prices are base units per 1,000,000 tokens, as text."""
    asks = [listed_ask.ask.message for listed_ask in listed_asks]
    return {
        "id": name,
        "providers": len({ask.provider for ask in asks}),
        "live": sum(listed_ask.node.free > 0 for listed_ask in listed_asks),
        "inputPrice": str(min(ask.input_price for ask in asks)),
        "cachedInputPrice": str(min(ask.cached_input_price for ask in asks)),
        "outputPrice": str(min(ask.output_price for ask in asks)),
        "contextTokens": max(ask.context_tokens for ask in asks),
        "maxOutputTokens": max(ask.max_output_tokens for ask in asks),
        "tokensPerSecond": max(listed_ask.node.capacity.tokens_per_second for listed_ask in listed_asks),
        "firstTokenMs": min((ms for listed_ask in listed_asks if (ms := listed_ask.node.capacity.first_token_ms)), default=0),
    }


def ask_entry(listed_ask: ListedAsk) -> dict[str, Any]:
    """An ask as it is listed: as it was signed, with the slots that its node has free."""
    return {"ask": listed_ask.ask.to_json(), "free": listed_ask.node.free}
