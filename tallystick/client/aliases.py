"""Names that stand for several models: which is asked first, and which when that one cannot be had. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import accumulate

from tallystick.client.config import Alias
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError
from tallystick.protocol.wire import dumps, loads

_NOT_FOR_SALE = frozenset({Code.UNKNOWN_MODEL, Code.PRICE_ABOVE_CAP})
_NOT_NOW = frozenset({Code.NO_PROVIDER, Code.NODE_BUSY, Code.NODE_GONE, Code.PROVIDER_FAILED, Code.ENGINE_UNAVAILABLE})


def next_may_do(error: TallyError) -> bool:
    """Whether another model may answer what this one did not: it is not for sale, or nobody has it free. Nothing was billed."""
    return error.code in _NOT_FOR_SALE or (error.code in _NOT_NOW and error.fault is not Fault.CLIENT)


def draw_of(key: str) -> float:
    """A number from 0 to below 1 that is always the same for an idempotency key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / (1 << 48)


def ordered(alias: Alias, draw: float) -> tuple[str, ...]:
    """Its models, the one that the draw (0 to below 1) falls on by weight first, the others as they are listed."""
    if not alias.weights:
        return alias.models
    at = draw * sum(alias.weights)
    first = next(model for model, end in zip(alias.models, accumulate(alias.weights), strict=True) if at < end)
    return (first, *(model for model in alias.models if model != first))


def requests(body: bytes, aliases: Sequence[Alias], fallbacks: Iterable[str], draw: float) -> list[bytes]:
    """A JSON request, once for each model that may answer it, in the order to ask them. Raises BadMessage."""
    named = {alias.name: alias for alias in aliases}
    fallbacks = tuple(fallbacks)
    if not (named or fallbacks):
        return [body]
    request = loads(body, "request body")
    if not isinstance(request, dict):
        raise BadMessage("request body: expected a JSON object")
    model = request.get("model")
    alias = named.get(model) if isinstance(model, str) else None
    if alias is None and not fallbacks:
        return [body]
    first = (model,) if alias is None else ordered(alias, draw)
    return [dumps(request | {"model": name}) for name in dict.fromkeys((*first, *fallbacks))]
