"""The spans of one job at the coordinator: what it waited for, each attempt at a node, and the write of its receipt.

They have what the coordinator knows of every job. It cannot read prompts or answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from coordinator.jobs.attempt import Attempt
from tallystick.protocol.errors import TallyError
from tallystick.protocol.jobs import State
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.wire import Submission
from tallystick.tracing.spans import JOB, OUTCOME, PROVIDER, PROVIDER_NAME, Role, Span, Tracer, Value, error_type

_FAILED = (State.FAILED, State.EXPIRED)


class JobTrace:
    """See the module's docstring. Only the market and the relay call it."""

    __slots__ = ("_attempts", "_match", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self._match: Span | None = None
        self._attempts: dict[int, Span] = {}

    @classmethod
    def begin(cls, tracer: Tracer, submission: Submission) -> JobTrace:
        """Begins the trace of a job that arrived."""
        model = submission.candidates[0].terms.model
        attributes: dict[str, Value] = {
            JOB: submission.job.hex(),
            "gen_ai.provider.name": PROVIDER_NAME,
            "gen_ai.request.model": model,
            "tallystick.candidates": len(submission.candidates),
            "tallystick.batch": submission.batch,
        }
        trace = cls(tracer.start_of_job("job", submission.job, submission.trace, attributes, first=True))
        trace.choosing()
        return trace

    @property
    def trace_id(self) -> str:
        """The id of the trace, in hex."""
        return self.span.context.trace_id.hex()

    def choosing(self) -> None:
        """The job waits for a provider, from now on."""
        if self._match is None:
            self._match = self.span.child("match")

    def queued(self) -> None:
        """Every provider that may take the job is busy."""
        if self._match is not None:
            self._match.event("waits for a free slot")

    def _chosen(self) -> None:
        if self._match is not None:
            self._match.end()
            self._match = None

    def dispatch(self, attempt: Attempt) -> TraceContext:
        """A node gets the job. Returns the context for its spans."""
        self._chosen()
        attributes: dict[str, Value] = {
            PROVIDER: attempt.provider,
            "tallystick.attempt": attempt.number,
            "tallystick.hedged": attempt.hedged,
        }
        span = self._attempts[attempt.number] = self.span.child("attempt", Role.CLIENT, attributes)
        return span.context

    def output(self, attempt: Attempt) -> None:
        """The first output of an attempt arrived."""
        if (span := self._attempts.get(attempt.number)) is not None:
            span.event("first output")

    def attempt_ended(self, attempt: Attempt) -> None:
        """An attempt holds its slot no longer."""
        if (span := self._attempts.pop(attempt.number, None)) is not None:
            span.set(OUTCOME, "outrun" if attempt.outrun else attempt.state.value)
            if attempt.state in _FAILED and not attempt.outrun:
                span.fail(attempt.state.value)
            span.end()

    def commit(self) -> Span:
        """Begins the write of the receipt."""
        return self.span.child("commit receipt")

    def refused(self, error: TallyError) -> None:
        """The job was not admitted."""
        self.span.set(OUTCOME, "refused")
        self.span.fail(error_type(error))
        self.end()

    def ended(self, state: State, error: TallyError | None, attempts: int) -> None:
        """The job has ended."""
        self.span.set(OUTCOME, state.value)
        self.span.set("tallystick.attempts", attempts)
        if state in _FAILED:
            self.span.fail("unknown" if error is None else error_type(error))
        self.end()

    def end(self) -> None:
        """Ends all spans, if they have not ended."""
        self._chosen()
        for span in self._attempts.values():
            span.end()
        self._attempts.clear()
        self.span.end()


@contextlib.contextmanager
def recorded_job(tracer: Tracer, submission: Submission) -> Iterator[JobTrace]:
    """The trace of a job that is served within the block, whose error is that of a job that was not admitted."""
    trace = JobTrace.begin(tracer, submission)
    del submission  # which must not be held while the job waits
    try:
        yield trace
    except TallyError as error:
        trace.refused(error)
        raise
    finally:
        trace.end()
