"""Shortlists: which asks a job is offered to. The coordinator proposes, this module verifies, and remembers for seconds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Ask
from tallystick.protocol.requirements import NOTHING, Requirements
from tallystick.protocol.routes import ALWAYS, CHAT, serves
from tallystick.protocol.sealing import SUITES
from tallystick.protocol.types import Address, Hash, parse_address

log = structlog.get_logger()
REMEMBERED = 256
MAX_EXCLUDED = 256


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job may be matched with. Prices are maxima in base units per 1,000,000 tokens; empty sets do not restrict."""

    model: str
    max_input_price: int | None = None
    max_output_price: int | None = None
    pin: frozenset[Address] = frozenset()
    exclude: frozenset[Address] = frozenset()
    route: str | None = None
    """A route that not every ask serves."""
    require: Requirements = NOTHING
    min_reputation: int = 0
    min_stake: int = 0
    """Base units that a provider stands to lose."""
    sort: str = "price"
    prefer: tuple[Address, ...] = ()
    """Those of the shortlist that come first, in this order."""

    @classmethod
    def of(
        cls,
        model: str,
        max_input_price: int | None,
        max_output_price: int | None,
        *,
        pin: Iterable[str],
        exclude: Iterable[str],
        path: str = CHAT,
        require: Requirements = NOTHING,
        min_reputation: int = 0,
        min_stake: int = 0,
        sort: str = "price",
        prefer: Iterable[str] = (),
    ) -> Demand:
        """A demand with addresses as people write them. Raises BadMessage."""
        pinned = frozenset(parse_address(address, "pin") for address in pin)
        excluded = frozenset(parse_address(address, "exclude") for address in exclude)
        preferred = tuple(parse_address(address, "prefer") for address in prefer)
        route = None if path in ALWAYS else path
        return cls(
            model=model,
            max_input_price=max_input_price,
            max_output_price=max_output_price,
            pin=pinned,
            exclude=excluded,
            route=route,
            require=require,
            min_reputation=min_reputation,
            min_stake=min_stake,
            sort=sort,
            prefer=preferred,
        )

    @property
    def ranked(self) -> bool:
        """Whether the order of the shortlist is the client's own, and not that of the price."""
        return self.sort != "price" or bool(self.prefer)

    def to_json(self, payer: Address, limit: int) -> dict[str, Any]:
        """The body of POST /v1/shortlist."""
        body: dict[str, Any] = {"model": self.model, "payer": payer, "limit": limit}
        if self.max_input_price is not None:
            body["maxInputPrice"] = int(self.max_input_price)
        if self.max_output_price is not None:
            body["maxOutputPrice"] = int(self.max_output_price)
        if self.route is not None:
            body["route"] = self.route
        if self.require != NOTHING:
            body["require"] = self.require.to_json()
        if self.min_reputation:
            body["minReputation"] = self.min_reputation
        if self.min_stake:
            body["minStake"] = int(self.min_stake)
        if self.sort != "price":
            body["sort"] = self.sort
        if self.pin:
            body["providers"] = sorted(self.pin)
        if self.exclude:
            body["exclude"] = sorted(self.exclude)[:MAX_EXCLUDED]
        return body

    def objection(self, ask: Ask, now: int) -> str | None:
        """Why this ask does not meet the demand at that Unix time, or None."""
        return next((reason for reason, excludes in _OBJECTIONS if excludes(self, ask, now)), None)


_OBJECTIONS: tuple[tuple[str, Callable[[Demand, Ask, int], bool]], ...] = (
    ("another model", lambda d, a, _: a.model != d.model),
    ("not valid now", lambda _, a, now: not a.valid_from <= now < a.valid_until),
    ("input price above the maximum", lambda d, a, _: d.max_input_price is not None and a.input_price > d.max_input_price),
    ("output price above the maximum", lambda d, a, _: d.max_output_price is not None and a.output_price > d.max_output_price),
    ("a provider that was not asked for", lambda d, a, _: bool(d.pin) and a.provider not in d.pin),
    ("an excluded provider", lambda d, a, _: a.provider in d.exclude),
    ("a route that it does not serve", lambda d, a, _: d.route is not None and not serves(a.spec.features, d.route)),
    ("a spec that was not asked for", lambda d, a, _: d.require.lacks(a) is not None),
    ("an unknown sealing suite", lambda _, a, __: a.sealing_suite not in SUITES),
)


Stale = Callable[[Domain, Sequence[Verified[Ask]]], Awaitable[Mapping[Hash, str]]]
"""Tells why some asks are not to be ordered on, by digest."""


def usable(listed: Iterable[Signed[Ask]], demand: Demand, domain: Domain, now: int) -> list[Verified[Ask]]:
    """The asks that are signed by their providers and meet the demand, in the same order. Logs the others."""
    found: list[Verified[Ask]] = []
    for signed in listed:
        reason = demand.objection(signed.message, now)
        if reason is None:
            try:
                found.append(signed.verify(domain))
            except TallyError as error:
                reason = str(error)
        if reason is not None:
            _left_out(signed.message, reason)
    return found


def _left_out(ask: Ask, reason: str) -> None:
    log.warning("an ask was left out", provider=ask.provider, model=ask.model[:100], reason=reason)


@dataclass(slots=True)
class _Kept:
    task: asyncio.Task[list[Verified[Ask]]]
    until: float

    def good(self, now: float) -> bool:
        return now < self.until and not _failed(self.task)


class Shortlists:
    """Asks the coordinator once for each demand and `seconds`; callers with the same demand share the question.

    `context` gives the domain and the providers that get no more orders; `now` is Unix time in seconds; `staked` what a
    provider has staked, None where the chain can't be asked; `stale` looks at seqs.
    """

    def __init__(
        self,
        coordinator: CoordinatorClient,
        payer: Address,
        *,
        limit: int,
        seconds: float,
        context: Callable[[], Awaitable[tuple[Domain, Iterable[Address]]]],
        now: Callable[[], int],
        staked: Callable[[Address], Awaitable[int | None]],
        stale: Stale,
    ) -> None:
        self._staked, self._stale = staked, stale
        self._coordinator, self._payer, self._limit, self._seconds = coordinator, payer, limit, seconds
        self._context, self._now = context, now
        self._kept: OrderedDict[Demand, _Kept] = OrderedDict()

    async def get(self, demand: Demand) -> tuple[list[Verified[Ask]], bool]:
        """The asks, best first, and whether they were remembered. Raises Refusal or Unavailable that say why there is none."""
        clock = asyncio.get_running_loop().time()
        kept = self._kept.get(demand)
        remembered = kept is not None and kept.good(clock)
        if kept is None or not remembered:
            task = asyncio.create_task(self._ask(demand), name="shortlist")
            task.add_done_callback(_failed)
            kept = self._kept[demand] = _Kept(task, clock + self._seconds)
            self._kept.move_to_end(demand)
            if len(self._kept) > REMEMBERED:
                self._kept.popitem(last=False)
        return await asyncio.shield(kept.task), remembered

    def forget(self, demand: Demand | None = None) -> None:
        """Asks again next time, for this demand or for all."""
        if demand is None:
            self._kept.clear()
        else:
            self._kept.pop(demand, None)

    async def _preferred(self, demand: Demand, domain: Domain, listed: set[Address]) -> list[Verified[Ask]]:
        """Asks of preferred providers that are not among the best, where they fit the demand."""
        missing = frozenset(demand.prefer) - listed - demand.exclude
        if not missing or (demand.pin and not missing & demand.pin):
            return []
        try:
            found = await self._coordinator.shortlist(replace(demand, pin=missing).to_json(self._payer, self._limit))
        except (Refusal, Unavailable):
            return []
        return await self._usable(found, replace(demand, pin=missing), domain)

    async def _usable(self, listed: Iterable[Signed[Ask]], demand: Demand, domain: Domain) -> list[Verified[Ask]]:
        """The best of each provider, as the coordinator ranks them, without what is stale."""
        found = usable(listed, demand, domain, self._now())
        reasons = await self._stale(domain, found) if found else {}
        best: dict[Address, Verified[Ask]] = {}
        for ask in found:
            if ask.digest in reasons:
                _left_out(ask.message, reasons[ask.digest])
            else:
                best.setdefault(ask.message.provider, ask)
        return list(best.values())

    async def _backed(self, demand: Demand, found: list[Verified[Ask]]) -> list[Verified[Ask]]:
        """Those with the stake that is asked for, by the chain's own word where it can be had."""
        if not demand.min_stake:
            return found
        stakes = await asyncio.gather(*(self._staked(ask.message.provider) for ask in found))
        return [ask for ask, stake in zip(found, stakes, strict=True) if stake is None or stake >= demand.min_stake]

    async def _ask(self, demand: Demand) -> list[Verified[Ask]]:
        domain, barred = await self._context()
        asked = replace(demand, exclude=demand.exclude | frozenset(barred))
        try:
            listed = await self._coordinator.shortlist(asked.to_json(self._payer, self._limit))
        except (Refusal, Unavailable) as error:
            raise _with_barred(error, len(frozenset(barred))) from error
        found = (await self._usable(listed, asked, domain))[: self._limit]
        found += await self._preferred(asked, domain, {ask.message.provider for ask in found})
        found = await self._backed(demand, found)
        place = {provider: number for number, provider in enumerate(demand.prefer)}
        found = sorted(found, key=lambda ask: place.get(ask.message.provider, len(place)))[: self._limit]
        if not found:
            text = f"the coordinator offered no usable ask for {demand.model!r} among {len(listed)}; the log says why"
            raise Unavailable(Code.NO_PROVIDER, text, fault=Fault.COORDINATOR)
        return found


def _with_barred(error: Refusal | Unavailable, barred: int) -> Refusal | Unavailable:
    """The coordinator's no, with whom this client left out itself."""
    if not barred or error.code not in (Code.NO_PROVIDER, Code.NODE_BUSY):
        return error
    text = f"{error}; {barred} left out by this wallet: tally receipt evidence says why"
    return type(error)(error.code, text, fault=error.fault)


def _failed(task: asyncio.Task[Any]) -> bool:
    """Whether it ended without a result; looking keeps asyncio from reporting an error that nobody waited for."""
    return task.done() and (task.cancelled() or task.exception() is not None)
