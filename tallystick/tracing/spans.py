"""Spans as all sides write them, whatever records them. OpenTelemetry is behind these interfaces (otlp.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Protocol

from tallystick.protocol.errors import TallyError
from tallystick.protocol.trace_context import TraceContext

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]
NO_ATTRIBUTES: Attributes = {}

PROVIDER_NAME = "tallystick"
"""The value of `gen_ai.provider.name`."""
JOB, PROVIDER, COST, OUTCOME = "tallystick.job.id", "tallystick.provider", "tallystick.cost", "tallystick.outcome"
"""Attributes of this project. Costs are base units."""


class Role(Enum):
    """What a span is to its parent: its own work, the answer to a request, or a request to another process."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class Span(Protocol):
    """One span. Its methods do nothing after its end, and never raise."""

    @property
    def context(self) -> TraceContext:
        """By which other processes name it."""
        ...

    def child(self, name: str, role: Role = Role.INTERNAL, attributes: Attributes = NO_ATTRIBUTES) -> Span:
        """Begins a span within it."""
        ...

    def set(self, name: str, value: Value) -> None:
        """Sets an attribute."""
        ...

    def event(self, name: str, attributes: Attributes = NO_ATTRIBUTES) -> None:
        """Adds an event, now."""
        ...

    def link(self, other: TraceContext) -> None:
        """Names a span of another trace that it is related to."""
        ...

    def fail(self, error_type: str) -> None:
        """Marks it as failed, with the `error.type`."""
        ...

    def end(self) -> None:
        """Ends it, now."""
        ...


class Tracer(Protocol):
    """What begins spans."""

    def start(
        self, name: str, role: Role = Role.INTERNAL, *, parent: TraceContext | None = None, attributes: Attributes = NO_ATTRIBUTES
    ) -> Span:
        """Begins a span: within `parent`, else within the current span of the calling task, else of a new trace."""
        ...

    def start_of_job(self, name: str, job: bytes, parent: TraceContext | None, attributes: Attributes, *, first: bool) -> Span:
        """Begins the span of one side that serves a job: within `parent`, else of the job's own trace (`trace_of_job`).

        `first`: whether it is the root of that trace.
        """
        ...

    def serve(
        self, name: str, traceparents: Sequence[str], tracestates: Sequence[str], attributes: Attributes
    ) -> AbstractContextManager[Span]:
        """The span of a request with these headers, which is the calling task's current span within the block.

        Headers that are not valid, or several of `traceparent`, begin a new trace (W3C Trace Context, section 4).
        """
        ...


def trace_of_job(job: bytes) -> TraceContext:
    """The trace that sides other than the client record a job in, unless it carries a trace context: its id is the job's.

    So it tells nobody more than the job's id does. The client links its own trace to it. The root's id are the last 8 bytes, 62
    bits of which are random.
    """
    return TraceContext(job, job[8:])


def error_type(error: BaseException) -> str:
    """The `error.type` of an error: its code, or the class of one that has none. Never its text, which may quote others."""
    return error.code.value if isinstance(error, TallyError) else type(error).__qualname__
