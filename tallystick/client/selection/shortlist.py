"""Shortlists: which asks a job is offered to. The coordinator proposes, this module verifies, and remembers for seconds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.protocol.demand import Demand, Facts, Reason
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Ask
from tallystick.protocol.sealing import SUITES
from tallystick.protocol.types import Address, Hash

log = structlog.get_logger()
REMEMBERED = 256


Stale = Callable[[Domain, Sequence[Verified[Ask]]], Awaitable[Mapping[Hash, str]]]
"""Tells why some asks are not to be ordered on, by digest."""


def objection(demand: Demand, ask: Ask, now: int) -> str | None:
    """Returns why this client does not order on an ask at a Unix time, or None if it does. The signature is not checked."""
    reason = demand.objection(ask, Facts(now))
    if reason is None and ask.sealing_suite not in SUITES:
        reason = Reason.SEALING_SUITE
    return None if reason is None else reason.value


def usable(listed: Iterable[Signed[Ask]], demand: Demand, domain: Domain, now: int) -> list[Verified[Ask]]:
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
            _left_out(signed.message, reason)
    return verified


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
            found = await self._coordinator.shortlist(replace(demand, pin=missing).to_json(self._payer))
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
        asked = replace(demand, exclude=demand.exclude | frozenset(barred), limit=self._limit)
        try:
            listed = await self._coordinator.shortlist(asked.to_json(self._payer))
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
