"""Prometheus metrics that gateway and coordinator share: ended jobs, their times and bytes, the database, the dependencies.

Labels have few values: outcomes are those of receipts and the codes of errors, dependencies are fixed. Nothing is counted per
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tallystick.protocol.health import Health, HealthReport

FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOTAL_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COMMIT_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
MAX_OUTCOMES = 100
_HEALTH_VALUES = {Health.PASS: 1.0, Health.WARN: 0.5, Health.FAIL: 0.0}


class ServerMetrics:
    """The metrics of one server; `prefix` begins their names, such as tallystick_gateway."""

    def __init__(self, prefix: str, last_health: Callable[[], HealthReport | None]) -> None:
        self.registry = registry = CollectorRegistry()
        self._outcomes: dict[str, Counter] = {}
        self._jobs = Counter(
            f"{prefix}_jobs", "Ended jobs, by outcome or by the code of their error", ["outcome"], registry=registry
        )
        self._first = Histogram(
            f"{prefix}_first_output_seconds",
            "Seconds from a job's request to the first byte of its answer",
            registry=registry,
            buckets=FIRST_BUCKETS,
        )
        self._total = Histogram(
            f"{prefix}_job_seconds", "Seconds from a job's request to its end", registry=registry, buckets=TOTAL_BUCKETS
        )
        self._bytes = Counter(f"{prefix}_sent_bytes", "Bytes of answers to jobs", registry=registry)
        self._commits = Histogram(
            f"{prefix}_database_commit_seconds",
            "Seconds that a group of writes took to be durable",
            registry=registry,
            buckets=COMMIT_BUCKETS,
        )
        registry.register(_HealthCollector(prefix, last_health))

    def job_ended(self, outcome: str, seconds: float, first_seconds: float | None, sent_bytes: int) -> None:
        """Counts a job."""
        if len(self._outcomes) >= MAX_OUTCOMES and outcome not in self._outcomes:
            outcome = "other"
        ended = self._outcomes.get(outcome)
        if ended is None:
            ended = self._outcomes[outcome] = self._jobs.labels(outcome)
        ended.inc()
        self._total.observe(seconds)
        self._bytes.inc(sent_bytes)
        if first_seconds is not None:
            self._first.observe(first_seconds)

    def committed(self, seconds: float) -> None:
        """Records the time of one database transaction."""
        self._commits.observe(seconds)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read when the metrics are."""
        Gauge(name, help_text, registry=self.registry).set_function(read)


class _HealthCollector(Collector):
    """The state of each dependency, as of the last check."""

    def __init__(self, prefix: str, last: Callable[[], HealthReport | None]) -> None:
        self._prefix, self._last = prefix, last

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "State of a dependency: 1 works, 0.5 needs attention, 0 fails"
        states = GaugeMetricFamily(f"{self._prefix}_dependency_state", text, labels=["dependency"])
        report = self._last()
        for name, result in () if report is None else report.results.items():
            states.add_metric([name], _HEALTH_VALUES[result.status])
        yield states
