from __future__ import annotations

from prometheus_client import CollectorRegistry

from tallystick.tracing.metrics import SpanCollector
from tallystick.tracing.otlp import SpanCounts


def test_spans_are_counted_by_outcome() -> None:
    """All outcomes are there from the start, so that rates have a beginning."""
    registry, counts = CollectorRegistry(), SpanCounts()
    registry.register(SpanCollector("tallystick_node", counts.by_outcome))
    counts.exported, counts.dropped = 7, 2
    read = {
        outcome: registry.get_sample_value("tallystick_node_trace_spans_total", {"outcome": outcome})
        for outcome in ("exported", "failed", "dropped")
    }
    assert read == {"exported": 7, "failed": 0, "dropped": 2}
