"""A tracer whose spans stay in this process."""

from __future__ import annotations

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

from tallystick.tracing.application import OtelTracer
from tallystick.tracing.otlp import JobIds


class Recorder:
    """See the module's docstring."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self._exporter, ids = InMemorySpanExporter(), JobIds()
        self.provider = TracerProvider(id_generator=ids, sampler=sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = OtelTracer(self.provider.get_tracer("test"), ids)

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans that ended, in that order."""
        return list(self._exporter.get_finished_spans())

    def names(self) -> list[str]:
        """Their names."""
        return [span.name for span in self.spans]

    def only(self, name: str) -> ReadableSpan:
        """The one span of a name, or whose name begins with it and a blank."""
        (span,) = self.all(name)
        return span

    def all(self, name: str) -> list[ReadableSpan]:
        """The spans of a name."""
        return [span for span in self.spans if span.name == name or span.name.startswith(f"{name} ")]


def attributes(span: ReadableSpan) -> dict[str, object]:
    """The attributes of a span."""
    return dict(span.attributes or {})


def events(span: ReadableSpan) -> list[str]:
    """The names of a span's events."""
    return [event.name for event in span.events]


def trace_id(span: ReadableSpan) -> bytes:
    """The id of a span's trace."""
    assert span.context is not None
    return bytes(span.context.trace_id.to_bytes(16, "big"))


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    """Whether one span is a child of another."""
    assert span.context is not None
    assert parent.context is not None
    return (
        span.parent is not None
        and span.parent.span_id == parent.context.span_id
        and span.context.trace_id == parent.context.trace_id
    )
