"""Receipts for unknown jobs: strangers cannot use up memory, database or chain reads with them."""

from __future__ import annotations

import pytest

from coordinator.jobs.receipts import (
    ALL_UNKNOWN_JOBS_BURST,
    ALL_UNKNOWN_JOBS_PER_SECOND,
    UNKNOWN_JOBS_BURST,
    UNKNOWN_JOBS_PER_SECOND,
)
from coordinator.ports import Backing, KnownJob
from coordinator.storage.memory import MemoryFunds, MemoryStore
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address, Amount, JobId
from tests.coordinator.harness import PAYER, World, make_ask, make_order, make_receipt, make_terms, person, unchecked


class _CountingFunds(MemoryFunds):
    """Counts its reads, each of which may cost two chain reads."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        self.asked += 1
        return await super().backing(payer, provider, fresh=fresh)


class _CountingStore(MemoryStore):
    """Counts the lookups of jobs."""

    looked = 0

    async def job(self, job: JobId) -> KnownJob | None:
        self.looked += 1
        return await super().job(job)


def _late(provider: Signer, payer: Signer, number: int, outcome: Outcome = Outcome.COMPLETED) -> tuple[JobId, LateReceipt]:
    job = JobId(number.to_bytes(16, "big"))
    terms = make_terms(make_ask(provider), job)
    order = make_order(terms, provider.address, payer)
    receipt = make_receipt(provider, order, terms, seq=number + 1, outcome=outcome)
    return job, LateReceipt(unchecked(receipt), unchecked(order), terms)


async def _hand_in(world: World, provider: Signer, payer: Signer, number: int) -> Exception | None:
    job, late_receipt = _late(provider, payer, number)
    try:
        await world.market.accept_late(provider.address, job, late_receipt)
    except TallyError as error:
        return error
    return None


def _world() -> tuple[World, _CountingFunds, _CountingStore]:
    funds, store = _CountingFunds(), _CountingStore()
    world = World(funds=funds, store=store)
    return world, funds, store


async def test_a_payer_without_a_purse_leaves_no_trace() -> None:
    """A receipt for a payer without a purse is refused for good and leaves no trace."""
    world, _, store = _world()
    refused = await _hand_in(world, person("ann"), person("nobody"), 1)
    assert isinstance(refused, Refusal)
    assert refused.code is Code.INSUFFICIENT_FUNDS
    assert (world.market.exposure.size, store.jobs, store.receipts, world.market.admission.known) == (0, {}, {}, 0)


@pytest.mark.parametrize("funded", [False, True])
async def test_one_provider_does_not_fill_the_store(funded: bool) -> None:
    """A provider's made-up receipts are examined up to a rate; the others cost neither lookup nor chain read."""
    world, funds, store = _world()
    provider = person("ann")
    outcomes = [
        await _hand_in(world, provider, PAYER if funded else person(f"nobody {number}"), number)
        for number in range(UNKNOWN_JOBS_BURST + 100)
    ]
    refusals = [outcome for outcome in outcomes if isinstance(outcome, Unavailable)]
    assert len(refusals) == 100
    assert {outcome.code for outcome in refusals} == {Code.RATE_LIMITED}
    assert (funds.asked, store.looked) == (UNKNOWN_JOBS_BURST, UNKNOWN_JOBS_BURST)
    assert len(store.jobs) == (UNKNOWN_JOBS_BURST if funded else 0)
    world.clock.seconds += 3 / UNKNOWN_JOBS_PER_SECOND
    more = [await _hand_in(world, provider, PAYER, 10_000 + number) for number in range(10)]
    assert more.count(None) == 3


async def test_many_providers_do_not_fill_it_either() -> None:
    """All keys of a stranger together are bounded too."""
    world, funds, store = _world()
    world.market._receipts._all_unknown_jobs.burst = 20
    for number in range(40):
        await _hand_in(world, person(f"provider {number}"), PAYER, number)
    assert (len(store.jobs), funds.asked) == (20, 20)
    world.clock.seconds += 5 / ALL_UNKNOWN_JOBS_PER_SECOND
    for number in range(40, 60):
        await _hand_in(world, person(f"provider {number}"), PAYER, number)
    assert len(store.jobs) == 25


async def test_strangers_do_not_keep_an_honest_receipt_out() -> None:
    """A receipt of a known job is examined, whatever other nodes send."""
    world, _, _ = _world()
    node = world.node("ann")
    client = await world.started(node)
    world.market._receipts._all_unknown_jobs.burst = 5
    for number in range(20):
        await _hand_in(world, person(f"provider {number}"), PAYER, 500 + number)
    await world.pass_time(11)
    assert await node.hand_in_late(client.job.id, node.receipt(client.job.id, outcome=Outcome.TIMED_OUT))


async def test_receipts_without_an_order_are_paced_too() -> None:
    """Receipts for unknown jobs without an order cost a lookup each, up to a rate."""
    world, _, store = _world()
    for number in range(UNKNOWN_JOBS_BURST):
        assert not await world.market.accept_receipt(person("ann").address, JobId(number.to_bytes(16, "big")), b"{}")
    with pytest.raises(Unavailable):
        await world.market.accept_receipt(person("ann").address, JobId(bytes(16)), b"{}")
    assert store.looked == UNKNOWN_JOBS_BURST


async def test_void_receipts_of_lost_jobs_fill_no_memory() -> None:
    """A receipt at no cost for a lost job is stored, but creates no tab."""
    world, _, store = _world()
    provider = person("ann")
    job, late_receipt = _late(provider, PAYER, 1, Outcome.PROVIDER_ERROR)
    await world.market.accept_late(provider.address, job, late_receipt)
    assert (set(store.jobs), world.market.exposure.size) == ({job}, 0)


async def test_an_empty_purse_may_still_owe() -> None:
    """A receipt of a payer with an empty purse is stored, since the payer may still owe it."""
    world, _, store = _world()
    world.funds.free[PAYER.address] = Amount(0)
    assert await _hand_in(world, person("ann"), PAYER, 1) is None
    assert len(store.jobs) == 1


def test_the_stated_numbers() -> None:
    """All strangers together can add a thousand rows at once to the database, then 172,800 per day."""
    assert (UNKNOWN_JOBS_BURST, UNKNOWN_JOBS_PER_SECOND, ALL_UNKNOWN_JOBS_BURST, ALL_UNKNOWN_JOBS_PER_SECOND) == (
        100,
        0.1,
        1_000,
        2,
    )
    assert ALL_UNKNOWN_JOBS_PER_SECOND * 86_400 == 172_800
