"""Spans by OpenTelemetry's SDK, and their export by OTLP over HTTP. Imported only if tracing is on.

A backend that is slow or away never holds up a job: spans wait in a bounded queue, which one thread sends from, and further ones
are dropped and counted.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, Sampler, SamplingResult, TraceIdRatioBased

from tallystick.tracing.application import OtelTracer
from tallystick.tracing.settings import TRACES_PATH, TracingSettings, has_endpoint, headers_in, read_headers
from tallystick.version import __version__

MAX_QUEUE = 4_096
"""Spans that wait for the backend, those that are being sent included."""
MAX_BATCH = 512
SCHEDULE_MS = 1_000
REQUEST_SECONDS = 5.0
"""How long one request to the backend may take, with all its repetitions."""
MAX_EVENTS, MAX_ATTRIBUTES, MAX_VALUE = 128, 64, 65_536
"""What one span may have; an attribute has at most so many characters."""


@dataclass(slots=True)
class SpanCounts:
    """What became of the spans that ended."""

    exported: int = 0
    failed: int = 0
    """Sent in vain."""
    dropped: int = 0
    """Not queued, since the queue was full."""
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def by_outcome(self) -> Mapping[str, int]:
        """The totals for metrics."""
        return {"exported": self.exported, "failed": self.failed, "dropped": self.dropped}


class _CountingExporter(SpanExporter):
    """An exporter whose results are counted."""

    def __init__(self, exporter: SpanExporter, counts: SpanCounts) -> None:
        self._exporter, self._counts = exporter, counts

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter. An error is a failed export, and counted as one."""
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            with self._counts.lock:
                self._counts.waiting -= len(spans)
                if result is SpanExportResult.SUCCESS:
                    self._counts.exported += len(spans)
                else:
                    self._counts.failed += len(spans)
        return result

    def shutdown(self) -> None:
        """See SpanExporter."""
        self._exporter.shutdown()


class _BoundedProcessor(BatchSpanProcessor):
    """The SDK's queue, which counts what it has no room for, instead of a log line for each."""

    def __init__(self, exporter: SpanExporter, counts: SpanCounts) -> None:
        super().__init__(_CountingExporter(exporter, counts), MAX_QUEUE, SCHEDULE_MS, MAX_BATCH)
        self._counts = counts

    def on_end(self, span: ReadableSpan) -> None:
        """See SpanProcessor."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        counts = self._counts
        with counts.lock:
            has_room = counts.waiting < MAX_QUEUE
            if has_room:
                counts.waiting += 1
            else:
                counts.dropped += 1
        if has_room:
            super().on_end(span)


class JobIds(RandomIdGenerator):
    """Random ids, except for the next root span, if it is to have others."""

    def __init__(self) -> None:
        self.trace_id: int | None = None
        self.span_id: int | None = None

    def generate_trace_id(self) -> int:
        """See IdGenerator."""
        given, self.trace_id = self.trace_id, None
        return super().generate_trace_id() if given is None else given

    def generate_span_id(self) -> int:
        """See IdGenerator."""
        given, self.span_id = self.span_id, None
        return super().generate_span_id() if given is None else given


class _RandomShare(TraceIdRatioBased):
    """Records a share of the decisions, each drawn anew.

    Strangers choose the ids of their traces and jobs. A choice by the id, as TraceIdRatioBased makes it, would be theirs. Even a
    keyed hash would let them repeat an id that was once recorded, which the sampled flag shows to the node that has the job.
    """

    def should_sample(
        self, parent_context: Context | None, trace_id: int, name: str, *positional: Any, **keywords: Any
    ) -> SamplingResult:
        """See Sampler."""
        del trace_id
        return super().should_sample(parent_context, secrets.randbits(64), name, *positional, **keywords)


def make_sampler(ratio: float, *, trusts_parent: bool) -> Sampler:
    """Records the share `ratio` of traces. What a caller does not record is not recorded here either.

    `trusts_parent`: what the caller records is, for callers that are the user's own. Strangers could make others record all.
    """
    if trusts_parent:
        return ParentBased(TraceIdRatioBased(ratio))
    share = _RandomShare(ratio)
    return ParentBased(share, remote_parent_sampled=share, remote_parent_not_sampled=ALWAYS_OFF)


class OtlpExport:
    """A tracer and its export. Call `shut_down` at the end."""

    def __init__(self, settings: TracingSettings, service: str, environment: Mapping[str, str], *, trusts_parent: bool) -> None:
        """`service`: the default of `service.name`. Raises BadMessage for headers that cannot be read."""
        self.counts, ids = SpanCounts(), JobIds()
        endpoint = None if has_endpoint(environment) or settings.endpoint is None else settings.endpoint.rstrip("/") + TRACES_PATH
        own_headers = settings.headers_file is not None and not headers_in(environment)
        headers = read_headers(settings.headers_file) if settings.headers_file is not None and own_headers else None
        resource = Resource.create({SERVICE_VERSION: __version__})
        if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: service}))
        self._provider = TracerProvider(
            sampler=None
            if environment.get("OTEL_TRACES_SAMPLER")
            else make_sampler(settings.sample_ratio, trusts_parent=trusts_parent),
            resource=resource,
            shutdown_on_exit=False,
            id_generator=ids,
            span_limits=SpanLimits(
                max_events=MAX_EVENTS, max_span_attributes=MAX_ATTRIBUTES, max_span_attribute_length=MAX_VALUE
            ),
        )
        timeout = None if environment.get("OTEL_EXPORTER_OTLP_TIMEOUT") else REQUEST_SECONDS
        exporter = OTLPSpanExporter(endpoint=endpoint, headers=headers, timeout=timeout)
        self._provider.add_span_processor(_BoundedProcessor(exporter, self.counts))
        self.tracer = OtelTracer(self._provider.get_tracer("tallystick", __version__), ids)

    def shut_down(self) -> None:
        """Sends what waits, and ends the export. Blocks until the backend has it, or for the SDK's own 30 seconds."""
        self._provider.shutdown()
