"""The spans of one job at the node: its admission, the request to the engine, and its receipt.

They have what the node knows of every job before it opens the request, and how much it measured: never a prompt or an answer,
which are other people's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from node.domain.order_admission import AdmittedJob, MatchedOrder
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.types import JobId
from tallystick.tracing.spans import COST, JOB, OUTCOME, PROVIDER_NAME, Role, Span, Tracer, error_type

_FAILED = (Outcome.PROVIDER_ERROR, Outcome.UPSTREAM_ERROR, Outcome.TIMED_OUT)


@dataclass(frozen=True, slots=True)
class JobTracing:
    """How a node records its jobs. `engine_header`: whether engines get `traceparent`; `engine_url`: of an engine by its name."""

    tracer: Tracer
    engine_header: bool = False
    engine_url: Callable[[str], str] = lambda _name: ""


class JobTrace:
    """See the module's docstring."""

    __slots__ = ("_engine", "_step", "_tracing", "span")

    def __init__(self, tracing: JobTracing, job: JobId, parent: TraceContext | None) -> None:
        """`parent`: the span of the coordinator, or of the client; None if neither sent one."""
        self._tracing = tracing
        attributes = {JOB: job.hex(), "gen_ai.provider.name": PROVIDER_NAME}
        self.span = tracing.tracer.start_of_job("serve job", job, parent, attributes, first=False)
        self._step: Span | None = self.span.child("admission")
        self._engine: Span | None = None

    @property
    def trace_id(self) -> str:
        """The id of the trace, in hex."""
        return self.span.context.trace_id.hex()

    def matched(self, matched: MatchedOrder) -> None:
        """The order was read."""
        self.span.set("gen_ai.request.model", matched.terms.model)

    def refused(self, error: BaseException) -> None:
        """The job was refused."""
        self._end_step()
        self.span.set(OUTCOME, "refused")
        self.span.fail(error_type(error))

    def admitted(self) -> None:
        """The job was admitted, and waits for a slot of its engine."""
        self._end_step()
        self._step = self.span.child("wait for slot")

    def engine_asked(self, admitted: AdmittedJob) -> str:
        """The engine gets the request. Returns the `traceparent` for it; "" if engines get none."""
        self._end_step()
        offer = admitted.offer
        attributes: dict[str, str | int] = {"gen_ai.request.model": offer.upstream, "tallystick.engine": offer.engine}
        parts = urlsplit(self._tracing.engine_url(offer.engine))
        if parts.hostname:
            attributes["server.address"] = parts.hostname
            if parts.port is not None:
                attributes["server.port"] = parts.port
        self._engine = self.span.child("engine request", Role.CLIENT, attributes)
        return self._engine.context.traceparent if self._tracing.engine_header else ""

    def first_output(self, seconds: float | None) -> None:
        """The engine's first output came, after so many seconds at the engine."""
        if self._engine is not None:
            self._engine.event("first output")
            if seconds is not None:
                self._engine.set("gen_ai.response.time_to_first_chunk", seconds)

    def answered(self, outcome: Outcome) -> None:
        """The engine's work is over."""
        self._end_step()
        if self._engine is not None:
            if outcome in _FAILED:
                self._engine.fail(outcome.name.lower())
            self._engine.end()
            self._engine = None
        self._step = self.span.child("receipt")

    def settled(self, receipt: Receipt | None) -> None:
        """The receipt was stored, and sent; None if it could not be."""
        self._end_step()
        if receipt is None:
            self.span.fail("no_receipt")
            return
        outcome = Outcome(receipt.outcome)
        self.span.set(OUTCOME, outcome.name.lower())
        self.span.set(COST, receipt.cost)
        self.span.set("gen_ai.usage.input_tokens", receipt.input_tokens)
        self.span.set("gen_ai.usage.output_tokens", receipt.output_tokens)
        self.span.set("gen_ai.usage.cache_read.input_tokens", receipt.cached_input_tokens)
        if outcome in _FAILED:
            self.span.fail(outcome.name.lower())

    def end(self) -> None:
        """Ends all spans."""
        self._end_step()
        if self._engine is not None:
            self._engine.end()
        self.span.end()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.end()
            self._step = None


class JobTraces:
    """Begins the trace of each job, in the context that its link announced before it. Without `tracing`, there are no traces."""

    def __init__(self, tracing: JobTracing | None) -> None:
        self._tracing = tracing
        self._announced: tuple[object, JobId, TraceContext] | None = None
        """The context that came last, which is of the job that its link sends next."""

    @property
    def enabled(self) -> bool:
        """Whether the context of a job is of use here."""
        return self._tracing is not None

    def announce(self, link: object, job: JobId, payload: bytes) -> None:
        """Notes the context of a job that the link sends next. One that is not valid is ignored."""
        context = None if self._tracing is None else TraceContext.unpack(payload)
        self._announced = None if context is None else (link, job, context)

    def begin(self, link: object, job: JobId) -> JobTrace | None:
        """Begins the trace of a job."""
        announced, self._announced = self._announced, None
        if self._tracing is None:
            return None
        is_own = announced is not None and announced[0] is link and announced[1] == job
        return JobTrace(self._tracing, job, announced[2] if announced is not None and is_own else None)
