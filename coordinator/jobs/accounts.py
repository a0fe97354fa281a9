"""What the coordinator keeps for single accounts: the port to their jobs and tabs, and their access tiers."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from coordinator.ports import KnownJob
from tallystick.protocol.errors import Refusal, rate_limited
from tallystick.protocol.tiers import Tier, Tiers
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.runtime.token_bucket import TokenBucket

SETTLED_SECONDS = 60.0
"""How old a payer's settled amounts may be when they decide on its tier and its prices."""
MAX_REMEMBERED = 100_000
"""Payers, and providers with which they settled, that are remembered; others are read again with their next job."""


@dataclass(frozen=True, slots=True)
class AccountTab:
    """A tab of an account. `total`: the highest total of its receipts here; `settled`: what the chain has paid of it, in base
    units; `tx` and `block`: of the last settlement, empty and None without one.
    """

    payer: Address
    provider: Address
    total: Amount
    settled: Amount
    tx: str
    block: int | None


class AccountStore(Protocol):
    """Jobs and tabs by account."""

    async def jobs_of(self, account: Address, limit: int) -> list[KnownJob]:
        """Returns jobs with a receipt of which an account is the payer or a provider, newest first. Raises Unavailable."""
        ...

    async def tabs_of(self, account: Address, limit: int) -> list[AccountTab]:
        """Returns the tabs of an account, as payer or provider, those with the newest jobs first. Raises Unavailable."""
        ...

    async def settled_by(self, payer: Address) -> Mapping[Address, Amount]:
        """Returns what the chain has paid from a payer's purse, by provider. Raises Unavailable."""
        ...


class SettledAmounts:
    """What payers have settled, as the settler read it from the chain: no job makes this coordinator ask the chain.

    `tick` is a monotonic clock in seconds.
    """

    def __init__(self, store: AccountStore, tick: Callable[[], float]) -> None:
        self._store, self._tick = store, tick
        self._known: OrderedDict[Address, tuple[float, Mapping[Address, Amount]]] = OrderedDict()
        self._size = 0

    async def of(self, payer: Address) -> Mapping[Address, Amount]:
        """Returns what a payer has settled, by provider; SETTLED_SECONDS old at most. Raises Unavailable."""
        known = self._known.get(payer)
        if known is not None and self._tick() - known[0] < SETTLED_SECONDS:
            return known[1]
        began = self._tick()
        settled = await self._store.settled_by(payer)
        self._forget(payer)
        self._known[payer] = began, settled
        self._size += 1 + len(settled)
        while self._size > MAX_REMEMBERED:
            self._forget(next(iter(self._known)))
        return settled

    def _forget(self, payer: Address) -> None:
        known = self._known.pop(payer, None)
        if known is not None:
            self._size -= 1 + len(known[1])


class AccessTiers:
    """Applies the tiers of the config to jobs. `tick` is a monotonic clock in seconds."""

    def __init__(self, tiers: Tiers, settled: SettledAmounts, tick: Callable[[], float]) -> None:
        self._tiers, self._settled, self._tick = tiers, settled, tick
        self._running: Counter[Address] = Counter()
        self._rates = {
            tier.name: TokenBucket(tier.jobs_per_minute / 60, float(tier.jobs_per_minute))
            for tier in tiers.tiers
            if tier.jobs_per_minute is not None
        }

    async def tier_of(self, payer: Address) -> tuple[Tier, Amount] | None:
        """Returns a payer's tier, and what it has settled; None without tiers. Raises Unavailable."""
        amounts = await self._settled.of(payer) if self._tiers.count_settled else {}
        settled = Amount(sum(amounts.values()))
        tier = self._tiers.of(payer, settled)
        return None if tier is None else (tier, settled)

    async def check_model(self, payer: Address, model: str) -> None:
        """Raises Refusal (tier_limit) if a payer's tier does not have a model, or no job at all; Unavailable."""
        found = await self.tier_of(payer)
        if found is not None:
            self._tiers.check(*found, model)

    async def enter(self, payer: Address, model: str) -> Tier | None:
        """Counts a job in, until `leave` or `give_back`. Returns the tier that counts it.

        Raises Refusal (tier_limit), Unavailable (rate_limited), and then counts nothing.
        """
        found, tier = await self.tier_of(payer), None
        if found is not None:
            tier, settled = found
            self._tiers.check(tier, settled, model)
            self._tiers.check_running(tier, settled, self._running[payer])
            bucket = self._rates.get(tier.name)
            if bucket is not None and not bucket.try_spend(payer, self._tick()):
                text = f"tier {tier.name!r} allows {tier.jobs_per_minute} jobs a minute (jobs_per_minute)"
                raise rate_limited(f"{text}; {self._tiers.lifts(tier, settled)}", bucket.delay(payer, self._tick()))
        self._running[payer] += 1
        return tier

    def give_back(self, payer: Address, tier: Tier | None) -> None:
        """Counts a job out that was not placed, which uses up nothing of a minute. `tier`: what `enter` returned."""
        bucket = None if tier is None else self._rates.get(tier.name)
        if bucket is not None:
            bucket.refund(payer, self._tick())
        self.leave(payer)

    def leave(self, payer: Address) -> None:
        """Counts a job out."""
        self._running[payer] -= 1
        if self._running[payer] <= 0:
            del self._running[payer]

    async def explain(self, payer: Address, model: str | None = None) -> dict[str, Any] | None:
        """Returns the tier of a payer as JSON, with what would lift it, and what it has against a model; None without tiers."""
        found = await self.tier_of(payer)
        if found is None:
            return None
        tier, settled = found
        refusal = None
        try:
            if model is not None:
                self._tiers.check(tier, settled, model)
        except Refusal as error:
            refusal = str(error)
        return {
            "name": tier.name,
            "models": list(tier.models),
            "jobsInFlight": tier.jobs_in_flight,
            "jobsPerMinute": tier.jobs_per_minute,
            "settled": format_amount(settled),
            "next": self._tiers.lifts(tier, settled),
            "refusal": refusal,
        }
