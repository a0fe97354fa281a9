"""Resolves aliases, which are names for several models, into the models to try and their order. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import structlog

from tallystick.client.config import UPSTREAM_SCHEME, Alias, UpstreamTarget
from tallystick.client.gateway.routing_rules import RoutingRule
from tallystick.client.openai.requests import load_body
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError
from tallystick.protocol.lenient_json import dump_lenient

log = structlog.get_logger()
_NOT_SOLD = frozenset(
    {Code.UNKNOWN_MODEL, Code.UNKNOWN_ROUTE, Code.PRICE_ABOVE_CAP, Code.CONTEXT_LENGTH_EXCEEDED, Code.UNSUPPORTED}
)
_NOT_AVAILABLE = frozenset(
    {
        Code.NO_PROVIDER,
        Code.NODE_BUSY,
        Code.NODE_GONE,
        Code.PROVIDER_FAILED,
        Code.ENGINE_UNAVAILABLE,
        Code.UPSTREAM_UNAVAILABLE,
    }
)
_MARKET_UNAVAILABLE = frozenset(
    {
        Code.COORDINATOR_UNAVAILABLE,
        Code.CHAIN_UNAVAILABLE,
        Code.DATABASE_UNAVAILABLE,
        Code.RATE_LIMITED,
        Code.TIMED_OUT,
        Code.INSUFFICIENT_FUNDS,
        Code.UNSECURED,
    }
)
"""Errors with which every model of the market would fail, but no upstream."""


def may_fall_back(error: TallyError, *, to_upstream: bool = False) -> bool:
    """Whether another model may be tried after this error: its model is not sold, or no provider is free for it.

    `to_upstream`: the other model is one of an upstream, which needs neither the coordinator nor a purse.
    """
    if to_upstream and (error.code in _MARKET_UNAVAILABLE or error.code is Code.NO_PROVIDER):
        return True
    if error.code is Code.UPSTREAM_UNAVAILABLE:
        return True
    return error.code in _NOT_SOLD or (error.code in _NOT_AVAILABLE and error.fault is not Fault.CLIENT)


def is_sold(error: TallyError) -> bool:
    """Whether the model may be on sale: this error does not say otherwise."""
    return error.code not in _NOT_SOLD


def weight_draw(key: str) -> float:
    """A number from 0 to below 1 that is always the same for the same idempotency key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / (1 << 48)


def order_models(alias: Alias, draw: float) -> tuple[str, ...]:
    """The alias's models: first the one that `draw` (0 to below 1) selects by weight, then the others as they are listed."""
    if not alias.weights:
        return alias.models
    position = draw * sum(alias.weights)
    first = next(model for model, end in zip(alias.models, accumulate(alias.weights), strict=True) if position < end)
    return (first, *(model for model in alias.models if model != first))


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """One request body for each model to try, in order. `accepts` judges the JSON of an answer.

    `upstreams`: which of the bodies are for models of upstreams, and for which.
    """

    bodies: Sequence[bytes] = field(repr=False)
    accepts: Callable[[Any], bool] = lambda _: True
    upstreams: Mapping[bytes, UpstreamTarget] = field(default_factory=dict, repr=False)

    def without_upstreams(self) -> RoutingPlan:
        """The plan with the models of the market alone."""
        return RoutingPlan([body for body in self.bodies if body not in self.upstreams], self.accepts)


class AliasRouter:
    """The aliases of a config, with the rules of those that have one, by the alias's name."""

    def __init__(self, aliases: Iterable[Alias], rules: Mapping[str, RoutingRule]) -> None:
        self._aliases = {alias.name: alias for alias in aliases}
        self._rules = rules

    def plan(self, body: bytes, fallbacks: Iterable[str], draw: float) -> RoutingPlan:
        """Which models to try for a JSON request. Raises BadMessage. Without aliases and fallbacks, nothing is parsed."""
        fallbacks = tuple(fallbacks)
        if any(name.startswith(UPSTREAM_SCHEME) for name in fallbacks):
            raise BadMessage("fallbacks: expected models of the market; models of an upstream are used by aliases that name them")
        if not (self._aliases or fallbacks):
            return RoutingPlan([body])
        request = load_body(body)
        if not isinstance(request, dict):
            raise BadMessage("request body: expected a JSON object")
        model = request.get("model")
        alias = self._aliases.get(model) if isinstance(model, str) else None
        if alias is None:
            return RoutingPlan(_bodies_for(request, (model, *fallbacks))) if fallbacks else RoutingPlan([body])
        rule = self._rules.get(alias.name)
        ordered = order_models(alias, draw) if rule is None else _order_by_rule(rule, request, alias)
        names = tuple(dict.fromkeys((*ordered, *fallbacks)))
        bodies = _bodies_for(request, names)
        targets = {
            body: target
            for name, body in zip(names, bodies, strict=True)
            if name in alias.models and (target := UpstreamTarget.parse(name)) is not None
        }
        accepts = (lambda _: True) if rule is None else (lambda answer: _accepts(rule, request, answer))
        return RoutingPlan(bodies, accepts, targets)


def _order_by_rule(rule: RoutingRule, request: dict[str, Any], alias: Alias) -> Sequence[str]:
    """The rule's order; the listed order if the rule fails or names no model."""
    try:
        return tuple(rule.order(request, alias.models)) or alias.models
    except Exception:  # the operator's own code must not fail the request
        log.exception("routing rule failed to order models", alias=alias.name)
        return alias.models


def _accepts(rule: RoutingRule, request: dict[str, Any], answer: Any) -> bool:
    try:
        return bool(rule.accepts(request, answer))
    except Exception:  # the operator's own code must not fail the request, whose answer is paid for
        log.exception("routing rule failed to judge an answer")
        return True


def _bodies_for(request: dict[str, Any], models: Iterable[Any]) -> list[bytes]:
    return [dump_lenient(request | {"model": name}) for name in dict.fromkeys(models)]
