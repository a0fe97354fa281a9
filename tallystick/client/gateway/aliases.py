"""Resolves aliases, which are names for several models, into the models to try and their order. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import structlog

from tallystick.client.config import Alias
from tallystick.client.gateway.routing_rules import RoutingRule
from tallystick.client.openai.requests import load_body
from tallystick.client.upstream_settings import UPSTREAM_SCHEME, UpstreamTarget
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.runtime.multipart import read_field, replace_field

log = structlog.get_logger()
_NOT_SOLD = frozenset(
    {Code.UNKNOWN_MODEL, Code.UNKNOWN_ROUTE, Code.PRICE_ABOVE_CAP, Code.CONTEXT_LENGTH_EXCEEDED, Code.UNSUPPORTED}
)
_NOT_AVAILABLE = frozenset({Code.NO_PROVIDER, Code.NODE_BUSY, Code.NODE_GONE, Code.PROVIDER_FAILED, Code.ENGINE_UNAVAILABLE})
_MARKET_UNAVAILABLE = frozenset(
    {
        Code.COORDINATOR_UNAVAILABLE,
        Code.CHAIN_UNAVAILABLE,
        Code.DATABASE_UNAVAILABLE,
        Code.RATE_LIMITED,
        Code.TIMED_OUT,
        Code.NO_PROVIDER,
        Code.INSUFFICIENT_FUNDS,
        Code.UNSECURED,
    }
)
"""Errors with which every model of the market may fail, but no upstream."""


def may_fall_back(error: TallyError, *, to_upstream: bool = False) -> bool:
    """Whether another model may be tried after this error: its model is not sold, or no provider is free for it.

    `to_upstream`: the other model is one of an upstream, which needs neither the coordinator nor a purse.
    """
    if error.code is Code.UPSTREAM_UNAVAILABLE or (to_upstream and error.code in _MARKET_UNAVAILABLE):
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
    """The aliases of a config, with the rules of those that have one, by the alias's name.

    `allowed`: the names in the caller's API key; a caller without any may use all. A key that names an alias may use that alias
    with all its models, and none of those by its own name. A key that names models may use aliases with these models only.
    """

    def __init__(self, aliases: Iterable[Alias], rules: Mapping[str, RoutingRule]) -> None:
        self._aliases = {alias.name: alias for alias in aliases}
        self._rules = rules

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._aliases)

    def usable(self, allowed: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The aliases that a caller may use, each with its models that the caller may reach by it."""
        members = {alias.name: _members(alias, allowed) for alias in self._aliases.values()}
        return {name: models for name, models in members.items() if models}

    def may_name(self, model: str, allowed: Collection[str]) -> bool:
        """Whether a caller may use a model by its own name. An alias of the same name hides it."""
        return model not in self._aliases and (not allowed or model in allowed)

    def check_named(self, model: object, allowed: Collection[str], member: str = "model") -> None:
        """Raises Refusal (unknown_model) for a model that the caller may not use by its own name."""
        if allowed and not (isinstance(model, str) and self.may_name(model, allowed)):
            names = ", ".join(sorted({*allowed, *self.usable(allowed)}))[:500]
            raise Refusal(
                Code.UNKNOWN_MODEL, f"{member}: expected one of those that this API key may use ({names}), got {model!r:.200}"
            )

    def plan(self, body: bytes, fallbacks: Iterable[str], draw: float, allowed: Collection[str] = ()) -> RoutingPlan:
        """Which models to try for a JSON request. Without aliases, fallbacks and limits of a key, nothing is parsed.

        Raises BadMessage, and Refusal (unknown_model) for a model that the caller may not use.
        """
        fallbacks = tuple(fallbacks)
        if not (self._aliases or fallbacks or allowed):
            return RoutingPlan([body])
        request = load_body(body)
        if not isinstance(request, dict):
            raise BadMessage("request body: expected a JSON object")
        model = request.get("model")
        models = self._resolve(model, draw, allowed, "model")
        later = [name for fallback in fallbacks for name in self._resolve(fallback, draw, allowed, "fallbacks")]
        if isinstance(model, str) and (rule := self._rules.get(model)) is not None:
            models = _order_by_rule(rule, request, self._aliases[model], allowed)
            return self._plan_of(request, (*models, *later), lambda answer: _accepts(rule, request, answer))
        if later or models != [model]:
            return self._plan_of(request, (*models, *later), lambda _: True)
        return RoutingPlan([body])

    def plan_form(
        self, content_type: str, body: bytes, fallbacks: Iterable[str], draw: float, allowed: Collection[str] = ()
    ) -> RoutingPlan:
        """Which models to try for a form, in the order of an alias without a rule. Models of upstreams are left out.

        Raises as `plan`.
        """
        model = read_field(content_type, body, "model")
        names = [name for each in (model, *fallbacks) for name in self._resolve(each, draw, allowed, "model")]
        sold = [name for name in dict.fromkeys(names) if name is None or UpstreamTarget.parse(name) is None]
        if not sold:
            raise Refusal(Code.UNKNOWN_MODEL, f"model: {model!r:.200} has models of upstreams alone, which answer no forms")
        return RoutingPlan([body if name == model else replace_field(content_type, body, "model", name) for name in sold])

    def _plan_of(self, request: dict[str, Any], names: Iterable[Any], accepts: Callable[[Any], bool]) -> RoutingPlan:
        names = tuple(dict.fromkeys(names))
        bodies = [dump_lenient(request | {"model": name}) for name in names]
        members = {member for alias in self._aliases.values() for member in alias.models}
        targets = {
            body: target
            for name, body in zip(names, bodies, strict=True)
            if name in members and (target := UpstreamTarget.parse(name)) is not None
        }
        return RoutingPlan(bodies, accepts, targets)

    def _resolve(self, model: Any, draw: float, allowed: Collection[str], member: str) -> Sequence[Any]:
        """The models that a name stands for, in the order of an alias without a rule. Raises Refusal as `check_named`."""
        alias = self._aliases.get(model) if isinstance(model, str) else None
        usable = () if alias is None else _members(alias, allowed)
        if alias is None or not usable:
            self.check_named(model, allowed, member)
            if isinstance(model, str) and model.startswith(UPSTREAM_SCHEME):
                text = (
                    f"{member}: {model:.200}: models of an upstream are used by aliases that name them, never by their own names"
                )
                raise Refusal(Code.UNKNOWN_MODEL, text)
            return [model]
        return [name for name in order_models(alias, draw) if name in usable]


def _members(alias: Alias, allowed: Collection[str]) -> tuple[str, ...]:
    """The models of an alias that a caller may reach by it."""
    if not allowed or alias.name in allowed:
        return alias.models
    return tuple(model for model in alias.models if model in allowed)


def _order_by_rule(rule: RoutingRule, request: dict[str, Any], alias: Alias, allowed: Collection[str]) -> Sequence[str]:
    """The rule's order of the models that a caller may reach; the listed order if the rule fails or names no model."""
    members = _members(alias, allowed)
    try:
        order = tuple(rule.order(request, members))
    except Exception:  # the operator's own code must not fail the request
        log.exception("routing rule failed to order models", alias=alias.name)
        return members
    if members != alias.models:  # the caller may not reach other models that the rule may name
        order = tuple(model for model in order if model in members)
    return order or members


def _accepts(rule: RoutingRule, request: dict[str, Any], answer: Any) -> bool:
    try:
        return bool(rule.accepts(request, answer))
    except Exception:  # the operator's own code must not fail the request, whose answer is paid for
        log.exception("routing rule failed to judge an answer")
        return True
