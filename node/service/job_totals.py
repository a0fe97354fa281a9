"""Totals of ended jobs for Prometheus. A job adds to plain numbers; they become metrics when they are read."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from node.ports import JobReport
from tallystick.protocol.errors import Fault

_FIRST_OUTPUT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_JOB_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)


class _Seconds:
    """A histogram of seconds. A bucket counts up to its bound and including it."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def add_to(self, family: HistogramMetricFamily, model: str) -> None:
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((str(bound), total))
        family.add_metric([model], buckets, self._sum)


@dataclass(slots=True)
class _ModelTotals:
    outcomes: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    revenue: int = 0
    first: _Seconds = field(default_factory=lambda: _Seconds(_FIRST_OUTPUT_BUCKETS))
    total: _Seconds = field(default_factory=lambda: _Seconds(_JOB_BUCKETS))
    per_token: _Seconds = field(default_factory=lambda: _Seconds(_TOKEN_BUCKETS))


class JobTotals(Collector):
    """See the module's docstring."""

    def __init__(self) -> None:
        self._models: dict[str, _ModelTotals] = {}
        self._faults: Counter[str] = Counter()

    def add(self, report: JobReport, outcome: str) -> None:
        """Adds an ended job."""
        totals = self._models.get(report.model)
        if totals is None:
            totals = self._models[report.model] = _ModelTotals()
        totals.outcomes[outcome] += 1
        if report.fault:
            self._faults[report.fault] += 1
        totals.input_tokens += report.input_tokens
        totals.output_tokens += report.output_tokens
        totals.revenue += int(report.cost)
        totals.total.add(report.total_seconds)
        if report.first_seconds is not None:
            totals.first.add(report.first_seconds)
            if report.output_tokens > 1:
                totals.per_token.add((report.total_seconds - report.first_seconds) / (report.output_tokens - 1))

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        jobs = CounterMetricFamily("tallystick_node_jobs", "Ended jobs, by outcome on the receipt", labels=["model", "outcome"])
        tokens = CounterMetricFamily("tallystick_node_tokens", "Tokens billed on receipts", labels=["model", "direction"])
        revenue = CounterMetricFamily("tallystick_node_revenue_units", "Total cost on receipts, in base units", labels=["model"])
        first = _seconds("first_output", "Seconds from admission to the first output")
        total = _seconds("job", "Seconds from admission to the end of the job")
        per_token = _seconds("token", "Seconds per output token after the first")
        for model, totals in self._models.items():
            for outcome, count in totals.outcomes.items():
                jobs.add_metric([model, outcome], count)
            tokens.add_metric([model, "input"], totals.input_tokens)
            tokens.add_metric([model, "output"], totals.output_tokens)
            revenue.add_metric([model], totals.revenue)
            totals.first.add_to(first, model)
            totals.total.add_to(total, model)
            totals.per_token.add_to(per_token, model)
        failures = CounterMetricFamily("tallystick_node_failed_jobs", "Jobs that failed, by the party at fault", labels=["fault"])
        for fault in Fault:
            failures.add_metric([fault.value], self._faults[fault.value])
        yield from (jobs, failures, tokens, revenue, first, total, per_token)


def _seconds(name: str, text: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"tallystick_node_{name}_seconds", text, labels=["model"])
