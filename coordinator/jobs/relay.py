"""The relay: the attempts of one job at its nodes, from the dispatch to the end. It alone ends jobs and attempts.

Usually one provider has a job at a time, and the next one gets it if the first fails before any output. A hedged job is at two.
The first output of either decides, as soon as it arrives: only that attempt gets credit, without which a node charges nothing.
The other one is outrun: its node is told to stop, its output is dropped, and its receipt at no cost is passed on. If one of the
two fails before any output, the job goes on with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from coordinator.domain.limits import JobLimits
from coordinator.domain.peer_errors import error_for_peers
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.deferred_writes import DeferredWrites
from coordinator.jobs.hedging import BEGIN, Hedging
from coordinator.jobs.live_job import LiveJob, link_payload
from coordinator.jobs.lost_dispatches import LostDispatches
from coordinator.jobs.match_log import MatchLog
from coordinator.jobs.matchmaker import Matchmaker
from coordinator.jobs.node_frames import CREDIT_STEP, NodeFrames
from coordinator.jobs.receipts import Receipts
from coordinator.jobs.reputation_updates import count_failure, count_receipt, read_failure
from coordinator.jobs.shared_match_log import SharedMatchLog
from coordinator.ports import Bus, JobStore, node_subject
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import ENDS, Event, State
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.types import Address
from tallystick.protocol.wire import CancelReason, Dispatch, Kind, dumps, pack_link

log = structlog.get_logger()
REQUEST_FAULTS = frozenset({Code.BAD_MESSAGE, Code.BODY_TOO_LARGE, Code.UNKNOWN_ROUTE, Code.CANCELLED})
"""Codes of errors in the request itself: every other provider would answer the same."""
GONE = Kind.ERROR
"""Kind of the inbox frame that reports the loss of the node's connection; never relayed."""
Frame = tuple[Kind, bytes]


class Relay:
    """See the module's docstring. `now` is Unix time, `tick` a monotonic clock, both in seconds."""

    def __init__(
        self,
        *,
        match_log: MatchLog,
        shared_log: SharedMatchLog | None = None,
        bus: Bus,
        store: JobStore,
        matchmaker: Matchmaker,
        receipts: Receipts,
        writes: DeferredWrites,
        hedging: Hedging,
        limits: JobLimits,
        now: Callable[[], float],
        tick: Callable[[], float],
        count_out: Callable[[LiveJob], None],
    ) -> None:
        """`count_out`: no longer counts a job, which ended, among those that its payer runs."""
        self._count_out = count_out
        self._match_log, self._shared_log, self._bus, self._store = match_log, shared_log, bus, store
        self._matchmaker, self._receipts, self._writes, self._hedging = matchmaker, receipts, writes, hedging
        self._reputation = matchmaker.reputation
        self._limits, self._now, self._tick = limits, now, tick
        self.frames = NodeFrames(limits, tick, accepted=self._note_accept, begun=self._begin_output, grant=self._grant_credit)
        self.lost_dispatches = LostDispatches(bus, lambda provider: bool(matchmaker.book.of_provider(provider)), now)
        self.trace_takers: set[Address] = set()
        """The connected providers whose nodes take TRACE frames."""
        self.stopping = False
        """Whether this coordinator is stopping, which excuses nodes whose connections are lost."""

    async def attempts(self, job: LiveJob) -> None:
        """Drives a job that was matched until it has ended or waits for another match."""
        tick = self._tick
        try:
            for kind, payload in await self._begin(job, job.current):
                await job.put(kind, payload, tick)
            self._hedging.arm(job)
            while job.at_node:
                attempt, frame = await job.next_frame()
                for kind, payload in await self._handle(job, attempt, frame):
                    await job.put(kind, payload, tick)
                    if kind is Kind.CHUNK:
                        attempt.uncredited += 1
                        self._grant_credit(job, attempt)
                frame = payload = b""  # which may be large, and the next one may be long in coming
        finally:
            self._hedging.disarm(job)
            if job.at_node:
                self._abort(job)
            for attempt in tuple(job.open_attempts):
                self._release(job, attempt)

    def _begin_output(self, job: LiveJob, attempt: Attempt) -> None:
        """Decides for an attempt, whose first output arrived.

        A node signs no receipt that charges before it knows that no other attempt begins. Empty credit tells it so as soon as its
        output arrives: a reader that takes nothing must not make this coordinator seem silent.
        """
        self.decide(job, attempt)
        self._bus.send(node_subject(attempt.provider), pack_link(Kind.CREDIT, job.id, bytes(4)))
        if job.trace is not None:
            job.trace.output(attempt)

    def decide(self, job: LiveJob, winner: Attempt) -> None:
        """Tells the node of every other attempt to stop, without a charge."""
        for attempt in job.open_attempts:
            if attempt is not winner and not attempt.outrun:
                self._matchmaker.measure_late(attempt)
                attempt.mark_outrun(self._tick() + self._limits.cancel)
                self.stop(attempt, CancelReason.HEDGED)

    def stop(self, attempt: Attempt, reason: CancelReason) -> bool:
        """Tells a node to stop. Returns False if it is not connected."""
        frame = pack_link(Kind.CANCEL, attempt.candidate.terms.job, reason.value.encode())
        return self._bus.send(node_subject(attempt.provider), frame)

    def dismiss(self, attempt: Attempt) -> None:
        """Tells a node to stop because this process stops. Its answer is the last that is read of it."""
        attempt.dismissed = True
        self.stop(attempt, CancelReason.COORDINATOR)

    # One attempt

    async def _begin(self, job: LiveJob, attempt: Attempt) -> Sequence[Frame]:
        """Sends the job to a node. Returns the MATCH for its client, or the FAIL of a job that was cancelled or not stored."""
        try:
            if not job.cancelled:
                match = await self._record(job, attempt)
            if job.cancelled:
                raise Refusal(Code.CANCELLED, "the job was cancelled before a provider had it")
            if attempt.dismissed:
                raise stops_now()
        except TallyError as error:
            return (self._end(job, attempt, error),)
        return ((Kind.MATCH, self._dispatch(job, attempt, match)),)

    async def _record(self, job: LiveJob, attempt: Attempt) -> Match:
        """Stores the job and logs the match, before the dispatch: without them, a later receipt could not be checked.

        A lone coordinator queues both, and waits for nothing. A replica waits until they are on disk. Raises TallyError.
        """
        draft, attempt.draft = attempt.draft, None
        if draft is None:
            raise RuntimeError("the match of an attempt is logged once")
        if self._shared_log is not None:
            return await self._shared_log.place(job.record(), attempt.order, draft)
        self._store.enqueue_job(job.record())
        return self._match_log.append(job.id, attempt.number, attempt.order, draft)

    async def _begin_second(self, job: LiveJob) -> Sequence[Frame]:
        """Sends the job to a second node beside the first. Returns the HEDGE for its client, if it still needs one."""
        attempt = self._hedging.take(job)
        if attempt is None:
            return ()
        job.hedge(attempt, self._matchmaker.deadline(job))
        try:
            match = await self._record(job, attempt)
        except TallyError as error:
            log.warning("second attempt not stored", job=job.id.hex(), error=str(error))
            attempt.close(State.FAILED, "the coordinator could not store the attempt", outrun=True)
            self._release(job, attempt)
            return ()
        if attempt.outrun or attempt.dismissed or job.cancelled:  # the first one had output meanwhile, or the client left
            attempt.close(State.FAILED, "the job needed no second provider any more", outrun=True)
            self._release(job, attempt)
            return ()
        log.info("job hedged", job=job.id.hex(), late=job.provider, provider=attempt.provider)
        return ((Kind.HEDGE, self._dispatch(job, attempt, match)),)

    def _dispatch(self, job: LiveJob, attempt: Attempt, match: Match) -> bytes:
        self.frames.attach(job, attempt)
        attempt.sent_at = self._tick()
        attempt.match = match.dumps()
        context = job.submission.trace if job.trace is None else job.trace.dispatch(attempt)
        if context is not None and attempt.provider in self.trace_takers:
            self._bus.send(node_subject(attempt.provider), pack_link(Kind.TRACE, job.id, context.pack()))
        frame = Dispatch(match, attempt.candidate, job.submission.sealed).frame(job.id)
        if attempt.interrupted or not self._bus.send(node_subject(attempt.provider), frame):
            job.interrupt(attempt, pack_link(GONE, job.id))
        return attempt.match

    def _release(self, job: LiveJob, attempt: Attempt) -> None:
        """Frees what an attempt holds. Its late frames are dropped; a late receipt is accepted all the same."""
        if not attempt.released:
            attempt.released = True
            job.open_attempts.remove(attempt)
            if job.trace is not None:
                job.trace.attempt_ended(attempt)
            self.frames.detach(job, attempt)
            self._matchmaker.release(attempt)

    async def _handle(self, job: LiveJob, attempt: Attempt, frame: bytes) -> Sequence[Frame]:
        """Applies one frame of a node to the job. Returns the frames for the client."""
        kind, payload = frame[0], link_payload(frame)
        if kind == Kind.CHUNK:
            return self._relay_chunk(job, attempt, payload)
        if kind == BEGIN:
            return await self._begin_second(job)
        unfinished = attempt.dismissed and not attempt.delivered
        if kind == Kind.RECEIPT and not (attempt.outrun or unfinished or self._has_rival(job, attempt)):
            return await self._finish(job, attempt, payload)
        if kind in (Kind.FAIL, Kind.RECEIPT, GONE):
            return await self._fail(job, attempt, kind, payload)
        if kind == Kind.ACCEPT:
            self._note_accept(job, attempt)
        return ((Kind.BEAT, b""),) if kind == Kind.BEAT else ()

    def _note_accept(self, job: LiveJob, attempt: Attempt) -> None:
        """A repeated ACCEPT is a sign of life: a response in one piece has no output for long. `total` bounds it."""
        if job.state is State.STREAMING:
            return
        if job.state is State.MATCHED:
            job.move(Event.ACCEPT)
        job.extend(attempt, self._tick() + self._limits.first_output)

    def _relay_chunk(self, job: LiveJob, attempt: Attempt, payload: bytes) -> Sequence[Frame]:
        if attempt.delivered or attempt.outrun:
            return ()  # the response has ended, or is not this one's; no client could open the chunk
        tick = self._tick()
        job.note_chunk(attempt, payload, tick, tick + self._limits.idle)
        chunk = Kind.CHUNK, payload
        return (chunk,) if job.attempt is attempt else (self._choose(job, attempt), chunk)

    def _choose(self, job: LiveJob, attempt: Attempt) -> Frame:
        """Makes a second attempt the current one, and returns the MATCH that tells the client so."""
        job.attempt = attempt
        return Kind.MATCH, attempt.match

    def _has_rival(self, job: LiveJob, attempt: Attempt) -> bool:
        return any(rival is not attempt for rival in job.rivals)

    def _grant_credit(self, job: LiveJob, attempt: Attempt) -> None:
        if attempt.uncredited >= CREDIT_STEP:
            attempt.uncredited = 0
            credit = pack_link(Kind.CREDIT, job.id, CREDIT_STEP.to_bytes(4, "big"))
            self._bus.send(node_subject(attempt.provider), credit)

    # Ends

    async def _fail(self, job: LiveJob, attempt: Attempt, kind: int, payload: bytes) -> Sequence[Frame]:
        """Ends an attempt that failed or was outrun. The job fails too if output of it came, or nobody else could do better.

        A node's refusal concerns its own tab, ask or clock, so the next candidate is tried all the same.
        """
        if kind == GONE and attempt.match and not (self.stopping or attempt.dismissed):
            self.lost_dispatches.add(attempt)
        void = await self._void(job, attempt, kind, payload)
        told: list[Frame] = [] if void is None else [(Kind.VOID, void)]
        if attempt.released:  # the job was ended while the receipt was stored
            return told
        if attempt.outrun:
            self._release(job, attempt)
            return told
        error = self._failure(job, attempt, kind, payload)
        second = self._has_rival(job, attempt)
        if attempt.cut_off or job.state is State.STREAMING or job.cancelled or (error.code in REQUEST_FAULTS and not second):
            return (*told, self._end(job, attempt, error))
        log.info("attempt failed", job=job.id.hex(), provider=attempt.provider, reason=str(error))
        count_failure(self._reputation, job, attempt, error)
        attempt.close(State.FAILED, str(error), outrun=second)
        self._release(job, attempt)
        if second:
            rival = next(job.rivals)
            return told if rival is job.attempt else (*told, self._choose(job, rival))
        job.last_error = error
        job.move(Event.ATTEMPT_FAILED)
        if job.trace is not None:
            job.trace.choosing()
        return told

    def _failure(self, job: LiveJob, attempt: Attempt, kind: int, payload: bytes) -> TallyError:
        if kind == Kind.FAIL and not attempt.dismissed:
            return read_failure(job, attempt, payload)
        if kind == Kind.RECEIPT and not attempt.dismissed:
            text = f"provider {attempt.provider} ended the job without output"
            return Unavailable(Code.PROVIDER_FAILED, text, fault=Fault.PROVIDER)
        if self.stopping or attempt.cut_off or attempt.dismissed:
            return stops_now()
        return Unavailable(Code.NODE_GONE, f"the connection to provider {attempt.provider} was lost", fault=Fault.PROVIDER)

    async def _void(self, job: LiveJob, attempt: Attempt, kind: int, payload: bytes) -> bytes | None:
        """Stores the receipt at no cost of an attempt that ends. Returns it for the client; None without a valid one."""
        receipt: Verified[Receipt] | None = None
        try:
            if kind == Kind.RECEIPT:
                receipt = self._receipts.read_free(attempt.record, attempt.order, payload)
            elif kind == Kind.FAIL:
                receipt = self._receipts.read_void(attempt.record, attempt.order, payload)
        except BadReceipt as error:
            self._refuse(job, attempt, error)
            return None
        if receipt is None:
            return None
        try:
            await self._receipts.put(job.id, attempt.order, receipt)
        except Unavailable as error:  # not acknowledged, so its node will send it again
            log.warning("void receipt not stored", job=job.id.hex(), provider=attempt.provider, error=str(error))
        return receipt.to_bytes()

    def _refuse(self, job: LiveJob, attempt: Attempt, error: BadReceipt) -> None:
        """Refuses a bad receipt for good: tells its node, and counts it against the provider."""
        log.warning("bad receipt", job=job.id.hex(), provider=attempt.provider, error=str(error))
        refused = pack_link(Kind.RECEIPT_REFUSED, job.id, dumps(error.as_json()))
        self._bus.send(node_subject(attempt.provider), refused)
        count_failure(self._reputation, job, attempt, error)

    async def _finish(self, job: LiveJob, attempt: Attempt, payload: bytes) -> Sequence[Frame]:
        """Ends a job with its receipt; a bad receipt fails the job. Returns the last frame for the client, if it has not got it.

        The node's acknowledgement waits until the receipt is stored. The client does not: whatever happens to this process, the
        node sends the receipt again until it is acknowledged.
        """
        if attempt.awaits_rest and payload == attempt.early_receipt:
            return ()
        try:
            receipt = self._receipts.read(attempt.record, attempt.order, payload)
        except BadReceipt as error:
            if attempt.awaits_rest and not attempt.early_receipt:
                attempt.early_receipt = payload  # its node sends it again after the chunks that were lost
                return ()
            self._refuse(job, attempt, error)
            return (self._end(job, attempt, error),)
        outcome = Outcome(receipt.message.outcome)
        count_receipt(self._reputation, job, attempt, outcome)
        if outcome is Outcome.COMPLETED and attempt.delivered:
            self._matchmaker.measure(job, attempt, receipt.message.output_tokens)
        job.move(ENDS[outcome])
        job.finished_at = int(self._now())
        attempt.close(job.state)
        self._hedging.ended(job, attempt, receipt.message)
        record = job.record()
        is_sent = job.put_last(Kind.RECEIPT, payload)

        def counted() -> None:
            if is_sent:  # its client may order the next job, which must find its slot free
                self._release(job, attempt)
                self._count_out(job)

        commit = None if job.trace is None else job.trace.commit()
        try:
            await self._receipts.put(job.id, attempt.order, receipt, record, counted=counted)
        except Unavailable as error:  # not acknowledged, so its node will send it again
            log.warning("receipt not stored", job=job.id.hex(), provider=attempt.provider, error=str(error))
            self._writes.save_end(record)
        if commit is not None:
            commit.end()
        return () if is_sent else ((Kind.RECEIPT, payload),)

    def _end(self, job: LiveJob, attempt: Attempt, error: TallyError) -> Frame:
        """Ends a job without a receipt, because of what happened in an attempt."""
        if attempt in job.open_attempts:
            count_failure(self._reputation, job, attempt, error)
        return self.end(job, error)

    def end(self, job: LiveJob, error: TallyError) -> Frame:
        """Ends a job without a receipt. Returns the FAIL for its client."""
        job.move(Event.CANCEL if job.cancelled else Event.EXPIRE if error.code is Code.TIMED_OUT else Event.FAIL)
        for attempt in job.rivals:
            attempt.close(job.state, str(error))
        job.finished_at, job.last_error = int(self._now()), error
        self._hedging.ended(job, None, None)
        if job.attempts:
            self._writes.save_end(job.record())
        return Kind.FAIL, dumps(error_for_peers(error).as_json())

    def _abort(self, job: LiveJob) -> None:
        """Ends a job that nobody drives any more, and tells its nodes to stop."""
        error = not_relayed()
        for attempt in job.rivals:
            self.stop(attempt, CancelReason.COORDINATOR)
            count_failure(self._reputation, job, attempt, error)
        self.end(job, error)


def stops_now() -> Unavailable:
    """Returns the error of a job that this process cannot go on with."""
    return Unavailable(Code.COORDINATOR_UNAVAILABLE, "this coordinator is stopping", fault=Fault.COORDINATOR)


def not_relayed() -> TallyError:
    """Returns the error of a job that nobody drives any more."""
    text = "the coordinator stopped relaying this job"
    return Unavailable(Code.COORDINATOR_UNAVAILABLE, text, fault=Fault.COORDINATOR)
