"""The metric of what became of spans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

OUTCOMES = ("exported", "failed", "dropped")


class SpanCollector(Collector):
    """Counts the spans of a process by outcome. `prefix`: of its metrics; `read` returns the totals."""

    def __init__(self, prefix: str, read: Callable[[], Mapping[str, int]]) -> None:
        self._prefix, self._read = prefix, read

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "Spans of traces, by outcome: exported, failed (sent in vain), or dropped (the queue was full)"
        spans = CounterMetricFamily(f"{self._prefix}_trace_spans", text, labels=["outcome"])
        counts = self._read()
        for outcome in OUTCOMES:
            spans.add_metric([outcome], counts.get(outcome, 0))
        yield spans
