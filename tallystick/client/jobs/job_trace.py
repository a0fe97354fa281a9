"""The spans of one job at its client, by OpenTelemetry's conventions for generative AI, beside this project's own attributes.

    chat MODEL
        select providers      the shortlist
        submit                orders signed, request sealed and posted
        wait for match        until a provider has the job; again after an attempt failed
        attempt               from a match to its end, one for each provider
        check receipt         the receipt is verified and recorded

They have no prompt and no answer, unless the user captures content.
"""

from __future__ import annotations

from collections.abc import Callable

from tallystick.client.jobs.captured_content import MAX_CAPTURED_BYTES, captured_answer, captured_request
from tallystick.client.jobs.response import JobResponse
from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.errors import TallyError
from tallystick.protocol.messages import Outcome
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind
from tallystick.tracing.spans import (
    COST,
    JOB,
    OUTCOME,
    PROVIDER,
    PROVIDER_NAME,
    Role,
    Span,
    Tracer,
    Value,
    error_type,
    trace_of_job,
)

_OPERATIONS = {CHAT: "chat", MESSAGES: "chat", RESPONSES: "chat", COMPLETIONS: "text_completion", EMBEDDINGS: "embeddings"}
INPUT, OUTPUT = "gen_ai.input.messages", "gen_ai.output.messages"


class JobTrace:
    """See the module's docstring. `clock` is monotonic, in seconds. Nothing here raises."""

    __slots__ = (
        "_attempts",
        "_began",
        "_captures",
        "_clock",
        "_first_seconds",
        "_matched",
        "_request",
        "_shares",
        "_step",
        "span",
    )

    def __init__(self, span: Span, request: ApiRequest, clock: Callable[[], float], *, shares: bool, captures: bool) -> None:
        """`shares`: the job carries its trace context. `captures`: the spans have the content of the request and the answer."""
        self.span, self._request, self._clock, self._shares, self._captures = span, request, clock, shares, captures
        self._began = clock()
        self._first_seconds: float | None = None
        self._step: Span | None = span.child("select providers")
        self._attempts: dict[Address, Span] = {}
        self._matched = 0

    @classmethod
    def begin(
        cls,
        tracer: Tracer,
        request: ApiRequest,
        server: tuple[str, int | None],
        clock: Callable[[], float],
        *,
        shares: bool,
        captures: bool,
    ) -> JobTrace:
        """Begins the span of a job within the current span of its caller. `server`: host and port of the coordinator."""
        summary, path = request.summary, request.head.path
        operation = _OPERATIONS.get(path, path.rpartition("/")[2])
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER_NAME,
            "gen_ai.request.model": summary.model,
            "gen_ai.request.stream": summary.stream,
            "server.address": server[0],
        }
        if server[1] is not None:
            attributes["server.port"] = server[1]
        if summary.output_tokens:
            attributes["gen_ai.request.max_tokens"] = summary.output_tokens // max(1, summary.choices)
        if request.label:
            attributes["tallystick.label"] = request.label
        span = tracer.start(f"{operation} {summary.model}", Role.CLIENT, attributes=attributes)
        return cls(span, request, clock, shares=shares, captures=captures)

    @property
    def keep_bytes(self) -> int:
        """Bytes of the answer that must be kept for it."""
        return MAX_CAPTURED_BYTES if self._captures else 0

    @property
    def shared_context(self) -> TraceContext | None:
        """The context that the job carries; None unless the user shares it."""
        return self.span.context if self._shares else None

    # Steps

    def _begin_step(self, name: str) -> None:
        self._end_step()
        self._step = self.span.child(name)

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.end()
            self._step = None

    def submitting(self, candidates: int) -> None:
        """The shortlist is here: orders are signed, and the job is posted."""
        self.span.set("tallystick.candidates", candidates)
        self._begin_step("submit")

    def submitted(self, job: JobId) -> None:
        """The coordinator took the job, which now waits for a provider."""
        self.span.set(JOB, job.hex())
        if not self._shares:
            self.span.link(trace_of_job(job))
        self._begin_step("wait for match")

    def queued(self, position: int) -> None:
        """The job waits for a free slot behind others."""
        if self._step is not None:
            self._step.event("queued", {"tallystick.queue.position": position})

    def frame_taken(self, kind: Kind, response: JobResponse) -> None:
        """A frame of the response was taken that is no chunk."""
        if kind is Kind.MATCH or kind is Kind.HEDGE:
            self._matched_again(response)
        elif kind is Kind.VOID or kind is Kind.FAIL:
            for placed, _receipt in response.voids:
                if (span := self._attempts.pop(placed.provider, None)) is not None:
                    span.set(OUTCOME, "void")
                    span.end()
            if kind is Kind.VOID and not self._attempts and not response.ended:
                self._begin_step("wait for match")

    def _matched_again(self, response: JobResponse) -> None:
        """A provider has the job: one that was not matched before, or the second one of two, which is faster."""
        self._end_step()
        for match in response.matches[self._matched :]:
            placed = next(placed for placed in response.candidates if placed.order.digest == match.order_hash)
            attributes: dict[str, Value] = {PROVIDER: placed.provider, "tallystick.attempt": match.decision.attempt}
            self._attempts[placed.provider] = self.span.child("attempt", Role.CLIENT, attributes)
        self._matched = len(response.matches)

    def first_output(self) -> None:
        """The answer began."""
        if self._first_seconds is None:
            self._first_seconds = self._clock() - self._began
            self.span.set("gen_ai.response.time_to_first_chunk", self._first_seconds)
            self.span.event("first output")

    def checking(self) -> None:
        """The job has its last frame, which is checked and recorded."""
        self._end_attempts()
        self._begin_step("check receipt")

    def moved(self) -> None:
        """The request is submitted anew, since nothing came of its job and it costs nothing."""
        self._end_attempts()
        self._matched = 0
        self.span.event("submitted anew")

    def _end_attempts(self) -> None:
        for span in self._attempts.values():
            span.end()
        self._attempts.clear()

    # Ends

    def refused(self, error: BaseException) -> None:
        """The job was not submitted."""
        self._finish(error)

    def ended(self, response: JobResponse, receipt_state: str, error: TallyError | None) -> None:
        """The job has ended. `receipt_state`: accepted, outstanding, disputed or none."""
        span = self.span
        span.set("tallystick.attempts", len(response.matches))
        if response.match is not None:
            span.set(PROVIDER, response.match.provider)
            span.set("gen_ai.response.model", response.match.terms.model)
        receipt = None if response.receipt is None else response.receipt.message
        if receipt is not None:
            span.set("gen_ai.usage.input_tokens", receipt.input_tokens)
            span.set("gen_ai.usage.output_tokens", receipt.output_tokens)
            span.set("gen_ai.usage.cache_read.input_tokens", receipt.cached_input_tokens)
            span.set(COST, receipt.cost)
            span.set(OUTCOME, Outcome(receipt.outcome).name.lower())
        span.set("tallystick.receipt", receipt_state)
        if response.head is not None and response.head.status >= 400:
            span.fail(str(response.head.status))
        if self._captures:
            self._capture(response)
        self._finish(error)

    def _capture(self, response: JobResponse) -> None:
        for name, text in ((INPUT, captured_request(self._request)), (OUTPUT, captured_answer(response))):
            if text:
                self.span.set(name, text)

    def _finish(self, error: BaseException | None) -> None:
        self._end_step()
        self._end_attempts()
        if error is not None:
            self.span.fail(error_type(error))
        self.span.end()
