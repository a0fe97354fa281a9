"""The reading of a job: takes its frames, recovers from lost streams, and records its end.

A job has one of these for its whole life, also if another placing takes the place of the first one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import structlog

from tallystick.client.audit_settings import PromptConsent
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.job_stream import StreamLost
from tallystick.client.jobs.job_trace import JobTrace
from tallystick.client.jobs.lost_stream import find_out
from tallystick.client.jobs.placed_job import PlacedJob
from tallystick.client.jobs.record import RecordContext
from tallystick.client.jobs.result import StreamInterrupted
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.receipts.delivery_check import StreamEnd
from tallystick.protocol.errors import BadReceipt, Code, Fault, PeerError, Refusal, TallyError, Unavailable
from tallystick.protocol.plaintext_heads import ResponseHead
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind

log = structlog.get_logger()
MAX_MOVES = 3
"""How often the request of one job is submitted anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext(RecordContext):
    """What a job needs from its market.

    `on_answer` is called once when an answer begins, `on_finished` once at the job's end. `read_elsewhere` returns whether
    something else reads the same job now.
    """

    config: ClientConfig
    coordinator: CoordinatorClient
    on_answer: Callable[[RunningJob], None]
    on_finished: Callable[[RunningJob], None]
    read_elsewhere: Callable[[RunningJob], bool]


class Outlet(NamedTuple):
    """Takes pieces of an answer's body at once. `ready`: whether it can take one now; `put`: takes it. Neither may raise."""

    ready: Callable[[], bool]
    put: Callable[[bytes], None]


class RunningJob:
    """A job that is being read. `placed`: what is read now."""

    def __init__(self, context: JobContext, placed: PlacedJob, request: ApiRequest, trace: JobTrace | None = None) -> None:
        self.context, self.placed, self.request, self.trace = context, placed, request, trace
        self._turn = asyncio.Lock()
        self.done = False
        """Whether it has ended, successfully or not."""
        self.error: TallyError | None = None
        """The error that ended it."""
        self.resubmit: Callable[[RunningJob], Awaitable[RunningJob]] | None = None
        """Submits its request anew, after its coordinator's replica was lost before its reader got a part of the answer, or after
        all its providers had no free slot, because replicas give them jobs at the same time. With an idempotency key it resumes
        the key's job if that goes on, or is another one by now. None for a coordinator without replicas.
        """
        self._moves = 0
        self._may_restart = True
        """Whether no part of the answer has left this job, so that another one may take its place."""
        self.audit_consent: PromptConsent | None = None
        """Who may see it because of an audit; None for a job that is not kept for audits."""
        self.on_place: Callable[[QueuePlace], None] = lambda _place: None
        """Called with the job's place in the queue while it waits for a free slot."""
        self.reads_whole = False
        """Whether its reader has no use for a part of the answer, so that it need not be woken for each."""
        self._outlet: Outlet | None = None
        """What takes the body's pieces while the reader waits for the next one."""

    @property
    def id(self) -> JobId:
        """The job's id."""
        return self.placed.response.job

    @property
    def head(self) -> ResponseHead | None:
        """The engine's HTTP status and content type."""
        return self.placed.response.head

    @property
    def provider(self) -> Address | None:
        """The provider that was matched last; None before a match."""
        match = self.placed.response.match
        return None if match is None else match.provider

    @property
    def receipt_outstanding(self) -> bool:
        """Whether the whole answer came and its receipt has not."""
        response = self.placed.response
        return self.done and self.error is None and response.complete and response.receipt is None

    @property
    def receipt_accepted(self) -> bool:
        """Whether it ended successfully, with an honest receipt."""
        return self.done and self.error is None and self.placed.response.receipt is not None

    @property
    def disputed(self) -> bool:
        """Whether it ended with a dishonest receipt."""
        return isinstance(self.error, BadReceipt)

    # Leaving

    async def cancel(self) -> bool:
        """Cancels the job and waits up to `cancel_seconds` for the receipt of what was delivered. Returns whether it came."""
        context, placed = self.context, self.placed
        placed.record.cancelling = True
        try:
            async with asyncio.timeout(context.config.cancel_seconds):
                if not self.done and not placed.response.ended:
                    if placed.keyed:  # tells other readers of the same job
                        await context.ledger.mark_cancelled(self.id)
                    if placed.keyed or not placed.stream.cancel():
                        await context.coordinator.cancel(self.id)
                while not self.done:
                    await self.next_chunk()
        except (TimeoutError, TallyError):
            if not self.done:
                await self.placed.record.arrived(StreamEnd.ABANDONED)
                self._finish_reading()
                context.reconciler.abandon(self.id)
            return False
        return self.error is None

    async def leave(self, *, runs_on: bool) -> None:
        """Stops reading before the end, which cancels the job unless somebody else reads it, or it `runs_on` for its key."""
        if self.context.read_elsewhere(self):  # a retry with the same key reads it now
            self._finish_reading()
        elif self.placed.keyed and runs_on:
            await self.placed.abandon()
            self._finish_reading()
        else:
            await self.cancel()

    # Reading

    async def chunks(self, *, joined: bool = False, outlet: Outlet | None = None) -> AsyncIterator[bytes]:
        """See `Job.__aiter__` and, for `joined` and `outlet`, `arrivals_of`."""
        self._outlet = outlet
        try:
            while not self.done:
                chunk = await self.next_chunk(joined=joined)
                if chunk:
                    self._may_restart = False
                    yield chunk
        finally:
            self._outlet = None
        self.raise_end()

    async def read_whole(self) -> bytes:
        """Reads to the end and returns the body. Raises TallyError."""
        parts: list[bytes] = []
        size, placed, limit = 0, self.placed, self.context.config.max_answer_bytes
        self.reads_whole = True
        async with self._turn:
            while not self.done and size <= limit:
                chunk = await self._take_chunk(joined=True)
                if placed is not self.placed:  # another answer took its place, which begins anew
                    parts, size, placed = [], 0, self.placed
                parts.append(chunk)
                size += len(chunk)
        if size > limit:
            await self.cancel()
            text = f"the answer has more than {limit} bytes (max_answer_bytes); stream it, or raise that setting"
            raise Refusal(Code.BODY_TOO_LARGE, text)
        self.raise_end()
        return b"".join(parts)

    async def next_chunk(self, *, joined: bool = False) -> bytes:
        """Reads to the next chunk, or to the end, and returns the body bytes in it, which may be none.

        `joined`: with those of the chunks that arrived with it.

        Raises the error that ended the job, if any.
        """
        async with self._turn:
            return await self._take_chunk(joined=joined)

    async def _take_chunk(self, *, joined: bool) -> bytes:
        """See `next_chunk`. An earlier reader may have been cancelled at any step, so each is looked for anew."""
        while not self.done:
            placed = self.placed
            if placed.response.voids:
                await placed.record.voids()
            if placed.broken is not None:
                await self._break_off(placed.broken)
            if placed.response.ended:
                await self._finish()
            elif not placed.frames:
                await self._read_frames()
            else:
                kind, payload = placed.frames.popleft()
                chunk = await self._take_frame(kind, payload)
                if kind is Kind.CHUNK:
                    return placed.join_following(chunk) if joined and chunk and placed.frames else chunk
        return b""

    async def _take_frame(self, kind: Kind, payload: bytes) -> bytes:
        response, waited = self.placed.response, self.placed.response.head is None
        try:
            chunk = response.accept(kind, payload)
        except PeerError as error:
            await self._break_off(error)
        if kind is Kind.CHUNK:
            if waited and response.head is not None:
                self.context.on_answer(self)
        elif kind is Kind.BEAT and response.place is not None:
            await self.placed.order_on(response.place)
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
            chunk = self.placed.response.accept(Kind.CHUNK, payload)
        except PeerError:  # a chunk that does not open changes nothing: the reader gets it again, and this error
            return False
        self._may_restart = False
        outlet.put(chunk)
        return True

    async def _read_frames(self) -> None:
        try:
            await self.placed.read(whole=self.reads_whole, sink=None if self._outlet is None else self._let_out)
        except StreamLost as error:
            await self._recover_from_lost_stream(str(error))
        except PeerError as error:
            error.fault = Fault.COORDINATOR
            await self._break_off(error)

    async def _break_off(self, error: TallyError) -> NoReturn:
        self.error = error
        await self.placed.abandon()
        self._end_with(error)

    def _end_with(self, error: TallyError) -> NoReturn:
        self.error = error
        self._finish_reading()
        raise error

    def _finish_reading(self) -> None:
        self.done = True
        self.placed.stream.close()
        self.context.on_finished(self)

    def raise_end(self) -> None:
        """Raises the error that the reader of an ended job gets, if there is one."""
        if self.error is not None:
            raise self.error
        if self.placed.record.cancelling:
            raise Unavailable(Code.CANCELLED, "the job was cancelled by this client", fault=Fault.CLIENT)

    async def _recover_from_lost_stream(self, reason: str) -> None:
        """The stream was lost: asks the coordinator what became of the job. Raises an error that says how much had arrived,
        unless the whole answer had, or another replica took the job or its request.
        """
        placed, reconciler = self.placed, self.context.reconciler
        if self._moves < MAX_MOVES and await placed.send_elsewhere():
            self._moves += 1
            return
        if placed.keyed and await self._ask_again():
            return
        try:
            lost = await find_out(placed, reconciler, replicated=self.resubmit is not None, may_move=self._may_move)
        except BadReceipt as error:
            self._end_with(error)
        response = placed.response
        if response.complete:
            response.receipt = lost.receipt
            self._finish_reading()
            return
        if lost.over and await self._move(reconciler.costs_nothing):
            return
        if lost.may_run and not placed.keyed:
            reconciler.abandon(self.id)
        text = f"the stream from the coordinator broke ({reason}) after {lost.report}"
        self._end_with(StreamInterrupted(text, lost.receipt, keyed=placed.keyed, over=lost.over))

    async def _ask_again(self) -> bool:
        """Asks for the job of its idempotency key again, of which no part has left this job. Returns whether one took its place.

        Other processes may read the job, so it is not cancelled: `resubmit` finds out whether it goes on, or costs nothing.
        """
        if self.resubmit is None or self.placed.response.complete or not self._may_move or self.placed.record.cancelling:
            return False
        await self.placed.left()
        return await self._move(None)

    @property
    def _may_move(self) -> bool:
        """Whether another job may take the place of this one: no part of the answer left it, and it has not moved too often."""
        response, kept = self.placed.response, self._may_restart and self.reads_whole
        return self._moves < MAX_MOVES and (kept or not (response.head is not None or response.chunks))

    async def _move(self, is_free: Callable[[JobId], Awaitable[bool]] | None) -> bool:
        """Submits the request anew, if nothing of the answer left this job and it can cost nothing, as `is_free` says.

        `is_free`: None if `resubmit` finds that out. Returns whether it did; then this is the new job. At most MAX_MOVES times.
        """
        record, resubmit = self.placed.record, self.resubmit
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
        if self.done or record.cancelling:
            await other.cancel()
            return False
        log.info("a job did not begin; its request was submitted anew", job=self.id.hex(), successor=other.id.hex())
        self.placed = other.placed
        return True

    async def _finish(self) -> None:
        if self.trace is not None:
            self.trace.checking()
        error = await self.placed.record.end()
        if error is not None:
            refused = error.code is Code.NODE_BUSY and self.placed.response.match is not None
            if refused and await self._move(self.context.reconciler.costs_nothing):
                return
            self._end_with(error)
        self._finish_reading()
