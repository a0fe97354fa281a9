"""The limits of hedging: its share of jobs, and what providers lose by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.hedge_limits import (
    MAX_KNOWN,
    MAX_LOST,
    MAX_LOST_PERCENT,
    RECENT_JOBS,
    RECENT_SECONDS,
    HedgeLosses,
    HedgeShare,
)
from tallystick.protocol.types import Address

ANN, BOB = Address("0x" + "aa" * 20), Address("0x" + "bb" * 20)


def _run(share: HedgeShare, jobs: int, payer: Address = ANN) -> int:
    """Hedges each of some jobs that may be hedged; returns how many were."""
    hedged = 0
    for _ in range(jobs):
        share.add_job(payer)
        if share.allows(payer):
            share.add_hedge(payer)
            hedged += 1
    return hedged


@pytest.mark.parametrize(
    ("share", "jobs", "hedged"),
    [(0.05, 1, 1), (0.05, 39, 1), (0.05, 40, 2), (0.05, 100, 5), (0.0, 100, 0), (1.0, 100, 100), (0.5, 3, 1), (0.5, 4, 2)],
)
def test_no_more_than_the_share(share: float, jobs: int, hedged: int) -> None:
    """The first job may be hedged, then never more than the share of all jobs."""
    assert _run(HedgeShare(share), jobs) == hedged


def test_the_share_holds_for_each_payer_and_for_all() -> None:
    """A payer that hedges every job has its own share only; two of them do not exceed the share of all together."""
    share = HedgeShare(0.1)
    for _ in range(200):
        share.add_job(BOB)
    assert _run(share, 50) == 5
    assert not share.allows(ANN)
    assert share.allows(BOB)
    share = HedgeShare(0.1)
    assert _run(share, 10, ANN) + _run(share, 10, BOB) == 2


def test_a_quiet_week_allows_no_flood() -> None:
    """Counts are halved now and then: what was not used long ago is not saved up."""
    share = HedgeShare(0.05)
    for _ in range(100 * RECENT_JOBS):
        share.add_job(ANN)
    assert _run(share, 1_000) <= 0.05 * 3 * RECENT_JOBS
    assert _run(share, 10 * RECENT_JOBS) <= 0.05 * 11 * RECENT_JOBS


def test_payers_that_are_counted_are_bounded() -> None:
    """Strangers do not fill the memory; a payer that is forgotten begins anew, under the share of all jobs."""
    share = HedgeShare(0.05)
    assert _run(share, 1) == 1
    for number in range(MAX_KNOWN):
        share.add_job(Address(f"0x{number:040x}"))
    assert len(share._payers) == MAX_KNOWN
    assert ANN not in share._payers
    assert share.allows(ANN)


@given(
    st.lists(st.tuples(st.sampled_from([ANN, BOB]), st.booleans()), max_size=300), st.sampled_from([0.0, 0.02, 0.05, 0.3, 1.0])
)
def test_in_any_order_the_share_is_kept(jobs: list[tuple[Address, bool]], share: float) -> None:
    """However payers and their wishes follow each other, hedged jobs are at most max(1, share) of all, and of each payer's."""
    limits = HedgeShare(share)
    counts = {ANN: [0, 0], BOB: [0, 0]}
    for payer, wants in jobs:
        limits.add_job(payer)
        counts[payer][0] += 1
        if wants and limits.allows(payer):
            limits.add_hedge(payer)
            counts[payer][1] += 1
    all_jobs, all_hedged = (sum(column) for column in zip(*counts.values(), strict=True))
    for placed, hedged in (*counts.values(), (all_jobs, all_hedged)):
        assert hedged <= (max(1, share * placed) if share else 0)


def test_a_provider_may_lose_a_little() -> None:
    """A provider takes part until it has lost more than MAX_LOST, or MAX_LOST_PERCENT of what it earned if that is more."""
    losses = HedgeLosses()
    assert losses.allows(ANN, 0)
    losses.add_lost(ANN, MAX_LOST, 0)
    assert losses.allows(ANN, 0)
    losses.add_lost(ANN, 1, 0)
    assert not losses.allows(ANN, 0)
    assert losses.allows(BOB, 0)
    earned = (MAX_LOST + 1) * 100 // MAX_LOST_PERCENT
    losses.add_earned(ANN, earned - 1, 0)
    assert not losses.allows(ANN, 0)
    losses.add_earned(ANN, 1, 0)
    assert losses.allows(ANN, 0)


def test_old_losses_fade() -> None:
    """Sums are halved after RECENT_SECONDS, however long nobody looked."""
    losses = HedgeLosses()
    losses.add_lost(ANN, 2 * MAX_LOST + 2, 0)
    assert not losses.allows(ANN, RECENT_SECONDS - 1)
    assert not losses.allows(ANN, RECENT_SECONDS)
    assert losses.allows(ANN, 2 * RECENT_SECONDS)
    assert losses._providers[ANN].lost == (MAX_LOST + 1) // 2
    assert losses.allows(ANN, 100 * RECENT_SECONDS)
    losses.add_lost(ANN, MAX_LOST + 1, 100.5 * RECENT_SECONDS)
    assert not losses.allows(ANN, 101.4 * RECENT_SECONDS), "a sum that begins anew counts for the whole time"


def test_providers_that_are_counted_are_bounded() -> None:
    """Providers that come and go do not fill the memory."""
    losses = HedgeLosses()
    for number in range(MAX_KNOWN + 5):
        losses.add_earned(Address(f"0x{number:040x}"), 1, 0)
    assert len(losses._providers) == MAX_KNOWN
