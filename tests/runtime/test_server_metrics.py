"""The metrics that gateway and coordinator share."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from tallystick.protocol.health import CheckResult, Health, HealthReport
from tallystick.runtime.server_metrics import COMMIT_BUCKETS, FIRST_BUCKETS, MAX_OUTCOMES, TOTAL_BUCKETS, ServerMetrics


def values(metrics: ServerMetrics) -> dict[str, float]:
    """Every sample of a registry, by name and labels."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_ended_jobs() -> None:
    """Jobs are counted by outcome, with their times and bytes; a job without output has no first time."""
    metrics = ServerMetrics("x", lambda: None)
    metrics.job_ended("completed", 2, 0.2, 100)
    metrics.job_ended("completed", 4, 0.4, 50)
    metrics.job_ended("no_provider", 0.1, None, 0)
    metrics.committed(0.002)
    metrics.gauge("x_live", "Live.", lambda: 7)
    found = values(metrics)
    assert found['x_jobs_total{outcome="completed"}'] == 2
    assert found['x_jobs_total{outcome="no_provider"}'] == 1
    assert (found["x_job_seconds_count"], found["x_first_output_seconds_count"]) == (3, 2)
    assert found["x_sent_bytes_total"] == 150
    assert (found["x_database_commit_seconds_count"], found["x_live"]) == (1, 7)


def test_the_figures_are_those_of_the_librarys_own_counters() -> None:
    """Name, type, text, labels and value of each sample, with times on, below and above the bounds."""
    registry = CollectorRegistry()
    own = Counter("x_jobs", "Ended jobs, by outcome or by the code of their error", ["outcome"], registry=registry)
    text = "Seconds from a job's request to the first byte of its answer"
    first = Histogram("x_first_output_seconds", text, registry=registry, buckets=FIRST_BUCKETS)
    total = Histogram("x_job_seconds", "Seconds from a job's request to its end", registry=registry, buckets=TOTAL_BUCKETS)
    sent = Counter("x_sent_bytes", "Bytes of answers to jobs", registry=registry)
    text = "Seconds that a group of writes took to be durable"
    commits = Histogram("x_database_commit_seconds", text, registry=registry, buckets=COMMIT_BUCKETS)
    metrics = ServerMetrics("x", lambda: None)
    assert _shown(metrics.registry) == _shown(registry), "before the first job"
    for outcome in ("completed", "no_provider", 'a "quoted" one', "completed"):
        for seconds in (0.0, *FIRST_BUCKETS, *TOTAL_BUCKETS, 0.011, 601.5):
            metrics.job_ended(outcome, seconds, seconds, 7)
            metrics.job_ended(outcome, 2 * seconds, None, 0)
            own.labels(outcome).inc(2)
            first.observe(seconds)
            total.observe(seconds)
            total.observe(2 * seconds)
            sent.inc(7)
            metrics.committed(seconds / 100)
            commits.observe(seconds / 100)
    assert _shown(metrics.registry) == _shown(registry)


def _shown(registry: CollectorRegistry) -> list[str]:
    """The lines of the metrics of jobs and transactions, without when their counters began."""
    names = ("x_jobs", "x_first", "x_job_", "x_sent", "x_database")
    lines = [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
    return [line for line in lines if line.removeprefix("# HELP ").removeprefix("# TYPE ").startswith(names)]


def test_labels_are_bounded() -> None:
    """However many outcomes occur, the number of series stays bounded."""
    metrics = ServerMetrics("x", lambda: None)
    for number in range(MAX_OUTCOMES + 50):
        metrics.job_ended(f"outcome {number}", 1, None, 0)
    metrics.job_ended("outcome 1", 1, None, 0)
    found = values(metrics)
    assert sum(name.startswith("x_jobs_total") for name in found) == MAX_OUTCOMES + 1
    assert found['x_jobs_total{outcome="other"}'] == 50
    assert found['x_jobs_total{outcome="outcome 1"}'] == 2


def test_dependencies() -> None:
    """The state of each dependency is a number; before the first check there is none."""
    reports: list[HealthReport | None] = [None]
    metrics = ServerMetrics("x", lambda: reports[-1])
    assert not any("dependency" in name for name in values(metrics))
    reports.append(HealthReport({"a": CheckResult(Health.PASS), "b": CheckResult(Health.WARN), "c": CheckResult(Health.FAIL)}, 0))
    found = values(metrics)
    assert [found[f'x_dependency_state{{dependency="{name}"}}'] for name in "abc"] == [1, 0.5, 0]
