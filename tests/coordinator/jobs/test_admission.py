"""Admission: what is counted of a job, and what is forgotten of one that was not placed."""

from __future__ import annotations

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.jobs.admission import Admission
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tests.coordinator.harness import COORDINATOR, PAYER, World


def _admission(world: World, blocked: str | None = None) -> Admission:
    return Admission(
        world.market.matchmaker,
        world.limits,
        coordinator=COORDINATOR.address,
        shared=None,
        blocked=lambda: blocked,
        now=world.clock.now,
        tick=world.clock.tick,
    )


def test_a_job_counts_until_it_is_counted_out() -> None:
    """Once, among the jobs of its payer; its id stays known, so it cannot be placed again."""
    world = World(limits=JobLimits(jobs_per_payer=1))
    node, admission = world.node("ann"), _admission(world)
    first = world.submission(node)
    job = admission.admit(first)
    with pytest.raises(Unavailable) as full:
        admission.admit(world.submission(node))
    assert full.value.code is Code.RATE_LIMITED
    admission.count_out(job)
    admission.count_out(job)
    assert admission.jobs_by_payer == {}
    with pytest.raises(Refusal) as again:
        admission.admit(first)
    assert again.value.code is Code.ORDER_REPLAYED
    assert (admission.admit(world.submission(node)).counted, admission.jobs_by_payer) == (True, {PAYER.address: 1})


def test_a_job_that_is_withdrawn_leaves_nothing(world: World) -> None:
    """Its payer may place it again."""
    admission, submission = _admission(world), world.submission(world.node("ann"))
    admission.withdraw(admission.admit(submission))
    assert (admission.known, admission.jobs_by_payer) == (0, {})
    admission.admit(submission)
    assert admission.known == 1


async def test_a_coordinator_that_takes_no_orders_says_why(world: World) -> None:
    """Of every submission, before it is looked at further."""
    admission, submission = _admission(world, "is stopping"), world.submission(world.node("ann"))
    with pytest.raises(Unavailable, match="this coordinator is stopping"):
        admission.admit(submission)
    with pytest.raises(Unavailable, match="this coordinator is stopping"):
        await admission.check_new(submission)
