"""Pages of the book: models by name, and a model's asks from the cheapest, bounded in entries and bytes. Pure.

Where a page ends is told as the last entry's place in the order, so that entries which come and go in between neither repeat
others nor hide them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from coordinator.domain.ask_book import Book, Standing
from coordinator.domain.resource_bounds import PAGE_BYTES
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import MAX_ASKS
from tallystick.protocol.wire import dumps

MAX_NAME = 1_024
"""Characters of a model's name: a longer one cannot be asked for, and is not listed."""
PLACE = "([0-9]{1,21})-(0x[0-9a-f]{40})-([0-9a-f]{64})"
Page = tuple[list[dict[str, Any]], str | None]


def models_page(book: Book, after: str, limit: int) -> Page:
    """Up to `limit` models after this name, and the name to go on after; None on the last page."""
    listed = ((name, standings) for name, standings in book.models() if name > after and len(name) <= MAX_NAME)
    return _cut(((name, one_model(name, standings)) for name, standings in listed), limit)


def asks_page(book: Book, model: str, after: str, limit: int) -> Page:
    """Up to `limit` asks for a model after this place, cheapest first, and the place to go on after; None on the last page.
    Raises BadMessage for a place that no page told.
    """
    listed = book.of_model(model)
    begin, last = 0, None
    if after:
        found = re.fullmatch(PLACE, after)
        if found is None:
            raise BadMessage("after: expected the `next` of a former page")
        last = (int(found[1]), found[2]), found[3]
        begin = bisect_left(listed, last[0], key=lambda standing: standing.price_key)
    # Asks of one provider at one price stand in no order: all that the page may begin and end with are taken in.
    window = sorted(listed[begin : begin + limit + 2 * MAX_ASKS], key=_place)
    left = (standing for standing in window if last is None or _place(standing) > last)
    return _cut(((_told(standing), one_ask(standing)) for standing in left), limit)


def _place(standing: Standing) -> tuple[tuple[int, str], str]:
    return standing.price_key, standing.ask.digest.hex()


def _told(standing: Standing) -> str:
    (price, provider), digest = _place(standing)
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


def one_model(name: str, standings: list[Standing]) -> dict[str, Any]:
    """A model as it is listed. Prices are base units per 1,000,000 tokens, as text."""
    asks = [standing.ask.message for standing in standings]
    return {
        "id": name,
        "providers": len({ask.provider for ask in asks}),
        "live": sum(standing.node.free > 0 for standing in standings),
        "inputPrice": str(min(ask.input_price for ask in asks)),
        "cachedInputPrice": str(min(ask.cached_input_price for ask in asks)),
        "outputPrice": str(min(ask.output_price for ask in asks)),
        "contextTokens": max(ask.context_tokens for ask in asks),
        "maxOutputTokens": max(ask.max_output_tokens for ask in asks),
        "tokensPerSecond": max(standing.node.capacity.tokens_per_second for standing in standings),
        "firstTokenMs": min((ms for standing in standings if (ms := standing.node.capacity.first_token_ms)), default=0),
    }


def one_ask(standing: Standing) -> dict[str, Any]:
    """An ask as it is listed: as it was signed, with the slots that its node has free."""
    return {"ask": standing.ask.to_json(), "free": standing.node.free}
