"""Options of a request: the criteria for its providers on top of the config, and why each ask meets them or not. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, cast

from tallystick.client.config import BATCH, MAX_HEDGE_SECONDS, MAX_LABEL, MAX_WAIT_SECONDS, ApiKey, ClientConfig, read_priority
from tallystick.client.openai.needs import bucket, round_down
from tallystick.client.openai.requests import RequestSummary
from tallystick.client.selection.shortlist import objection
from tallystick.protocol.criteria import Demand, read_sort
from tallystick.protocol.errors import BadMessage, Fault
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.link import read_ask
from tallystick.protocol.messages import Ask
from tallystick.protocol.requirements import NO_REQUIREMENTS, Requirements
from tallystick.protocol.types import Address, Amount, parse_address, parse_amount
from tallystick.protocol.weights import Weights
from tallystick.protocol.wire import loads

HEADER = "x-tally-options"
MAX_PROVIDERS = 256
MAX_DEMANDS = 256
"""Demands that are kept."""
MAX_REASON = 500
"""Characters of the coordinator's reason that are shown."""
MAX_TERM = 60
SCORE_TERMS = ("price", "loss", "integrity", "firstToken", "speed", "load", "total")
"""The terms of an ask's score and their sum, as the coordinator names them."""
_NAME = re.compile(r"[a-z]+(_[a-z]+){0,5}")
"""What a name of an option looks like. Other text may be anything, and is not repeated in errors and logs."""
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class _Narrowing(TypedDict):
    """The criteria that a request can make stricter than the config, and never looser."""

    max_input_price: int | None
    max_output_price: int | None
    require: Requirements
    min_reputation: int
    min_integrity: int
    min_stake: int


class ProviderCriteria(TypedDict, total=False):
    """The criteria that a request sets for its providers; `Demand` has the meaning of each. Addresses are hexadecimal text.

    Maxima, minima and `require` narrow what the config says; `exclude` adds to it; `pin`, `prefer`, `sort` and
    `weights` replace it.
    """

    max_input_price: int | None
    max_output_price: int | None
    pin: Iterable[str]
    prefer: Iterable[str]
    exclude: Iterable[str]
    require: Requirements
    min_reputation: int
    min_integrity: int
    min_stake: int
    sort: str
    weights: Weights


class RequestOptions(ProviderCriteria, total=False):
    """Options from the header X-Tally-Options and a caller's API key: criteria for providers, and the job's cost limit and label.

    `affinity`: the name of the request's conversation. `wait`: seconds that the job may wait for a free slot.
    `hedge_after`: seconds without output after which a second provider may get the job too; 0 for never.
    `priority`: "batch" waits behind "interactive". `share_prompt`: whether audits may show the request to other providers; a
    `private` one they may not.
    """

    max_cost: Amount | None
    label: str
    affinity: str
    wait: int
    hedge_after: float
    priority: str
    share_prompt: bool | None
    private: bool


def demand_of(config: ClientConfig, model: str, route: str, criteria: ProviderCriteria) -> Demand:
    """Builds the demand of a request. Raises BadMessage, or Refusal if the request asks for what the config does not allow."""
    excluded = (*config.exclude, *criteria.get("exclude", ()))
    return Demand(
        model=model,
        route=route,
        pin=frozenset(parse_address(address, "pin") for address in criteria.get("pin", ())),
        exclude=frozenset(parse_address(address, "exclude") for address in excluded),
        prefer=tuple(parse_address(address, "prefer") for address in criteria.get("prefer", config.prefer)),
        sort=criteria.get("sort", config.sort),
        weights=Weights.of(criteria.get("weights", config.weights)),
        batch=config.priority == BATCH,
        **_narrowed(config, criteria),
    )


def demand_for(demand: Demand, request: RequestSummary) -> Demand:
    """Adds what a request itself needs to its demand. Sizes are rounded, so that similar requests share a shortlist."""
    needs = Requirements(features=request.needs.features, context_tokens=request.likely_context)
    return replace(
        demand,
        needs=needs,
        essential=request.needs.essential,
        input_tokens=round_down(request.needs.least_tokens),
        likely_tokens=bucket(request.needs.likely_tokens),
        max_output=None if request.output_tokens is None else bucket(request.output_tokens),
    )


class Demands:
    """Builds the demands of one config's requests. Those of requests without criteria of their own are kept, and shared."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self._kept: dict[tuple[object, ...], Demand] = {}

    def of(self, summary: RequestSummary, route: str, criteria: ProviderCriteria) -> Demand:
        """The demand of a request. Raises as `demand_of`."""
        if criteria:
            return demand_for(demand_of(self._config, summary.model, route, criteria), summary)
        needs, output = summary.needs, summary.output_tokens
        sizes = (round_down(needs.least_tokens), bucket(needs.likely_tokens), None if output is None else bucket(output))
        key = (summary.model, route, needs.features, needs.essential, summary.likely_context, *sizes)
        demand = self._kept.get(key)
        if demand is None:
            demand = demand_for(demand_of(self._config, summary.model, route, criteria), summary)
            if len(self._kept) >= MAX_DEMANDS:
                self._kept.clear()
            self._kept[key] = demand
        return demand


def _narrowed(policy: ClientConfig | ApiKey, criteria: ProviderCriteria) -> _Narrowing:
    """Combines the criteria of a policy with those of a request, the stricter of each. Raises Refusal if no ask can meet both."""
    return {
        "max_input_price": smallest_limit(policy.max_input_price, criteria.get("max_input_price")),
        "max_output_price": smallest_limit(policy.max_output_price, criteria.get("max_output_price")),
        "require": policy.require.intersection(criteria.get("require", Requirements())),
        "min_reputation": max(policy.min_reputation, criteria.get("min_reputation", 0)),
        "min_integrity": max(policy.min_integrity, criteria.get("min_integrity", 0)),
        "min_stake": max(policy.min_stake, criteria.get("min_stake", 0)),
    }


def restrict_to_key(caller: ApiKey | None, options: RequestOptions) -> RequestOptions:
    """Restricts a request's options to what its caller's API key allows. Raises Refusal if they ask for more."""
    if caller is None:
        return options
    restricted = cast("RequestOptions", {**options, **_narrowed(caller, options)})
    max_cost = smallest_limit(caller.max_cost, options.get("max_cost"))
    restricted["max_cost"] = None if max_cost is None else Amount(max_cost)
    if caller.share_prompts is not None:
        restricted["share_prompt"] = caller.share_prompts and options.get("share_prompt") is not False
    restricted["label"] = "/".join(part for part in (caller.label, options.get("label")) if part)
    return restricted


def market_criteria(config: ClientConfig, options: RequestOptions) -> tuple[str, ...]:
    """The criteria of a request that only providers of the market can meet, by name: an upstream signs and declares nothing."""
    named: list[str] = [name for name in ("pin", "min_reputation", "min_integrity", "min_stake") if options.get(name)]
    named += [name for name in ("max_input_price", "max_output_price") if options.get(name) is not None]
    if options.get("require", NO_REQUIREMENTS) != NO_REQUIREMENTS or config.require != NO_REQUIREMENTS:
        named.append("require")
    return tuple(named)


def smallest_limit(*limits: int | None) -> int | None:
    """Returns the smallest limit; None means unlimited."""
    return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Options that the gateway itself handles: fallback models, and whether the response cache is used (None: as configured).

    `market`: whether only providers of the market may answer, and no upstream.
    """

    fallbacks: tuple[str, ...] = ()
    cache: bool | None = None
    market: bool = False


def read_options(header: str | None) -> tuple[RequestOptions, GatewayOptions]:
    """Reads the header X-Tally-Options: a JSON object in which amounts and prices are dollars, written as text.

    Raises BadMessage, which names the invalid member.
    """
    if header is None:
        return {}, GatewayOptions()
    raw = loads(header, HEADER)
    if not isinstance(raw, dict):
        raise BadMessage(f"{HEADER}: expected a JSON object")
    unknown = sorted(map(str, raw.keys() - _READERS.keys()))
    if unknown:
        named = ", ".join(name if _NAME.fullmatch(name) else "one that is no name" for name in unknown)[:200]
        raise BadMessage(f"{HEADER}: unknown options: {named}; known options: {', '.join(_READERS)}")
    options: dict[str, Any] = {name: _READERS[name](value, f"{HEADER}.{name}") for name, value in raw.items()}
    gateway_options = GatewayOptions(
        options.pop("fallbacks", ()), options.pop("cache", None), market=options.pop("market", False)
    )
    return cast("RequestOptions", options), gateway_options


def _dollars(value: object, member: str) -> Amount:
    if not isinstance(value, str):
        raise BadMessage(f'{member}: expected dollars as text, such as "0.50"')
    return parse_amount(value, field=member)


def _flag(value: object, member: str) -> bool:
    if not isinstance(value, bool):
        raise BadMessage(f"{member}: expected true or false")
    return value


def read_hedge_after(value: object, member: str) -> float:
    """Reads the seconds after which a job is hedged. Raises BadMessage."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_HEDGE_SECONDS:
        raise BadMessage(f"{member}: expected a number of seconds from 0 to {MAX_HEDGE_SECONDS:g}")
    return float(value)


def _texts(value: object, member: str) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else read_items(value, member, MAX_PROVIDERS)
    return tuple(read_text(item, member) for item in listed)


_READERS: dict[str, Callable[[object, str], Any]] = {
    "max_cost": _dollars,
    "max_input_price": _dollars,
    "max_output_price": _dollars,
    "pin": _texts,
    "prefer": _texts,
    "exclude": _texts,
    "require": Requirements.from_json,
    "min_reputation": lambda value, member: read_count(value, member, high=100),
    "min_integrity": lambda value, member: read_count(value, member, high=100),
    "min_stake": _dollars,
    "sort": lambda value, member: read_sort(read_text(value, member), member),
    "weights": Weights.from_dollars,
    "fallbacks": _texts,
    "cache": _flag,
    "market": _flag,
    "affinity": lambda value, member: read_text(value, member, MAX_LABEL),
    "label": lambda value, member: read_text(value, member, MAX_LABEL),
    "wait": lambda value, member: read_count(value, member, high=MAX_WAIT_SECONDS),
    "hedge_after": read_hedge_after,
    "priority": read_priority,
    "share_prompt": _flag,
    "private": _flag,
}
"""The reader of each option."""


@dataclass(frozen=True, slots=True)
class AskExplanation:
    """An ask, and why it would not be offered a job.

    `reason` is empty if the job would be offered to it. `free`: free slots. Speeds are 0 if unknown; `measured`: whether the
    coordinator measured them, instead of the node. `reputation`: how available the coordinator found the provider, in percent.
    `integrity`: that of what the ask sells, in percent, by `audits`; None if the coordinator counts no audits. `score`: the terms
    by which asks are ranked, and their total, in dollars. `expected`: the input and output tokens that they are for.
    """

    ask: Ask
    reason: str
    free: int
    tokens_per_second: int
    first_token_ms: int
    reputation: int
    measured: bool = False
    score: Mapping[str, str] = field(default_factory=dict)
    expected: tuple[int, int] = (0, 0)
    integrity: float | None = None
    audits: int = 0


def explain_asks(
    listed: Iterable[Mapping[str, Any]], demand: Demand, excluded: Mapping[Address, str], now: int
) -> list[AskExplanation]:
    """Combines the coordinator's explanation of each ask with this client's own objections; acceptable asks come first.

    `excluded`: the providers that this wallet excludes, with the reason. Malformed entries are left out. Raises BadMessage if all
    entries are malformed.
    """
    explanations: list[AskExplanation] = []
    malformed: BadMessage | None = None
    for entry in listed:
        try:
            explanations.append(_explain_ask(entry, demand, excluded, now))
        except BadMessage as error:
            malformed = error
    if malformed is not None and not explanations:
        malformed.fault = Fault.COORDINATOR
        raise malformed
    return sorted(explanations, key=lambda explanation: bool(explanation.reason))


def _explain_ask(entry: Mapping[str, Any], demand: Demand, excluded: Mapping[Address, str], now: int) -> AskExplanation:
    signed = read_ask(entry.get("ask"))
    numbers = (read_count(entry.get(name, 0), name) for name in ("free", "tokensPerSecond", "firstTokenMs", "reputation"))
    ask = signed.message
    reasons = (objection(demand, ask, now), entry.get("why"), excluded.get(ask.provider))
    why = next((str(reason)[:MAX_REASON] for reason in reasons if reason), "")
    score, expected = entry.get("score", {}), entry.get("expected", {})
    if not isinstance(score, dict) or not isinstance(expected, dict):
        raise BadMessage("explain: expected `score` and `expected` to be objects")
    terms = {name: _term(score[name], f"score.{name}") for name in SCORE_TERMS if name in score}
    input_tokens, output_tokens = (read_count(expected.get(name, 0), name) for name in ("inputTokens", "outputTokens"))
    free, tokens_per_second, first_token_ms, reputation = numbers
    integrity = entry.get("integrity")
    if integrity is not None and (type(integrity) not in (int, float) or not 0 <= integrity <= 100):
        raise BadMessage("explain.integrity: expected a number from 0 to 100")
    return AskExplanation(
        ask=ask,
        reason=why,
        free=free,
        tokens_per_second=tokens_per_second,
        first_token_ms=first_token_ms,
        reputation=reputation,
        measured=entry.get("measured") is True,
        score=terms,
        expected=(input_tokens, output_tokens),
        integrity=None if integrity is None else float(integrity),
        audits=read_count(entry.get("audits", 0), "audits"),
    )


def _term(value: object, member: str) -> str:
    text = read_text(value, member, MAX_TERM)
    if not _DECIMAL.fullmatch(text):
        raise BadMessage(f"{member}: expected a decimal number of dollars, got {text!r}")
    return text
