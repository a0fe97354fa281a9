from __future__ import annotations

import pytest

from scripts.bench_replicas import derive
from scripts.local_cluster import postgres_binary
from tests.scripts.measurement import run_measurement


def _installed() -> bool:
    try:
        return bool(postgres_binary("initdb"))
    except RuntimeError:
        return False


def test_what_follows_from_the_cpu_of_a_job() -> None:
    """Three replicas with a core each do three times what one of them does."""
    figures = derive(lone=500.0, one=700.0, replica=750.0, postgres=250.0, nats=10.0)
    assert (figures["three_replicas_to_lone_ratio"], figures["three_replicas_rate_ratio"]) == (2.0, 2.8)
    assert (figures["lone_jobs_per_s_core"], figures["postgres_core_at_jobs_per_s"]) == (2_000, 4_000)


@pytest.mark.skipif(not _installed(), reason="needs PostgreSQL's programs (apt-get install postgresql)")
def test_a_quick_run_has_every_figure() -> None:
    """The benchmark runs completely on real processes, and each of them costs something."""
    figures = run_measurement("bench_replicas", "--quick", "--json")
    parts = {f"{name}_cpu_us_per_job" for name in ("lone", "one_replica", "replica", "postgres", "nats")}
    assert derive(lone=1, one=1, replica=1, postgres=1, nats=1).keys() | parts <= figures.keys()
    assert figures["lone_cpu_us_per_job"] > 0
    assert figures["replica_cpu_us_per_job"] > 0
