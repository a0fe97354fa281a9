"""Shortlists: the asks that a job is offered to. The coordinator proposes them; this module verifies and caches them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import structlog

from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.protocol.criteria import MAX_CONCURRENT, Demand, Facts, Reason
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Ask
from tallystick.protocol.sealing import SUITES
from tallystick.protocol.types import Address, Hash

log = structlog.get_logger()
MAX_CACHED = 256
"""Demands whose shortlists are cached."""
OWING_SECONDS = 60
"""When the receipts that a provider owes may have come: ended jobs are asked for about as often."""

FindStale = Callable[[Domain, Sequence[Verified[Ask]]], Awaitable[Mapping[Hash, str]]]
"""Returns why some asks must not be ordered on, by digest; see `ledger.ask_freshness`."""


def objection(demand: Demand, ask: Ask, now: int) -> str | None:
    """Returns why this client does not order on an ask at a Unix time, or None if it does. The signature is not checked."""
    reason = demand.objection(ask, Facts(now))
    if reason is None and ask.sealing_suite not in SUITES:
        reason = Reason.SEALING_SUITE
    return None if reason is None else reason.value


def usable_asks(listed: Iterable[Signed[Ask]], demand: Demand, domain: Domain, now: int) -> list[Verified[Ask]]:
    """Returns the asks that are signed by their providers and meet the demand, in the same order. Logs the others."""
    verified: list[Verified[Ask]] = []
    for signed in listed:
        reason = objection(demand, signed.message, now)
        if reason is None:
            try:
                verified.append(signed.verify(domain))
            except TallyError as error:
                reason = str(error)
        if reason is not None:
            _log_left_out(signed.message, reason)
    return verified


def _log_left_out(ask: Ask, reason: str) -> None:
    log.warning("an ask was left out", provider=ask.provider, model=ask.model[:100], reason=reason)


@dataclass(slots=True)
class _CachedShortlist:
    task: asyncio.Task[list[Verified[Ask]]]
    expires_at: float

    def is_valid(self, now: float) -> bool:
        """A route that nobody serves is remembered too: each request in another dialect asks for its own route first."""
        return now < self.expires_at and (not _failed(self.task) or _is_unserved(self.task))


class Exclusions(NamedTuple):
    """The providers that a wallet excludes now. `owing`: those that get orders again once their receipts come."""

    providers: frozenset[Address]
    owing: frozenset[Address]


class ShortlistCache:
    """Queries the coordinator once per demand in `seconds`; concurrent callers with the same demand share the query.

    `limit`: asks of a shortlist. `context` returns the deployment and the excluded providers. `now` is Unix time in seconds.
    `stake_of` returns a provider's stake in base units, or None if the chain cannot be queried.
    """

    def __init__(
        self,
        coordinator: CoordinatorClient,
        payer: Address,
        *,
        limit: int,
        seconds: float,
        context: Callable[[], Awaitable[tuple[Domain, Exclusions]]],
        now: Callable[[], int],
        stake_of: Callable[[Address], Awaitable[int | None]],
        find_stale: FindStale,
    ) -> None:
        self._stake_of, self._find_stale = stake_of, find_stale
        self._coordinator, self._payer, self._limit, self._seconds = coordinator, payer, limit, seconds
        self._context, self._now = context, now
        self._choosing: Counter[str] = Counter()
        """Jobs of each model that look for a slot."""
        self._cached: OrderedDict[Demand, _CachedShortlist] = OrderedDict()

    async def get(self, demand: Demand) -> tuple[list[Verified[Ask]], bool]:
        """Returns the asks, best first, and whether they come from the cache.

        Raises Refusal or Unavailable, with the reason, if there is no usable ask.
        """
        clock = asyncio.get_running_loop().time()
        cached = self._cached.get(demand)
        from_cache = cached is not None and cached.is_valid(clock)
        if cached is None or not from_cache:
            query = asyncio.create_task(self._query(demand), name="shortlist")
            query.add_done_callback(_failed)
            cached = self._cached[demand] = _CachedShortlist(query, clock + self._seconds)
            self._cached.move_to_end(demand)
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        task = cached.task
        return (task.result() if task.done() else await asyncio.shield(task)), from_cache

    @contextlib.contextmanager
    def choosing(self, model: str) -> Iterator[None]:
        """Counts a job of a model while it looks for a slot."""
        self._choosing[model] += 1
        try:
            yield
        finally:
            self._choosing[model] -= 1
            if not self._choosing[model]:
                del self._choosing[model]

    async def fresh(self, demand: Demand) -> list[Verified[Ask]]:
        """Returns the asks of a new query, best first, after those of the cache were busy; raises as `get`.

        If several jobs of the model are `choosing`, each gets a list of its own, which begins at another free slot.
        """
        self.forget(demand)
        concurrent = self._choosing[demand.model] - 1
        if concurrent < 1:
            return (await self.get(demand))[0]
        return await self._query(replace(demand, concurrent=min(concurrent, MAX_CONCURRENT)))

    async def of_provider(self, demand: Demand, provider: Address) -> list[Verified[Ask]]:
        """The asks of one provider that meet the demand; none if it has none, if it may not be chosen, or if nobody can say."""
        if provider in demand.exclude or (demand.pin and provider not in demand.pin):
            return []
        try:
            asks, _ = await self.get(replace(demand, pin=frozenset((provider,))))
        except (Refusal, Unavailable):
            return []
        return asks

    def forget(self, demand: Demand | None = None) -> None:
        """Drops the cached shortlist of a demand, or all of them."""
        if demand is None:
            self._cached.clear()
        else:
            self._cached.pop(demand, None)

    async def _preferred(self, demand: Demand, domain: Domain, listed: set[Address]) -> list[Verified[Ask]]:
        """Returns the asks of preferred providers that meet the demand but are not among the best."""
        missing = frozenset(demand.prefer) - listed - demand.exclude
        if not missing or (demand.pin and not missing & demand.pin):
            return []
        pinned = replace(demand, pin=missing)
        try:
            asks = await self._coordinator.shortlist(pinned.to_json(self._payer))
        except (Refusal, Unavailable):
            return []
        return await self._best_asks(asks, pinned, domain)

    async def _best_asks(self, listed: Iterable[Signed[Ask]], demand: Demand, domain: Domain) -> list[Verified[Ask]]:
        """Returns the best usable ask of each provider, in the coordinator's order, without stale asks."""
        asks = usable_asks(listed, demand, domain, self._now())
        stale = await self._find_stale(domain, asks) if asks else {}
        best: dict[Address, Verified[Ask]] = {}
        for ask in asks:
            if ask.digest in stale:
                _log_left_out(ask.message, stale[ask.digest])
            else:
                best.setdefault(ask.message.provider, ask)
        return list(best.values())

    async def _with_stake(self, demand: Demand, asks: list[Verified[Ask]]) -> list[Verified[Ask]]:
        """Returns the asks of providers with the demanded stake. The chain is asked; if it cannot be, the ask stays."""
        if not demand.min_stake:
            return asks
        stakes = await asyncio.gather(*(self._stake_of(ask.message.provider) for ask in asks))
        return [ask for ask, stake in zip(asks, stakes, strict=True) if stake is None or stake >= demand.min_stake]

    async def _query(self, demand: Demand) -> list[Verified[Ask]]:
        domain, excluded = await self._context()
        query = replace(demand, exclude=demand.exclude | excluded.providers, limit=self._limit)
        try:
            listed = await self._coordinator.shortlist(query.to_json(self._payer))
        except (Refusal, Unavailable) as error:
            raise _with_excluded(error, excluded) from error
        asks = (await self._best_asks(listed, query, domain))[: self._limit]
        asks += await self._preferred(query, domain, {ask.message.provider for ask in asks})
        asks = await self._with_stake(demand, asks)
        rank = {provider: number for number, provider in enumerate(demand.prefer)}
        asks = sorted(asks, key=lambda ask: rank.get(ask.message.provider, len(rank)))[: self._limit]
        if not asks:
            text = f"the coordinator offered {len(listed)} asks for {demand.model!r}, none of them usable; the log says why"
            raise Unavailable(Code.NO_PROVIDER, text, fault=Fault.COORDINATOR)
        return asks


def _with_excluded(error: Refusal | Unavailable, excluded: Exclusions) -> Refusal | Unavailable:
    """Adds the providers that this wallet excludes to the coordinator's refusal, final unless some come back by themselves."""
    if not excluded.providers or error.code not in (Code.NO_PROVIDER, Code.NODE_BUSY):
        return error
    text = f"{error}; this wallet excludes {len(excluded.providers)} providers, tally receipt evidence lists them"
    if not excluded.owing:
        told = type(error)(error.code, text, fault=error.fault)
    else:
        told = Unavailable(error.code, f"{text}; {len(excluded.owing)} of them until their receipts come", fault=error.fault)
        told.retry_after = OWING_SECONDS
    told.retry_after = error.retry_after or told.retry_after
    return told


def _failed(task: asyncio.Task[Any]) -> bool:
    """Whether a task ended without a result. Reading its exception keeps asyncio from reporting it as never retrieved."""
    return task.done() and (task.cancelled() or task.exception() is not None)


def _is_unserved(task: asyncio.Task[Any]) -> bool:
    error = None if task.cancelled() else task.exception()
    return isinstance(error, Refusal) and error.code is Code.UNKNOWN_ROUTE
