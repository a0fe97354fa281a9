"""Access tiers at a coordinator: limits by wallet and by settled amounts, which are read once a minute at most."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.jobs import accounts
from coordinator.jobs.accounts import SETTLED_SECONDS, AccessTiers, AccountTab, SettledAmounts
from coordinator.ports import KnownJob
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.tiers import Tier, Tiers
from tallystick.protocol.types import Address, Amount
from tests.coordinator.harness import Clock, person

ANN, BOB = person("ann").address, person("bob").address
NEW = Tier(name="new", models=("small",), jobs_in_flight=2, jobs_per_minute=60)
KNOWN = Tier(name="known", settled_at_least=Amount(10))


class Settled:
    """Settled amounts, and how often they were read."""

    def __init__(self) -> None:
        self.amounts: dict[Address, int] = {}
        self.reads = 0
        self.fault: TallyError | None = None

    async def settled_by(self, payer: Address) -> dict[Address, Amount]:
        self.reads += 1
        if self.fault is not None:
            raise self.fault
        settled = self.amounts.get(payer, 0)
        return {ANN: Amount(settled // 2), BOB: Amount(settled - settled // 2)}

    async def jobs_of(self, account: Address, limit: int) -> list[KnownJob]:
        raise AssertionError((account, limit))

    async def tabs_of(self, account: Address, limit: int) -> list[AccountTab]:
        raise AssertionError((account, limit))


def tiered(tiers: Tiers, store: Settled, tick: Callable[[], float]) -> AccessTiers:
    """Access tiers by the amounts of a store."""
    return AccessTiers(tiers, SettledAmounts(store, tick), tick)


async def test_settled_amounts_are_read_once_a_minute() -> None:
    """A payer's jobs of one minute cost one read of the database; what was settled since counts afterwards."""
    store, clock = Settled(), Clock()
    tiers = tiered(Tiers((NEW, KNOWN)), store, clock.tick)
    for _ in range(10):
        assert await tiers.tier_of(ANN) == (NEW, 0)
    store.amounts[ANN] = 10
    clock.seconds += SETTLED_SECONDS - 1
    assert await tiers.tier_of(ANN) == (NEW, 0)
    assert store.reads == 1
    clock.seconds += 1
    assert await tiers.tier_of(ANN) == (KNOWN, 10)
    assert await tiers.tier_of(BOB) == (NEW, 0)


async def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of names forgets the payer of longest ago, who is read again."""
    monkeypatch.setattr(accounts, "MAX_REMEMBERED", 6)
    store = Settled()
    tiers = tiered(Tiers((NEW, KNOWN)), store, Clock().tick)
    for name in (ANN, BOB, person("cid").address, ANN):
        await tiers.tier_of(name)
    assert store.reads == 4


async def test_without_settled_tiers_nothing_is_read() -> None:
    """Tiers by wallet alone read nothing, and without any tier there is none to have."""
    store = Settled()
    assert await tiered(Tiers((NEW, Tier(name="listed", wallets=(ANN,)))), store, Clock().tick).tier_of(BOB) == (NEW, 0)
    assert await tiered(Tiers(()), store, Clock().tick).tier_of(BOB) is None
    assert store.reads == 0


async def test_jobs_in_flight() -> None:
    """Each payer has its own count; a job that was refused is not counted; one that left makes room."""
    tiers = tiered(Tiers((NEW,)), Settled(), Clock().tick)
    await tiers.enter(ANN, "small")
    with pytest.raises(Refusal) as refused:
        await tiers.enter(ANN, "large")
    assert refused.value.code is Code.TIER_LIMIT
    await tiers.enter(ANN, "small")
    with pytest.raises(Unavailable, match="tier 'new' allows 2 at the same time") as limited:
        await tiers.enter(ANN, "small")
    assert (limited.value.code, limited.value.retry_after) == (Code.RATE_LIMITED, 1)
    await tiers.enter(BOB, "small")
    tiers.leave(ANN)
    await tiers.enter(ANN, "small")


async def test_jobs_of_a_minute() -> None:
    """A payer has so many at once, and one more each second; the error says when."""
    clock = Clock()
    tiers = tiered(Tiers((Tier(name="slow", jobs_per_minute=2),)), Settled(), clock.tick)
    for _ in range(2):
        await tiers.enter(ANN, "m")
    with pytest.raises(Unavailable, match="2 jobs a minute") as limited:
        await tiers.enter(ANN, "m")
    assert limited.value.retry_after == 30
    await tiers.enter(BOB, "m")
    clock.seconds += 31
    await tiers.enter(ANN, "m")


async def test_a_job_that_was_not_placed() -> None:
    """It is given back: in flight, and of the minute of the tier that counted it."""
    tiers = tiered(Tiers((Tier(name="slow", jobs_per_minute=1, jobs_in_flight=1),)), Settled(), Clock().tick)
    for _ in range(3):
        tiers.give_back(ANN, await tiers.enter(ANN, "m"))
    tier = await tiers.enter(ANN, "m")
    assert tier is not None
    assert tier.name == "slow"
    with pytest.raises(Unavailable, match="1 at the same time"):
        await tiers.enter(ANN, "m")
    tiers.leave(ANN)
    with pytest.raises(Unavailable, match="1 jobs a minute"):
        await tiers.enter(ANN, "m")
    none = tiered(Tiers(()), Settled(), Clock().tick)
    none.give_back(ANN, await none.enter(ANN, "m"))
    assert not none._running


async def test_a_database_that_does_not_answer() -> None:
    """Nobody is let in by a guess: the job may come again."""
    store = Settled()
    store.fault = Unavailable(Code.DATABASE_UNAVAILABLE, "away")
    tiers = tiered(Tiers((NEW, KNOWN)), store, Clock().tick)
    with pytest.raises(Unavailable):
        await tiers.enter(ANN, "small")


async def test_explained() -> None:
    """An explanation has the limits, what was settled, what lifts them, and what the tier has against the model."""
    store = Settled()
    store.amounts[ANN] = 4
    told = await tiered(Tiers((NEW, KNOWN)), store, Clock().tick).explain(ANN, "large")
    assert told is not None
    assert (told["name"], told["jobsInFlight"], told["jobsPerMinute"], told["models"]) == ("new", 2, 60, ["small"])
    assert told["settled"] == "0.000004"
    assert told["next"] == "tier 'known' needs 0.00001 dollars settled on chain, 0.000006 more than now"
    assert "'large' is not for wallets of tier 'new'" in told["refusal"]
