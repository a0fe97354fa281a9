"""Aliases of jobs: one for each job, and only its coordinator finds the job."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.job_aliases import JobAliases
from tallystick.protocol.types import JobId

IDS = st.binary(min_size=16, max_size=16).map(JobId)
OWN, ANOTHER = JobAliases(b"\x01" * 32), JobAliases(b"\x02" * 32)


@given(IDS, IDS)
def test_an_alias_stands_for_one_job(first: JobId, second: JobId) -> None:
    """It leads back to the job, says nothing of it, and is as stable as the coordinator's key."""
    alias = OWN.alias_of(first)
    assert len(alias) == 16
    assert alias != first
    assert OWN.job_of(alias) == first
    assert (OWN.alias_of(second) == alias) is (first == second)
    assert JobAliases(b"\x01" * 32).alias_of(first) == alias
    assert ANOTHER.alias_of(first) != alias
