"""A submitted job: streams its answer and records its receipt.

Read a job once and from one place: iterate for the bytes, or await `result()`. Leaving its `async with` block before the end
cancels it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

import structlog

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.info import RemoteJob
from tallystick.client.coordinator.job_stream import JobStream, StreamLost
from tallystick.client.jobs.further_orders import FurtherOrders
from tallystick.client.jobs.job_trace import JobTrace
from tallystick.client.jobs.record import JobRecord, RecordContext
from tallystick.client.jobs.response import JobResponse
from tallystick.client.jobs.result import Result, StreamInterrupted, require_success
from tallystick.client.openai.answers import TextDeltas
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.client.receipts.proof import Proof
from tallystick.client.selection.prefix_tags import PrefixTag
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, PeerError, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import TERMINAL
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Ask, Order, Receipt
from tallystick.protocol.plaintext_heads import ResponseHead
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.routes import media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.types import Address, Hash, JobId, format_amount
from tallystick.protocol.wire import Kind

log = structlog.get_logger()
MAX_MOVES = 3
"""How often the request of one job is submitted anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext(RecordContext):
    """What a job needs from its market.

    `on_answer` is called once when an answer begins, `on_finished` once at the job's end. `read_elsewhere` returns whether
    another `Job` object reads the same job now.
    """

    config: ClientConfig
    coordinator: CoordinatorClient
    on_answer: Callable[[Job], None]
    on_finished: Callable[[Job], None]
    read_elsewhere: Callable[[Job], bool]


class Outlet(NamedTuple):
    """Takes pieces of an answer's body at once. `ready`: whether it can take one now; `put`: takes it. Neither may raise."""

    ready: Callable[[], bool]
    put: Callable[[bytes], None]


class Job:
    """A running job. `head` is None until `start` has returned or the first bytes came."""

    def __init__(
        self,
        context: JobContext,
        response: JobResponse,
        stream: JobStream,
        request: ApiRequest,
        *,
        keyed: bool = False,
        resumed: bool = False,
        began: float | None = None,
    ) -> None:
        """`keyed`: the job has an idempotency key, so that losing the stream does not end it. `resumed`: the job was read before,
        and may have been cancelled when that stream was lost. `began`: the event loop's time at the request, in seconds.
        """
        self._keyed = keyed
        self._context, self._response, self._stream, self._summary = context, response, stream, request.summary
        self._record = JobRecord(context, response, request, keyed=keyed, resumed=resumed, began=began)
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._reading = asyncio.Lock()
        self._done = False
        self._error: TallyError | None = None
        self._broken: PeerError | None = None
        """What is wrong with a frame that came with good ones, which the caller gets first."""
        self.tags: tuple[PrefixTag, ...] = ()
        """The tags by which its market recognises the conversation."""
        self.further_orders: Callable[[], FurtherOrders] | None = None
        """Gives the orders on asks that its coordinator names while it waits; None if it waits for its first orders alone."""
        self._further_orders: FurtherOrders | None = None
        self.resubmit: Callable[[Job], Awaitable[Job]] | None = None
        """Submits its request anew, after its coordinator's replica was lost before its reader got a part of the answer, or after
        all its providers had no free slot, because replicas give them jobs at the same time. With an idempotency key it resumes
        the key's job if that goes on, or is another one by now. None for a coordinator without replicas.
        """
        self.send_again: Callable[[], Awaitable[JobStream]] | None = None
        """Posts the same job again, after its coordinator's replica was lost where it waited for a free slot. None for a
        coordinator without replicas.
        """
        self._moves = 0
        self.trace: JobTrace | None = None
        """Its spans, if they are recorded."""
        self._may_restart = True
        """Whether no part of the answer has left this job, so that another one may take its place."""
        self.asks: Sequence[Verified[Ask]] = ()
        """The asks that it was offered to at first."""
        self.label = request.label
        self.audit_consent: PromptConsent | None = None
        """Who may see it because of an audit; None for a job that is not kept for audits."""
        self.on_place: Callable[[QueuePlace], None] = lambda _place: None
        """Called with the job's place in the queue while it waits for a free slot."""
        self.reads_whole = False
        """Whether its reader has no use for a part of the answer, so that it need not be woken for each."""
        self.runs_on: Callable[[], bool] = lambda: False
        """Whether leaving its block lets a job with an idempotency key run on, for a process that asks for it again."""
        self._outlet: Outlet | None = None
        """What takes the body's pieces while the reader waits for the next one."""

    @property
    def id(self) -> JobId:
        """The job's id."""
        return self._response.job

    @property
    def head(self) -> ResponseHead | None:
        """The engine's HTTP status and content type."""
        return self._response.head

    @property
    def provider(self) -> Address | None:
        """The provider that was matched last; None before a match."""
        return self._response.match.provider if self._response.match is not None else None

    @property
    def place(self) -> QueuePlace | None:
        """Its last known place in the coordinator's queue; None unless it waits for a free slot."""
        return self._response.place

    @property
    def candidates(self) -> tuple[PlacedOrder, ...]:
        """The job's orders, in the order of the shortlist."""
        return self._response.candidates

    @property
    def streams(self) -> bool:
        """Whether its request asks for an event stream."""
        return self._summary.stream

    @property
    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._done

    @property
    def receipt(self) -> Verified[Receipt] | None:
        """Its receipt; None before it came. `receipt_accepted` says whether it is honest."""
        return self._response.receipt

    @property
    def evidence(self) -> tuple[EvidenceRow, ...]:
        """What its provider committed to of each token, once its receipt came; empty if the provider commits to nothing."""
        return self._response.evidence.rows

    @property
    def receipt_outstanding(self) -> bool:
        """Whether the whole answer came and its receipt has not. The ledger records the receipt when it comes."""
        return self._done and self._error is None and self._response.complete and self._response.receipt is None

    @property
    def receipt_accepted(self) -> bool:
        """Whether it ended successfully, with an honest receipt."""
        return self._done and self._error is None and self._response.receipt is not None

    @property
    def disputed(self) -> bool:
        """Whether it ended with a dishonest receipt."""
        return isinstance(self._error, BadReceipt)

    async def start(self) -> ResponseHead:
        """Waits for the response head and returns it. Raises TallyError if the job fails before."""
        while self.head is None and not self._done:
            await self._next_frame()
        if self.head is None or self._error is not None:
            self._raise_end()
        if self.head is None:
            raise Unavailable(Code.PROVIDER_FAILED, "the provider ended the job without an answer", fault=Fault.PROVIDER)
        return self.head

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the body piece by piece, as the engine sent it.

        Ends once the receipt is recorded, or once the whole answer came and its receipt is outstanding (`receipt_outstanding`).
        Raises TallyError if the answer is incomplete, also if the job was cancelled meanwhile.
        """
        while not self._done:
            chunk = await self._next_frame()
            if chunk:
                self._may_restart = False
                yield chunk
        self._raise_end()

    async def text(self) -> AsyncIterator[str]:
        """Yields the text of the first choice of a chat, completion or response: piece by piece if it is streamed, else at once.

        Afterwards, `result` has the receipt and the cost. Raises TallyError, also for an error answer of the engine.
        """
        head = await self.start()
        if head.status >= 400 or media_type(head.content_type) != EVENT_STREAM:
            yield require_success(await self.result()).text
            return
        deltas = TextDeltas()
        async for chunk in self:
            for text in deltas.feed(chunk):
                yield text

    async def result(self) -> Result:
        """Reads to the end and returns the result. An engine's error answer is a result too. Raises TallyError."""
        parts: list[bytes] = []
        size, response = 0, self._response
        self.reads_whole = True
        while not self._done:
            chunk = await self._next_frame(joined=True)
            if response is not self._response:  # another answer took its place, which begins anew
                parts, size, response = [], 0, self._response
            parts.append(chunk)
            size += len(chunk)
            if size > self._context.config.max_answer_bytes:
                await self.cancel()
                limit = self._context.config.max_answer_bytes
                text = f"the answer has more than {limit} bytes (max_answer_bytes); stream it, or raise that setting"
                raise Refusal(Code.BODY_TOO_LARGE, text)
        self._raise_end()
        return self._result(b"".join(parts))

    def _result(self, body: bytes) -> Result:
        response = self._response
        if response.head is None or response.match is None or (response.receipt is None and not response.complete):
            raise Unavailable(Code.CANCELLED, "the job was cancelled before its answer began", fault=Fault.CLIENT)
        placed, key = response.match, response.key.commitment_key
        return Result(
            self.id, response.head, body, response.receipt, placed.order, placed.terms, key, self.proof, response.evidence
        )

    @property
    def proof(self) -> Proof | None:
        """The proof of the job for third parties. None before its receipt came, and if it was not to be kept or is too long."""
        return self._record.proof

    async def cancel(self) -> Result | None:
        """Cancels the job and waits up to `cancel_seconds` for the receipt of what was delivered. Returns None without one."""
        self._record.cancelling = True
        try:
            async with asyncio.timeout(self._context.config.cancel_seconds):
                if not self._done and not self._response.ended:
                    if self._keyed:  # tells other readers of the same job
                        await self._context.ledger.mark_cancelled(self.id)
                    if self._keyed or not self._stream.cancel():
                        await self._context.coordinator.cancel(self.id)
                while not self._done:
                    await self._next_frame()
        except (TimeoutError, TallyError):
            if not self._done:
                await self._record.arrived(StreamEnd.ABANDONED)
                self._finish_reading()
                self._context.reconciler.abandon(self.id)
            return None
        response = self._response
        return self._result(b"") if self._error is None and response.receipt is not None and response.head is not None else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._done:
            return
        if self._context.read_elsewhere(self):  # a retry with the same key reads it now
            self._finish_reading()
        elif self._keyed and self.runs_on():
            await self._abandon()
            self._finish_reading()
        else:
            await self.cancel()

    async def _abandon(self) -> dict[Hash, Delivery]:
        """Stops reading and records what arrived, for a receipt that comes later. Returns what arrived.

        A job with an idempotency key goes on for a while, because a retry may resume it.
        """
        deliveries = await self._record.arrived(StreamEnd.RESUMABLE if self._keyed else StreamEnd.ABANDONED)
        if not self._keyed:
            self._context.reconciler.abandon(self.id)
        return deliveries

    # Reading frames

    async def _next_frame(self, *, joined: bool = False) -> bytes:
        """Reads one frame and returns the body bytes in it, which are often none. `joined`: with those of the chunks that arrived
        with it.

        Raises the error that ended the job, if any.
        """
        async with self._reading:
            if self._done:
                return b""
            response = self._response
            if response.voids:
                await self._record.voids()
            if self._broken is not None:
                await self._break_off(self._broken)
            if response.ended:  # an earlier reader was cancelled while it recorded the end
                await self._finish()
                return b""
            kind, chunk = await self._take_next()
            if kind is None:
                return b""
            if kind is Kind.CHUNK:  # which ends no attempt and no job
                return self._join_following(chunk) if joined and chunk and self._frames else chunk
            if response.voids:
                await self._record.voids()
            if response.ended:
                await self._finish()
            return chunk

    async def _take_next(self) -> tuple[Kind | None, bytes]:
        """Takes frames until one is no match. Returns its kind, None if there was none, and the body bytes in it."""
        while True:
            while not self._frames:
                await self._read_frames()
                if self._done:
                    return None, b""
            kind, payload = self._frames.popleft()
            chunk = await self._take_frame(kind, payload)
            if kind is not Kind.MATCH and kind is not Kind.HEDGE:
                return kind, chunk

    async def _take_frame(self, kind: Kind, payload: bytes) -> bytes:
        response, waited = self._response, self._response.head is None
        try:
            chunk = response.accept(kind, payload)
        except PeerError as error:
            await self._break_off(error)
        if kind is Kind.CHUNK:
            if waited and response.head is not None:
                self._context.on_answer(self)
        elif kind is Kind.BEAT and response.place is not None:
            if response.place.asks and self._further_orders is None and self.further_orders is not None:
                self._further_orders = self.further_orders()
            if response.place.asks and self._further_orders is not None:
                await self._further_orders.order(response.place.asks, response, self._stream)
            self.on_place(response.place)
            if self.trace is not None:
                self.trace.queued(response.place.position)
        elif self.trace is not None:
            self.trace.frame_taken(kind, response)
        return chunk

    def _let_out(self, payload: bytes) -> bool:
        """Gives the body in a chunk to the outlet. Returns False if its reader has to take it."""
        outlet = self._outlet
        if outlet is None or not outlet.ready():
            return False
        try:
            chunk = self._response.accept(Kind.CHUNK, payload)
        except PeerError:  # a chunk that does not open changes nothing: the reader gets it again, and this error
            return False
        self._may_restart = False
        outlet.put(chunk)
        return True

    def _join_following(self, chunk: bytes) -> bytes:
        """The chunk, and those that arrived with it. An error in one of them is raised once the caller has those before it."""
        chunks, frames = [chunk], self._frames
        while frames and frames[0][0] is Kind.CHUNK and self._broken is None:
            try:
                chunks.append(self._response.accept(*frames.popleft()))
            except PeerError as error:
                self._broken = error
        return b"".join(chunks) if len(chunks) > 1 else chunk

    async def _read_frames(self) -> None:
        whole = self.reads_whole and not (self._keyed or self._record.cancelling or self._response.match is None)
        try:
            self._frames.extend(await self._stream.read(whole=whole, sink=None if self._outlet is None else self._let_out))
        except StreamLost as error:
            await self._recover_from_lost_stream(str(error))
        except PeerError as error:
            error.fault = Fault.COORDINATOR
            await self._break_off(error)

    async def _break_off(self, error: TallyError) -> NoReturn:
        self._error = error
        await self._abandon()
        self._end_with(error)

    def _end_with(self, error: TallyError) -> NoReturn:
        self._error = error
        self._finish_reading()
        raise error

    def _finish_reading(self) -> None:
        self._done = True
        self._stream.close()
        self._context.on_finished(self)

    def _raise_end(self) -> None:
        if self._error is not None:
            raise self._error
        if self._record.cancelling:
            raise Unavailable(Code.CANCELLED, "the job was cancelled by this client", fault=Fault.CLIENT)

    async def _recover_from_lost_stream(self, reason: str) -> None:
        """The stream was lost: asks the coordinator what became of the job. Raises an error that says how much had arrived,
        unless the whole answer had, or another replica took the job or its request.
        """
        if await self._wait_elsewhere() or (self._keyed and await self._ask_again()):
            return
        response = self._response
        received = f"{response.chunks} chunks with {response.body_bytes} bytes of the answer"
        receipt: Verified[Receipt] | None = None
        remote: RemoteJob | None = None
        try:
            deliveries = await self._record.arrived(StreamEnd.RESUMABLE if self._keyed else StreamEnd.ABANDONED)
            if response.complete:
                await self._record.whole_answer(deliveries)
            elif self.resubmit is not None and not self._keyed:
                await self._context.reconciler.end_lost(self.id)
            remote, receipt = await self._context.reconciler.reconcile(self.id, deliveries, self._record.doubt)
            report = f"the coordinator reports the job as {remote.state.value}"
        except BadReceipt as error:
            self._end_with(error)
        except TallyError as error:
            report = str(error)
        over = await self._is_over(remote, receipt)
        if over and not response.complete and await self._move(self._context.reconciler.costs_nothing):
            return
        if not response.complete and (remote is None or (receipt is None and remote.receipt is None)) and not self._keyed:
            self._context.reconciler.abandon(self.id)
        if response.complete:
            response.receipt = receipt
            self._finish_reading()
            return
        if receipt is not None:
            report += f", billed {format_amount(receipt.message.cost)} dollars"
        text = f"the stream from the coordinator broke ({reason}) after {received}; {report}"
        self._end_with(StreamInterrupted(text, receipt, retry=self._keyed or over))

    async def _is_over(self, remote: RemoteJob | None, receipt: Verified[Receipt] | None) -> bool:
        """Whether the job has ended, so that a caller may send its request again. At a lost replica it must cost nothing too."""
        billed = receipt is not None and receipt.message.cost > 0
        if billed or self._response.complete or self.resubmit is None or self._record.cancelling or self._keyed:
            return remote is not None and remote.state in TERMINAL
        return await self._context.reconciler.await_free_end(self.id, remote, brief=not self._may_move)

    async def _wait_elsewhere(self) -> bool:
        """Posts a job again that waited for a free slot at a replica which was lost, and of which no match is known.

        Returns whether another replica took it, which it does unless a provider had it.
        """
        if self.send_again is None or self._moves >= MAX_MOVES or self._response.matches or self._record.cancelling:
            return False
        try:
            self._stream = await self.send_again()
        except TallyError as error:
            log.debug("a job could not go to another replica", job=self.id.hex(), reason=str(error))
            return False
        self._moves += 1
        self._frames.clear()
        self._response.place, self._further_orders = None, None
        log.info("a waiting job went to another replica", job=self.id.hex())
        return True

    async def _ask_again(self) -> bool:
        """Asks for the job of its idempotency key again, of which no part has left this job. Returns whether one took its place.

        Other processes may read the job, so it is not cancelled: `resubmit` finds out whether it goes on, or costs nothing.
        """
        if self.resubmit is None or self._response.complete or not self._may_move or self._record.cancelling:
            return False
        await self._record.arrived(StreamEnd.RESUMABLE)
        return await self._move(None)

    @property
    def _may_move(self) -> bool:
        """Whether another job may take the place of this one: no part of the answer left it, and it has not moved too often."""
        response, kept = self._response, self._may_restart and self.reads_whole
        return self._moves < MAX_MOVES and (kept or not (response.head is not None or response.chunks))

    async def _move(self, is_free: Callable[[JobId], Awaitable[bool]] | None) -> bool:
        """Submits the request anew, if nothing of the answer left this job and it can cost nothing, as `is_free` says.

        `is_free`: None if `resubmit` finds that out. Returns whether it did; then this is the new job. At most MAX_MOVES times.
        """
        record, resubmit = self._record, self.resubmit
        if resubmit is None or not self._may_move or record.cancelling:
            return False
        if is_free is not None and (not await is_free(self.id) or record.cancelling):
            return False
        self._moves += 1
        if self.trace is not None:
            self.trace.moved()
        try:
            other = await resubmit(self)
        except TallyError as error:
            self._end_with(error)
        if self._done or record.cancelling:
            await other.cancel()
            return False
        log.info("a job did not begin; its request was submitted anew", job=self.id.hex(), successor=other.id.hex())
        self._response, self._stream, self._record, self._frames = other._response, other._stream, other._record, other._frames  # noqa: SLF001
        self.tags, self.asks, self.further_orders, self._further_orders = other.tags, other.asks, other.further_orders, None
        self.send_again = other.send_again
        return True

    async def _finish(self) -> None:
        if self.trace is not None:
            self.trace.checking()
        error = await self._record.end()
        if error is not None:
            refused = error.code is Code.NODE_BUSY and self._response.match is not None
            if refused and await self._move(self._context.reconciler.costs_nothing):
                return
            self._end_with(error)
        self._finish_reading()


def matches_of(job: Job) -> list[tuple[Match, Verified[Order]]]:
    """The matches of a job so far, which must be in the coordinator's match log, each with its order."""
    return job._response.logged_matches  # noqa: SLF001 - part of the same class in all but name


async def arrivals_of(job: Job, outlet: Outlet | None = None) -> AsyncIterator[bytes]:
    """Iterates over a started job as the job itself does, except that pieces which arrived together are one.

    `outlet`: gets those pieces that it is ready for, in their order, while the iterator waits for the next one.
    """
    job._outlet = outlet  # noqa: SLF001 - part of the same class in all but name
    try:
        while not job.done:
            chunk = await job._next_frame(joined=True)  # noqa: SLF001 - see above
            if chunk:
                job._may_restart = False  # noqa: SLF001 - see above
                yield chunk
    finally:
        job._outlet = None  # noqa: SLF001 - see above
    job._raise_end()  # noqa: SLF001 - see above


def keep_for_audit(job: Job) -> None:
    """Keeps the answer of a job for a possible audit alone: the job itself has no proof."""
    job._record.for_audit_only = True  # noqa: SLF001 - part of the same class in all but name


def trace_ended(job: Job) -> None:
    """Ends the spans of a job that has ended."""
    if job.trace is not None:
        state = "accepted" if job.receipt_accepted else "outstanding" if job.receipt_outstanding else "none"
        job.trace.ended(job._response, "disputed" if job.disputed else state, job._error)  # noqa: SLF001 - see above


def audit_proof(job: Job) -> Proof | None:
    """The proof of a job whose answer was kept, for whatever reason."""
    return job._record.audit_proof  # noqa: SLF001 - see above


def evidence_of(job: Job) -> bytes:
    """The packed rows of evidence that came with the answer and are those of its receipt; empty without."""
    return job._response.evidence.packed  # noqa: SLF001 - see above
