"""Spans by OpenTelemetry's API, which the tracer of a process or of an application records. Imported only if it is in use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tallystick.protocol.trace_context import TraceContext
from tallystick.tracing.spans import NO_ATTRIBUTES, Attributes, Role, Span, Value, error_type, trace_of_job
from tallystick.version import __version__

MAX_TRACESTATE = 512
"""Characters of `tracestate` that are kept; the specification has callers send no more (section 3.3.1.5)."""
_KINDS = {Role.INTERNAL: SpanKind.INTERNAL, Role.SERVER: SpanKind.SERVER, Role.CLIENT: SpanKind.CLIENT}
_PROPAGATOR = TraceContextTextMapPropagator()
_ROOT = Context()


class NextIds(Protocol):
    """The ids that the next root span gets; random ones if None."""

    trace_id: int | None
    span_id: int | None


class _Headers(Getter[Mapping[str, list[str]]]):
    def get(self, carrier: Mapping[str, list[str]], key: str) -> list[str] | None:
        return carrier.get(key)

    def keys(self, carrier: Mapping[str, list[str]]) -> list[str]:
        return list(carrier)


class OtelSpan:
    """See spans.Span."""

    __slots__ = ("_span", "_tracer", "_within")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span
        self._within = trace.set_span_in_context(span, _ROOT)

    @property
    def context(self) -> TraceContext:
        """See Span."""
        own = self._span.get_span_context()
        return TraceContext(own.trace_id.to_bytes(16, "big"), own.span_id.to_bytes(8, "big"), own.trace_flags.sampled)

    def child(self, name: str, role: Role = Role.INTERNAL, attributes: Attributes = NO_ATTRIBUTES) -> Span:
        """See Span."""
        span = self._tracer.start_span(_text(name), self._within, _KINDS[role], _clean(attributes))
        return OtelSpan(self._tracer, span)

    def set(self, name: str, value: Value) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.set_attribute(name, _text(value) if isinstance(value, str) else value)

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.add_event(_text(name), _clean(attributes))

    def link(self, other: TraceContext) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.add_link(_context_of(other))

    def fail(self, error_type: str) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.set_attribute("error.type", error_type)
            self._span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        """See Span."""
        if self._span.is_recording():
            self._span.end()


class OtelTracer:
    """See spans.Tracer."""

    def __init__(self, tracer: trace.Tracer, ids: NextIds | None = None) -> None:
        """`ids`: of the tracer's own provider; an application's spans have random ones."""
        self._tracer, self._ids = tracer, ids

    def start(
        self, name: str, role: Role = Role.INTERNAL, *, parent: TraceContext | None = None, attributes: Attributes = NO_ATTRIBUTES
    ) -> Span:
        """See Tracer."""
        within = None if parent is None else _within(parent)
        return OtelSpan(self._tracer, self._tracer.start_span(_text(name), within, _KINDS[role], _clean(attributes)))

    def start_of_job(self, name: str, job: bytes, parent: TraceContext | None, attributes: Attributes, *, first: bool) -> Span:
        """See Tracer."""
        if parent is not None:
            return self.start(name, Role.SERVER, parent=parent, attributes=attributes)
        own = trace_of_job(job)
        ids = self._ids
        if ids is not None and any(own.trace_id) and any(own.span_id):
            ids.trace_id = int.from_bytes(own.trace_id, "big")
            ids.span_id = int.from_bytes(own.span_id, "big") if first else None
        try:
            return OtelSpan(self._tracer, self._tracer.start_span(_text(name), _ROOT, SpanKind.SERVER, _clean(attributes)))
        finally:
            if ids is not None:
                ids.trace_id = ids.span_id = None

    @contextlib.contextmanager
    def serve(self, name: str, traceparents: Sequence[str], tracestates: Sequence[str], attributes: Attributes) -> Iterator[Span]:
        """See Tracer."""
        within = _caller(traceparents, tracestates)
        span = self._tracer.start_span(_text(name), within, SpanKind.SERVER, _clean(attributes))
        served = OtelSpan(self._tracer, span)
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            try:
                yield served
            except BaseException as error:
                served.fail(error_type(error))
                raise
            finally:
                served.end()


def application_tracer() -> OtelTracer | None:
    """The tracer of the application that this library runs in; None if it has set up no provider."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
        return None
    return OtelTracer(provider.get_tracer("tallystick", __version__))


def _text(text: str) -> str:
    """The text without lone surrogates, which JSON may contain and UTF-8 may not: one of them would lose a whole export."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _clean(attributes: Attributes) -> Attributes:
    return {name: _text(value) if isinstance(value, str) else value for name, value in attributes.items()}


def _caller(traceparents: Sequence[str], tracestates: Sequence[str]) -> Context:
    if len(traceparents) != 1:
        return _ROOT
    states = [state for state in tracestates if state.strip()]
    fits = sum(map(len, states)) + len(states) <= MAX_TRACESTATE + 1
    headers = {"traceparent": list(traceparents)} | ({"tracestate": states} if states and fits else {})
    return _PROPAGATOR.extract(headers, _ROOT, _Headers())


def _context_of(context: TraceContext) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    ids = int.from_bytes(context.trace_id, "big"), int.from_bytes(context.span_id, "big")
    return SpanContext(*ids, is_remote=True, trace_flags=flags, trace_state=TraceState())


def _within(parent: TraceContext) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(_context_of(parent)), _ROOT)
