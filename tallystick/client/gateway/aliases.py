"""AliasRouter that stand for several models: which is asked first, which when that one cannot be had or does not do. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import structlog

from tallystick.client.config import Alias
from tallystick.client.gateway.routing_rules import RoutingRule
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError
from tallystick.protocol.wire import dumps, loads

log = structlog.get_logger()
_NOT_FOR_SALE = frozenset({Code.UNKNOWN_MODEL, Code.UNKNOWN_ROUTE, Code.PRICE_ABOVE_CAP})
_NOT_NOW = frozenset({Code.NO_PROVIDER, Code.NODE_BUSY, Code.NODE_GONE, Code.PROVIDER_FAILED, Code.ENGINE_UNAVAILABLE})


def may_fall_back(error: TallyError) -> bool:
    """Whether another model may answer what this one did not: it is not for sale, or nobody has it free."""
    return error.code in _NOT_FOR_SALE or (error.code in _NOT_NOW and error.fault is not Fault.CLIENT)


def is_sold(error: TallyError) -> bool:
    """Whether the model is for sale, as far as this error says."""
    return error.code not in _NOT_FOR_SALE


def weight_draw(key: str) -> float:
    """A number from 0 to below 1 that is always the same for an idempotency key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / (1 << 48)


def order_models(alias: Alias, draw: float) -> tuple[str, ...]:
    """Its models, the one that the draw (0 to below 1) falls on by weight first, the others as they are listed."""
    if not alias.weights:
        return alias.models
    at = draw * sum(alias.weights)
    first = next(model for model, end in zip(alias.models, accumulate(alias.weights), strict=True) if at < end)
    return (first, *(model for model in alias.models if model != first))


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """A request once for each model that may answer it, in the order to ask them; `good` judges an answer's JSON."""

    bodies: Sequence[bytes] = field(repr=False)
    good: Callable[[Any], bool] = lambda _: True


class AliasRouter:
    """The aliases of a config, each with its rule if it has one (`rules`, by the alias's name)."""

    def __init__(self, aliases: Iterable[Alias], rules: Mapping[str, RoutingRule]) -> None:
        self._aliases = {alias.name: alias for alias in aliases}
        self._rules = rules

    def plan(self, body: bytes, fallbacks: Iterable[str], draw: float) -> RoutingPlan:
        """How a JSON request is to be asked. Raises BadMessage. Nothing is parsed where nothing is configured."""
        fallbacks = tuple(fallbacks)
        if not (self._aliases or fallbacks):
            return RoutingPlan([body])
        request = loads(body, "request body")
        if not isinstance(request, dict):
            raise BadMessage("request body: expected a JSON object")
        model = request.get("model")
        alias = self._aliases.get(model) if isinstance(model, str) else None
        if alias is None:
            return RoutingPlan(_named(request, (model, *fallbacks))) if fallbacks else RoutingPlan([body])
        rule = self._rules.get(alias.name)
        if rule is None:
            return RoutingPlan(_named(request, (*order_models(alias, draw), *fallbacks)))
        return RoutingPlan(
            _named(request, (*_order(rule, request, alias), *fallbacks)), lambda answer: _good(rule, request, answer)
        )


def _order(rule: RoutingRule, request: dict[str, Any], alias: Alias) -> Sequence[str]:
    """As the rule says; as they are listed where it fails or names none."""
    try:
        return tuple(rule.order(request, alias.models)) or alias.models
    except Exception:  # somebody's own code, which is not to cost the request
        log.exception("an alias's rule failed", alias=alias.name)
        return alias.models


def _good(rule: RoutingRule, request: dict[str, Any], answer: Any) -> bool:
    try:
        return bool(rule.good(request, answer))
    except Exception:  # as above: this answer is paid for
        log.exception("a rule failed to judge an answer")
        return True


def _named(request: dict[str, Any], models: Iterable[Any]) -> list[bytes]:
    return [dumps(request | {"model": name}) for name in dict.fromkeys(models)]
