"""Choosing providers: what a request may say, on top of what the config says, and why each ask will do or not. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from tallystick.client.config import MAX_LABEL, ApiKey, ClientConfig
from tallystick.client.selection.shortlist import objection
from tallystick.protocol.demand import Demand
from tallystick.protocol.errors import BadMessage, Fault
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.link import read_ask
from tallystick.protocol.messages import Ask
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.routes import ALWAYS
from tallystick.protocol.types import Address, Amount, parse_address, parse_amount
from tallystick.protocol.wire import loads

HEADER = "x-tally-options"
MAX_PROVIDERS = 256
MAX_WHY = 500
"""Characters of a coordinator's reason that are shown."""


class _Narrowing(TypedDict):
    """The criteria that a request can make stricter than the config, and never looser."""

    max_input_price: int | None
    max_output_price: int | None
    require: Requirements
    min_reputation: int
    min_stake: int


class Choice(TypedDict, total=False):
    """The criteria that a request sets for its providers; `Demand` has the meaning of each. Addresses are hexadecimal text.

    Maxima, minima and `require` narrow what the config says; `exclude` adds to it; `pin`, `prefer` and `sort` replace it.
    """

    max_input_price: int | None
    max_output_price: int | None
    pin: Iterable[str]
    prefer: Iterable[str]
    exclude: Iterable[str]
    require: Requirements
    min_reputation: int
    min_stake: int
    sort: str


class Options(Choice, total=False):
    """What the header X-Tally-Options and a caller's key say: a choice, and how `Market.submit` is to bound and label the job."""

    models: Collection[str]
    max_cost: Amount | None
    label: str
    affinity: str


def demand_of(config: ClientConfig, model: str, route: str, choice: Choice) -> Demand:
    """The demand of a request. Raises BadMessage, or Refusal where it asks for what the config does not allow."""
    excluded = (*config.exclude, *choice.get("exclude", ()))
    return Demand(
        model=model,
        route=None if route in ALWAYS else route,
        pin=frozenset(parse_address(address, "pin") for address in choice.get("pin", ())),
        exclude=frozenset(parse_address(address, "exclude") for address in excluded),
        prefer=tuple(parse_address(address, "prefer") for address in choice.get("prefer", config.prefer)),
        sort=choice.get("sort", config.sort),
        **_narrowed(config, choice),
    )


def _narrowed(policy: ClientConfig | ApiKey, choice: Choice) -> _Narrowing:
    """Returns the strictest of what a policy and a request say, for the criteria that a request can only make stricter. Raises
    Refusal if no ask can meet both.
    """
    return {
        "max_input_price": least(policy.max_input_price, choice.get("max_input_price")),
        "max_output_price": least(policy.max_output_price, choice.get("max_output_price")),
        "require": policy.require.intersection(choice.get("require", Requirements())),
        "min_reputation": max(policy.min_reputation, choice.get("min_reputation", 0)),
        "min_stake": max(policy.min_stake, choice.get("min_stake", 0)),
    }


def under(config: ClientConfig, caller: ApiKey | None, options: Options) -> Options:
    """A request's options, held to what its caller's key allows. Raises Refusal where they ask for more."""
    if caller is None:
        return options
    held = cast("Options", {**options, **_narrowed(caller, options)})
    most = least(caller.max_cost, options.get("max_cost"))
    held["max_cost"] = None if most is None else Amount(most)
    held["label"] = "/".join(part for part in (caller.label, options.get("label")) if part)
    held["models"] = sorted(config.models_of(caller))
    return held


def least(*limits: int | None) -> int | None:
    """The strictest of some limits, of which None is none."""
    return min((limit for limit in limits if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class Extras:
    """What the header says that is the gateway's to do: models to fall back on, whether to keep the answer in the cache."""

    fallbacks: tuple[str, ...] = ()
    cache: bool | None = None


def read_options(header: str | None) -> tuple[Options, Extras]:
    """A request's options, out of the header X-Tally-Options: a JSON object in which amounts and prices are dollars, written as
    text. Raises BadMessage that names the member.
    """
    if header is None:
        return {}, Extras()
    raw = loads(header, HEADER)
    if not isinstance(raw, dict):
        raise BadMessage(f"{HEADER}: expected a JSON object")
    unknown = sorted(map(str, raw.keys() - _READERS.keys()))
    if unknown:
        raise BadMessage(f"{HEADER}: unknown: {', '.join(unknown)[:200]}; known are {', '.join(_READERS)}")
    read: dict[str, Any] = {name: _READERS[name](value, f"{HEADER}.{name}") for name, value in raw.items()}
    extras = Extras(read.pop("fallbacks", ()), read.pop("cache", None))
    return cast("Options", read), extras


def _dollars(value: object, where: str) -> Amount:
    if not isinstance(value, str):
        raise BadMessage(f'{where}: expected dollars as text, such as "0.50"')
    return parse_amount(value, field=where)


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise BadMessage(f"{where}: expected true or false")
    return value


def _texts(value: object, where: str) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else read_items(value, where, MAX_PROVIDERS)
    return tuple(read_text(one, where) for one in listed)


_READERS: dict[str, Callable[[object, str], Any]] = {
    "max_cost": _dollars,
    "max_input_price": _dollars,
    "max_output_price": _dollars,
    "pin": _texts,
    "prefer": _texts,
    "exclude": _texts,
    "require": Requirements.from_json,
    "min_reputation": lambda value, where: read_count(value, where, high=100),
    "min_stake": _dollars,
    "sort": read_text,
    "fallbacks": _texts,
    "cache": _flag,
    "affinity": lambda value, where: read_text(value, where, MAX_LABEL),
    "label": lambda value, where: read_text(value, where, MAX_LABEL),
}
"""How each option is read."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One ask, and why it would not be offered the job; empty if it would. Speeds are as its node measured them, 0 for unknown;
    `reputation` is a percentage of the coordinator's.
    """

    ask: Ask
    why: str
    free: int
    tokens_per_second: int
    first_token_ms: int
    reputation: int


def explained(listed: Iterable[Mapping[str, Any]], demand: Demand, frozen: Mapping[Address, str], now: int) -> list[Explained]:
    """What the coordinator says of each ask, with what this client itself has against it; those that will do first. What makes no
    sense is left out.

    Raises BadMessage where nothing makes sense.
    """
    told: list[Explained] = []
    nonsense: BadMessage | None = None
    for entry in listed:
        try:
            told.append(_explained(entry, demand, frozen, now))
        except BadMessage as error:
            nonsense = error
    if nonsense is not None and not told:
        nonsense.fault = Fault.COORDINATOR
        raise nonsense
    return sorted(told, key=lambda one: bool(one.why))


def _explained(entry: Mapping[str, Any], demand: Demand, frozen: Mapping[Address, str], now: int) -> Explained:
    signed = read_ask(entry.get("ask"))
    numbers = (read_count(entry.get(name, 0), name) for name in ("free", "tokensPerSecond", "firstTokenMs", "reputation"))
    ask = signed.message
    against = (objection(demand, ask, now), entry.get("why"), frozen.get(ask.provider))
    return Explained(ask, next((str(why)[:MAX_WHY] for why in against if why), ""), *numbers)
