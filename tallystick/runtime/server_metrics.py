"""Prometheus metrics that gateway and coordinator share: ended jobs, their times and bytes, the database, the dependencies.

Labels have few values: outcomes are those of receipts and the codes of errors, dependencies are fixed. Nothing is counted per
chunk.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

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
        self._figures = _Figures(prefix)
        registry.register(self._figures)
        registry.register(HealthCollector(prefix, last_health))

    def job_ended(self, outcome: str, seconds: float, first_seconds: float | None, sent_bytes: int) -> None:
        """Counts a job."""
        self._figures.add_job(outcome, seconds, first_seconds, sent_bytes)

    def committed(self, seconds: float) -> None:
        """Records the time of one database transaction."""
        self._figures.commits.add(seconds)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a gauge that is read when the metrics are."""
        Gauge(name, help_text, registry=self.registry).set_function(read)


class Times:
    """How many times are at most as long as each of some bounds, in seconds, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def metric(self, name: str, text: str) -> Metric:
        """The histogram, whose buckets have all shorter times too."""
        bounds = map(floatToGoString, (*self._bounds, float("inf")))
        return HistogramMetricFamily(name, text, list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)


class _Figures(Collector):
    """Counts jobs and transactions in plain numbers, which become metrics when somebody reads them: that costs a job a tenth of
    the library's own counters. For one event loop.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._outcomes: dict[str, int] = {}
        self._sent_bytes = 0
        self._first, self._total = Times(FIRST_BUCKETS), Times(TOTAL_BUCKETS)
        self.commits = Times(COMMIT_BUCKETS)

    def add_job(self, outcome: str, seconds: float, first_seconds: float | None, sent_bytes: int) -> None:
        """Counts a job."""
        outcomes = self._outcomes
        if outcome not in outcomes and len(outcomes) >= MAX_OUTCOMES:
            outcome = "other"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        self._total.add(seconds)
        self._sent_bytes += sent_bytes
        if first_seconds is not None:
            self._first.add(first_seconds)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "Ended jobs, by outcome or by the code of their error"
        jobs = CounterMetricFamily(f"{self._prefix}_jobs", text, labels=["outcome"])
        for outcome, count in self._outcomes.items():
            jobs.add_metric([outcome], count)
        yield jobs
        first_text = "Seconds from a job's request to the first byte of its answer"
        yield self._first.metric(f"{self._prefix}_first_output_seconds", first_text)
        yield self._total.metric(f"{self._prefix}_job_seconds", "Seconds from a job's request to its end")
        yield CounterMetricFamily(f"{self._prefix}_sent_bytes", "Bytes of answers to jobs", self._sent_bytes)
        text = "Seconds that a group of writes took to be durable"
        yield self.commits.metric(f"{self._prefix}_database_commit_seconds", text)


class HealthCollector(Collector):
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
