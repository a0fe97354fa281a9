"""How this node records its jobs, from its settings."""

from __future__ import annotations

from node.jobs.job_trace import JobTracing
from node.service.engine_pool import EnginePool
from tallystick.tracing.export import SpanExport
from tallystick.tracing.settings import NodeTracing


def job_tracing(export: SpanExport | None, settings: NodeTracing, engines: EnginePool) -> JobTracing | None:
    """What the job runner records jobs with; None if tracing is off."""
    return None if export is None else JobTracing(export.tracer, settings.engine_header, engines.url_of)
