"""A client's demand: the criteria by which providers are chosen for a job, and the reason why an ask does not meet them.

The coordinator proposes asks by these predicates and the client verifies the proposal by the same ones. Pure.

To add a criterion: add a field to `Demand`, its JSON member to `_MEMBERS`, a `Reason`, and a predicate to `_CHOSEN`,
`_ABLE` or `_unacceptable`. The HTTP schema (`ShortlistRequest` in the coordinator) must declare the member; a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Literal, get_args

from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.features import BATCH_ONLY, denied
from tallystick.protocol.json_members import read_count, read_items
from tallystick.protocol.messages import Ask
from tallystick.protocol.payer_rules import Payer, is_for, payer_rule
from tallystick.protocol.requirements import MAX_NAMES, NO_REQUIREMENTS, Requirements
from tallystick.protocol.routes import check_route, serves
from tallystick.protocol.types import Address, parse_address
from tallystick.protocol.weights import NO_WEIGHTS, Weights

Sort = Literal["price", "latency", "throughput", "speed"]
SORTS: tuple[Sort, ...] = get_args(Sort)
"""Orders of a shortlist: lowest expected cost, shortest time to the first token, most tokens per second (by two names)."""
DEFAULT_LIMIT = 4
"""Entries of a shortlist if the request names no limit."""
MAX_CANDIDATES = 8
"""Entries of a shortlist, and so orders of a job, at most."""
MAX_CONCURRENT = 64
"""Concurrent jobs of a client that a demand may tell of."""
MAX_ADDRESSES = 256
"""Providers that a demand may name as pinned, and as excluded."""


def read_sort(name: str, member: str = "sort") -> str:
    """Returns the name of an order. Raises BadMessage for another one."""
    if name not in SORTS:
        raise BadMessage(f"{member}: expected one of {', '.join(SORTS)}, got {name!r:.60}")
    return name


class Reason(Enum):
    """Why a provider was not chosen, in words that the provider's owner and the client can act on."""

    MODEL = "another model"
    NOT_PINNED = "not among the providers asked for"
    EXCLUDED = "excluded by the client"
    ROUTE = "it does not serve that route"
    REGION = "it is not in a region asked for"
    TIER = "it is not of a tier asked for"
    PRECISION = "it is not of a precision asked for"
    ENGINE = "it does not run on an engine asked for"
    FEATURES = "it lacks a feature asked for"
    CONTEXT = "its context is shorter than asked for"
    BATCH_ONLY = "its ask is for batch jobs alone"
    PAYER = "its ask is for other payers"
    UNSUPPORTED = "it declares that it lacks a feature that the request needs"
    TOO_LONG = "the request is longer than its context"
    UNDECLARED = "it does not declare what the request needs, and another provider does"
    REPUTATION = "it failed too many jobs lately"
    INTEGRITY = "audits vouch for it less than `min_integrity` asks for"
    STAKE = "it has staked less than asked for"
    INPUT_PRICE = "its input price is above the client's maximum"
    OUTPUT_PRICE = "its output price is above the client's maximum"
    ORDER_EXPIRED = "the order on it has expired"
    ASK_EXPIRED = "its ask has expired or is not valid yet"
    ASK_GONE = "its ask was replaced or withdrawn since the shortlist was made"
    BUSY = "no free slot now"
    FAILED = "it has or had this job already"
    SEALING_SUITE = "it needs a sealing suite that this client does not know"


@dataclass(frozen=True, slots=True)
class Facts:
    """What one side knows about the provider of an ask. None means unknown, and an unknown fact excludes nobody.

    `now`: Unix seconds. `stake`: base units. `free`: free slots. `reputation`: the score from 0 to 100.
    `integrity`: that of what the ask sells, by audits, from 0 to 100.
    """

    now: int
    stake: int | None = None
    free: int | None = None
    reputation: float | None = None
    integrity: float | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """The criteria of one job. Prices are maxima in base units per 1,000,000 tokens; empty sets and zero do not restrict."""

    model: str
    max_input_price: int | None = None
    max_output_price: int | None = None
    pin: frozenset[Address] = frozenset()
    """Only these providers."""
    exclude: frozenset[Address] = frozenset()
    route: str | None = None
    """The route of the request, such as /v1/chat/completions or /v1/rerank. None: any."""
    require: Requirements = NO_REQUIREMENTS
    min_reputation: int = 0
    """Percent of the score that the coordinator keeps for a provider."""
    min_stake: int = 0
    """Base units that the provider has staked."""
    sort: str = "price"
    prefer: tuple[Address, ...] = ()
    """Providers that come first, in this order. Applied by the client; the coordinator is not told."""
    limit: int = MAX_CANDIDATES
    """Entries of the shortlist, at most."""
    needs: Requirements = NO_REQUIREMENTS
    """What the request itself needs, as far as its body shows: features, and the context that it is likely to fill.

    If any ask declares all of it, only such asks are chosen.
    """
    essential: tuple[str, ...] = ()
    """Features that the request needs by all means. Asks that declare that they lack one are left out."""
    input_tokens: int = 0
    """The fewest input tokens that the request can have. Asks with a shorter context are left out."""
    likely_tokens: int = 0
    """The input tokens that the request is likely to have, rounded; 0 if unknown. Asks are ranked by what they cost with it."""
    max_output: int | None = None
    """The most output tokens that the request allows, rounded; None if unknown."""
    weights: Weights = NO_WEIGHTS
    """What the client's time and a failed job count besides the price."""
    concurrent: int = 0
    """Other jobs for which the client looks for a slot of the model at this moment. The shortlist begins at a slot that is drawn
    from as many of the best free ones, so that not all of them order on the same providers.
    """
    min_integrity: int = 0
    """Percent of the answers that are what was sold, at least, as far as the coordinator's audits vouch for it."""

    batch: bool = False
    """Whether the job is of the class `batch`, to which asks for batch jobs alone are offered too."""
    payer: Payer | None = None
    """Who pays, if some asks may be for other payers. None: unknown, and excludes nobody. Not part of the JSON."""

    def __post_init__(self) -> None:
        """Raises BadMessage for a limit or a sort order that does not exist."""
        if not 1 <= self.limit <= MAX_CANDIDATES:
            raise BadMessage(f"limit: expected 1 to {MAX_CANDIDATES}, got {self.limit}")
        read_sort(self.sort)
        if self.sort == "speed":
            object.__setattr__(self, "sort", "throughput")

    @property
    def ranked(self) -> bool:
        """Whether the client chose the order of the shortlist itself, instead of the coordinator."""
        return bool(self.prefer)

    @property
    def strict(self) -> Demand | None:
        """The demand that only asks meet which declare all that the request needs; None if it needs nothing."""
        if self.needs == NO_REQUIREMENTS:
            return None
        needs = Requirements(features=self.needs.features, context_tokens=self.needs.context_tokens)
        return replace(self, require=self.require.intersection(needs), needs=NO_REQUIREMENTS)

    def to_json(self, payer: Address) -> dict[str, Any]:
        """Returns the body of POST /v1/shortlist and /v1/explain. Members that do not restrict are left out."""
        body: dict[str, Any] = {"model": self.model, "payer": payer, "limit": self.limit}
        for member, (field, write, _) in _MEMBERS.items():
            value = getattr(self, field)
            if value != _DEFAULTS[field]:
                body[member] = write(value)
        return body

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Demand:
        """Reads the body of POST /v1/shortlist, whose members have the types of its schema already. Ignores `payer`.

        Raises BadMessage, and Refusal (unknown_route) for a route that cannot exist.
        """
        values = {field: read(raw[member]) for member, (field, _, read) in _MEMBERS.items() if raw.get(member) is not None}
        return cls(raw["model"], **values, limit=raw.get("limit", DEFAULT_LIMIT))

    def objection(self, ask: Ask, facts: Facts) -> Reason | None:
        """Returns the first reason why this ask does not meet the demand, or None if it does."""
        return (
            self._first(_MODEL, ask)
            or self._first(_CHOSEN, ask)
            or self._first(_ABLE, ask)
            or self._first_unmet(ask)
            or (Reason.PAYER if self.payer is not None and not is_for(ask, self.payer) else None)
            or _unacceptable(self, ask, facts)
        )

    def spec_objection(self, ask: Ask) -> Reason | None:
        """Returns the first objection to the ask's model, routes and spec, which does not depend on provider, price or time.

        Asks with equal specs and contexts therefore get the same answer, which `offer_objection` completes for each of them.
        """
        return self._first(_MODEL, ask) or self._first(_ABLE, ask) or self._first_unmet(ask)

    def offer_objection(self, ask: Ask, facts: Facts) -> Reason | None:
        """Returns the first objection to the ask's provider, price, validity and load, for an ask of a suitable spec."""
        if self.pin or ask.provider in self.exclude:
            chosen = self._first(_CHOSEN, ask)
            if chosen is not None:
                return chosen
        if self.payer is not None and not is_for(ask, self.payer):
            return Reason.PAYER
        return _unacceptable(self, ask, facts)

    def _first(self, predicates: tuple[tuple[Reason, _Predicate], ...], ask: Ask) -> Reason | None:
        for reason, excludes in predicates:
            if excludes(self, ask):
                return reason
        return None

    def _first_unmet(self, ask: Ask) -> Reason | None:
        unmet = None if self.require is NO_REQUIREMENTS else self.require.first_unmet(ask)
        return None if unmet is None else _REQUIRED[unmet]


_Predicate = Callable[[Demand, Ask], bool]

_MODEL: tuple[tuple[Reason, _Predicate], ...] = ((Reason.MODEL, lambda demand, ask: ask.model != demand.model),)
_CHOSEN: tuple[tuple[Reason, _Predicate], ...] = (
    (Reason.NOT_PINNED, lambda demand, ask: bool(demand.pin) and ask.provider not in demand.pin),
    (Reason.EXCLUDED, lambda demand, ask: ask.provider in demand.exclude),
)
"""Whether the client asks for this provider."""
_ABLE: tuple[tuple[Reason, _Predicate], ...] = (
    (Reason.ROUTE, lambda demand, ask: demand.route is not None and not serves(ask.spec.features, demand.route)),
    (Reason.BATCH_ONLY, lambda demand, ask: not demand.batch and is_batch_only(ask)),
    (Reason.UNSUPPORTED, lambda demand, ask: bool(demand.essential and denied(ask.spec.features, demand.essential))),
    (Reason.TOO_LONG, lambda demand, ask: 0 < ask.context_tokens < demand.input_tokens),
)
"""Whether the ask can answer the request at all. Checked before the requirements."""

_REQUIRED = {
    "region": Reason.REGION,
    "tier": Reason.TIER,
    "precision": Reason.PRECISION,
    "engine": Reason.ENGINE,
    "features": Reason.FEATURES,
    "context_tokens": Reason.CONTEXT,
}
"""The reason for each field of `Requirements` that an ask does not meet."""


def _unacceptable(demand: Demand, ask: Ask, facts: Facts) -> Reason | None:
    """Returns the first reason why the provider does not offer it on acceptable terms now, checked after the requirements."""
    if facts.stake is not None and facts.stake < demand.min_stake:
        return Reason.STAKE
    if demand.max_input_price is not None or demand.max_output_price is not None:
        too_high = _too_expensive(demand, ask)
        if too_high is not None:
            return too_high
    if not ask.valid_from <= facts.now < ask.valid_until:
        return Reason.ASK_EXPIRED
    if facts.free is not None and facts.free < 1:
        return Reason.BUSY
    return _distrusted(demand, facts)


def _distrusted(demand: Demand, facts: Facts) -> Reason | None:
    if facts.reputation is not None and facts.reputation < demand.min_reputation:
        return Reason.REPUTATION
    if facts.integrity is not None and facts.integrity < demand.min_integrity:
        return Reason.INTEGRITY
    return None


def _too_expensive(demand: Demand, ask: Ask) -> Reason | None:
    if demand.max_input_price is not None and ask.input_price > demand.max_input_price:
        return Reason.INPUT_PRICE
    if demand.max_output_price is not None and ask.output_price > demand.max_output_price:
        return Reason.OUTPUT_PRICE
    return None


def is_batch_only(ask: Ask) -> bool:
    """Whether an ask is for jobs of the class `batch` alone."""
    return BATCH_ONLY in ask.spec.features


def audience(ask: Ask) -> str:
    """Whom the price of an ask is for, for people; "" for everybody."""
    rule = payer_rule(ask.spec.features)
    parts = ("batch jobs" if is_batch_only(ask) else "", "" if rule is None else rule.words)
    return " of ".join(filter(None, parts))


def context_refusal(model: str, longest: int, least: int) -> Refusal:
    """The error of a request of at least `least` input tokens, for a model whose longest context on offer is `longest` tokens.

    Its words and its code are those of OpenAI's error, by which clients recognise it and shorten the conversation.
    """
    refusal = Refusal(
        Code.CONTEXT_LENGTH_EXCEEDED,
        f"This model's maximum context length is {longest} tokens, the longest on offer for {model!r}. "
        f"However, your request has at least {least} tokens. Please reduce the length of the messages.",
    )
    refusal.param = "messages"
    return refusal


def _read_addresses(listed: Iterable[str]) -> frozenset[Address]:
    return frozenset(map(parse_address, listed))


def _write_addresses(addresses: frozenset[Address]) -> list[Address]:
    return sorted(addresses)[:MAX_ADDRESSES]


_MEMBERS: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "maxInputPrice": ("max_input_price", int, int),
    "maxOutputPrice": ("max_output_price", int, int),
    "route": ("route", str, check_route),
    "require": ("require", Requirements.to_json, Requirements.from_json),
    "needs": ("needs", Requirements.to_json, lambda raw: Requirements.from_json(raw, "needs")),
    "essential": ("essential", list, lambda raw: tuple(read_items(raw, "essential", MAX_NAMES))),
    "inputTokens": ("input_tokens", int, lambda raw: read_count(raw, "inputTokens")),
    "likelyTokens": ("likely_tokens", int, lambda raw: read_count(raw, "likelyTokens")),
    "maxOutput": ("max_output", int, lambda raw: read_count(raw, "maxOutput")),
    "weights": ("weights", Weights.to_json, Weights.from_json),
    "concurrent": ("concurrent", int, lambda raw: min(read_count(raw, "concurrent"), MAX_CONCURRENT)),
    "minReputation": ("min_reputation", int, int),
    "minIntegrity": ("min_integrity", int, int),
    "minStake": ("min_stake", int, int),
    "sort": ("sort", str, str),
    "batch": ("batch", bool, bool),
    "providers": ("pin", sorted, _read_addresses),
    "exclude": ("exclude", _write_addresses, _read_addresses),
}
"""JSON members in the order of the wire: the field of `Demand`, its writer and its reader."""
_DEFAULTS = {field.name: field.default for field in fields(Demand)}
