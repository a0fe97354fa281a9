"""A submitted job: streams its answer and records its receipt.

Read a job once and from one place: iterate for the bytes, or await `result()`. Leaving its `async with` block before the end
cancels it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from tallystick.client.jobs.result import Result, require_success
from tallystick.client.jobs.running_job import Outlet, RunningJob
from tallystick.client.openai.answers import TextDeltas
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.messages import Receipt
from tallystick.protocol.plaintext_heads import ResponseHead
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.routes import media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.types import Address, JobId


class Job:
    """A running job. `head` is None until `start` has returned or the first bytes came."""

    def __init__(self, run: RunningJob) -> None:
        self._run = run
        self.runs_on: Callable[[], bool] = lambda: False
        """Whether leaving its block lets a job with an idempotency key run on, for a process that asks for it again."""

    @property
    def id(self) -> JobId:
        """The job's id."""
        return self._run.placed.response.job

    @property
    def head(self) -> ResponseHead | None:
        """The engine's HTTP status and content type."""
        return self._run.head

    @property
    def provider(self) -> Address | None:
        """The provider that was matched last; None before a match."""
        return self._run.provider

    @property
    def place(self) -> QueuePlace | None:
        """Its last known place in the coordinator's queue; None unless it waits for a free slot."""
        return self._run.placed.response.place

    @property
    def candidates(self) -> tuple[PlacedOrder, ...]:
        """The job's orders, in the order of the shortlist."""
        return self._run.placed.response.candidates

    @property
    def streams(self) -> bool:
        """Whether its request asks for an event stream."""
        return self._run.request.summary.stream

    @property
    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._run.done

    @property
    def receipt(self) -> Verified[Receipt] | None:
        """Its receipt; None before it came. `receipt_accepted` says whether it is honest."""
        return self._run.placed.response.receipt

    @property
    def evidence(self) -> tuple[EvidenceRow, ...]:
        """What its provider committed to of each token, once its receipt came; empty if the provider commits to nothing."""
        return self._run.placed.response.evidence.rows

    @property
    def receipt_outstanding(self) -> bool:
        """Whether the whole answer came and its receipt has not. The ledger records the receipt when it comes."""
        return self._run.receipt_outstanding

    @property
    def receipt_accepted(self) -> bool:
        """Whether it ended successfully, with an honest receipt."""
        return self._run.receipt_accepted

    @property
    def disputed(self) -> bool:
        """Whether it ended with a dishonest receipt."""
        return self._run.disputed

    @property
    def on_place(self) -> Callable[[QueuePlace], None]:
        """Called with the job's place in the queue while it waits for a free slot."""
        return self._run.on_place

    @on_place.setter
    def on_place(self, notify: Callable[[QueuePlace], None]) -> None:
        self._run.on_place = notify

    @property
    def reads_whole(self) -> bool:
        """Whether its reader has no use for a part of the answer, so that it need not be woken for each."""
        return self._run.reads_whole

    @reads_whole.setter
    def reads_whole(self, reads_whole: bool) -> None:
        self._run.reads_whole = reads_whole

    async def start(self) -> ResponseHead:
        """Waits for the response head and returns it. Raises TallyError if the job fails before."""
        while self.head is None and not self._run.done:
            await self._run.next_frame()
        if self.head is None or self._run.error is not None:
            self._run.raise_end()
        if self.head is None:
            raise Unavailable(Code.PROVIDER_FAILED, "the provider ended the job without an answer", fault=Fault.PROVIDER)
        return self.head

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the body piece by piece, as the engine sent it.

        Ends once the receipt is recorded, or once the whole answer came and its receipt is outstanding (`receipt_outstanding`).
        Raises TallyError if the answer is incomplete, also if the job was cancelled meanwhile.
        """
        return self._run.chunks()

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
        return self._result(await self._run.read_whole())

    def _result(self, body: bytes) -> Result:
        response = self._run.placed.response
        if response.head is None or response.match is None or (response.receipt is None and not response.complete):
            raise Unavailable(Code.CANCELLED, "the job was cancelled before its answer began", fault=Fault.CLIENT)
        placed, key = response.match, response.key.commitment_key
        return Result(
            self.id, response.head, body, response.receipt, placed.order, placed.terms, key, self.proof, response.evidence
        )

    @property
    def proof(self) -> Proof | None:
        """The proof of the job for third parties. None before its receipt came, and if it was not to be kept or is too long."""
        return self._run.placed.record.proof

    async def cancel(self) -> Result | None:
        """Cancels the job and waits up to `cancel_seconds` for the receipt of what was delivered. Returns None without one."""
        came, response = await self._run.cancel(), self._run.placed.response
        return self._result(b"") if came and response.receipt is not None and response.head is not None else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._run.done:
            await self._run.leave(runs_on=self.runs_on())


def arrivals_of(job: Job, outlet: Outlet | None = None) -> AsyncIterator[bytes]:
    """Iterates over a started job as the job itself does, except that pieces which arrived together are one.

    `outlet`: gets those pieces that it is ready for, in their order, while the iterator waits for the next one.
    """
    return run_of(job).chunks(joined=True, outlet=outlet)


def run_of(job: Job) -> RunningJob:
    """What reads a job."""
    return job._run  # noqa: SLF001 - part of the same class in all but name
