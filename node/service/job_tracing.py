"""How this node records its jobs, from its settings."""

from __future__ import annotations

from node.jobs.job_trace import JobTracing
from node.service.engine_pool import EnginePool
from node.service.metrics import NodeMetrics
from tallystick.tracing.export import SpanExport
from tallystick.tracing.metrics import SpanCollector
from tallystick.tracing.settings import NodeTracing


def job_tracing(export: SpanExport | None, settings: NodeTracing, engines: EnginePool, metrics: NodeMetrics) -> JobTracing | None:
    """What the job runner records jobs with, whose spans are counted; None if tracing is off."""
    if export is None:
        return None
    metrics.registry.register(SpanCollector("tallystick_node", export.counts.by_outcome))
    return JobTracing(export.tracer, settings.engine_header, engines.url_of)
