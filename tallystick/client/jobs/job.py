"""A submitted job: its answer as it streams in, and the receipt at its end.

Read it once, from one place: iterate for the bytes, or await `result()`. Leaving it (`async with`) before its end cancels it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

import aiohttp
import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.jobs.response import JobResponse
from tallystick.client.jobs.result import Result, StreamInterrupted, build_proof, outcome_error, require_success
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import JobState
from tallystick.client.ledger.writes import IncomingReceipt
from tallystick.client.openai.answers import TextDeltas
from tallystick.client.openai.requests import RequestSummary
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.client.receipts.file_store import ProofStore
from tallystick.client.receipts.proof import Proof
from tallystick.client.receipts.token_audit import AuditFinding, TokenAuditor
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, PeerError, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import TERMINAL
from tallystick.protocol.messages import Receipt
from tallystick.protocol.routes import media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import FrameReader, Kind, ResponseHead, split_request

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class JobContext:
    """What a job needs of its market."""

    config: ClientConfig
    coordinator: CoordinatorClient
    ledger: Ledger
    resolver: Reconciler
    domain: Domain
    now: Callable[[], int]
    left: Callable[[Job], None]
    shared: Callable[[Job], bool]
    proofs: ProofStore | None
    auditor: TokenAuditor | None = None


class Job:
    """One job under way. `head` is None until `start` returned or the first bytes came."""

    def __init__(
        self,
        context: JobContext,
        answer: JobResponse,
        response: aiohttp.ClientResponse,
        call: RequestSummary,
        request: bytes,
        *,
        keyed: bool = False,
        resumed: bool = False,
        began: float | None = None,
    ) -> None:
        """`keyed`: the job has an idempotency key, so a lost stream does not end it. `resumed`: it is taken up again, so that it
        may have been cancelled when its former stream was lost. `began`: the loop's time at the request.
        """
        self._began = began
        self._keyed, self._resumed = keyed, resumed
        self._context, self._answer, self._response, self._call = context, answer, response, call
        head, body = split_request(request)
        self._request, self._path, self._body_bytes = request, head.path, len(body)
        self._reader = FrameReader()
        self._frames: deque[tuple[Kind, bytes]] = deque()
        self._reading = asyncio.Lock()
        self._cancelling = False
        self._done = False
        self._error: TallyError | None = None
        self.conversation: bytes | None = None
        """What its market knows its conversation by."""

    @property
    def id(self) -> JobId:
        """Its id."""
        return self._answer.job

    @property
    def head(self) -> ResponseHead | None:
        """The engine's HTTP status and content type."""
        return self._answer.head

    @property
    def provider(self) -> Address | None:
        """Who answers, once matched."""
        return self._answer.match.provider if self._answer.match is not None else None

    @property
    def candidates(self) -> tuple[PlacedOrder, ...]:
        """The orders that it was placed with, in the shortlist's order."""
        return self._answer.candidates

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done

    @property
    def receipt(self) -> Verified[Receipt] | None:
        """Its receipt, once it came; whether it is honest, `booked` tells."""
        return self._answer.receipt

    @property
    def receipt_outstanding(self) -> bool:
        """Whether the whole answer came, and its receipt has not: the ledger books it when it comes."""
        return self._done and self._error is None and self._answer.whole and self._answer.receipt is None

    @property
    def receipt_accepted(self) -> bool:
        """Whether it ended well, with a receipt."""
        return self._done and self._error is None and self._answer.receipt is not None

    @property
    def disputed(self) -> bool:
        """Whether it ended with a dishonest receipt."""
        return isinstance(self._error, BadReceipt)

    async def start(self) -> ResponseHead:
        """Waits for the response head. Raises TallyError if the job fails before it."""
        while self.head is None and not self._done:
            await self._frame()
        if self.head is None or self._error is not None:
            self._raise_again()
        if self.head is None:
            raise Unavailable(Code.PROVIDER_FAILED, "the job ended without an answer", fault=Fault.PROVIDER)
        return self.head

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body, as the engine sent it, piece by piece. Ends once the receipt is booked, or the whole answer came and its
        receipt cannot be had now (`outstanding`); raises TallyError, also if it was cancelled meanwhile: what came is then not
        the whole answer.
        """
        while not self._done:
            chunk = await self._frame()
            if chunk:
                yield chunk
        self._raise_again()

    async def text(self) -> AsyncIterator[str]:
        """The text of a chat's, completion's or response's first answer: piece by piece if it is streamed, else at once.

        Raises TallyError, also for an error answer of the engine. Afterwards, `result` has receipt and cost.
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
        """Reads to the end and returns all of it. Raises TallyError; an engine's own error answer is a result like any other."""
        parts: list[bytes] = []
        size = 0
        async for chunk in self:
            parts.append(chunk)
            size += len(chunk)
            if size > self._context.config.max_answer_bytes:
                await self.cancel()
                text = f"the answer is longer than {self._context.config.max_answer_bytes} bytes; stream it"
                raise Refusal(Code.BODY_TOO_LARGE, text)
        return self._result(b"".join(parts))

    def _result(self, body: bytes) -> Result:
        answer = self._answer
        if answer.head is None or answer.match is None or (answer.receipt is None and not answer.whole):
            raise Unavailable(Code.CANCELLED, "the job ended before an answer began", fault=Fault.CLIENT)
        placed, key = answer.match, answer.key.commitment_key
        return Result(self.id, answer.head, body, answer.receipt, placed.order, placed.terms, key, self.proof)

    @property
    def proof(self) -> Proof | None:
        """What proves the job to others, once its receipt came. None before, and where it was not to be kept or is too long."""
        return build_proof(self._context.domain, self._answer, self._request)

    async def cancel(self) -> Result | None:
        """Stops the job and waits, for a bounded time, for the receipt of what was delivered. None if it is not known yet."""
        self._cancelling = True
        try:
            async with asyncio.timeout(self._context.config.cancel_seconds):
                if not self._done and not self._answer.ended:
                    if self._keyed:  # whoever else reads it is to know
                        await self._context.ledger.mark_cancelled(self.id)
                    await self._context.coordinator.cancel(self.id)
                while not self._done:
                    await self._frame()
        except (TimeoutError, TallyError):
            if not self._done:
                await self._note(StreamEnd.ABANDONED)
                self._leave()
                self._context.resolver.abandon(self.id)
            return None
        answer = self._answer
        return self._result(b"") if self._error is None and answer.receipt is not None and answer.head is not None else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._done:
            return
        if self._context.shared(self):  # a retry with the same key reads it now
            self._leave()
        else:
            await self.cancel()

    async def _abandon(self) -> dict[Hash, Delivery]:
        """Nobody reads the stream any more: what arrived is kept, for a receipt that comes later. A keyed job goes on for a
        while, as a retry may take it up. Returns what arrived.
        """
        arrived = await self._note(StreamEnd.RESUMABLE if self._keyed else StreamEnd.ABANDONED)
        if not self._keyed:
            self._context.resolver.abandon(self.id)
        return arrived

    async def _note(self, stream: StreamEnd) -> dict[Hash, Delivery]:
        """Keeps what arrived of a stream that was lost or given up; of orders that this client was told of no match for, nothing
        did, whoever had them. Returns what arrived of those that were matched.
        """
        ledger, answer = self._context.ledger, self._answer
        arrived = self._arrived(stream)
        await ledger.store_deliveries(arrived)
        unmatched = answer.unmatched(self._body_bytes, bounded=self._call.bounded, stream=stream)
        await ledger.store_deliveries(unmatched, matched=False)
        return arrived

    def _arrived(self, stream: StreamEnd = StreamEnd.ENDED) -> dict[Hash, Delivery]:
        cancelled = self._cancelling or self._resumed or stream is not StreamEnd.ENDED
        return self._answer.arrived(self._body_bytes, bounded=self._call.bounded, cancelled=cancelled, stream=stream)

    # Reading

    async def _frame(self) -> bytes:
        """Takes one frame. Returns the body bytes in it, often none; raises what ended the job, if it ended badly."""
        async with self._reading:
            if self._done:
                return b""
            await self._book_voids()
            if self._answer.ended:  # a former reader was cancelled while it wrote the end down
                await self._finish()
                return b""
            while not self._frames:
                await self._fill()
                if self._done:
                    return b""
            try:
                chunk = self._answer.accept(*self._frames.popleft())
            except PeerError as error:
                await self._break(error)
            await self._book_voids()
            if self._answer.ended:
                await self._finish()
            return chunk

    async def _book_voids(self) -> None:
        """Releases the caps of attempts that ended at no cost. A dishonest receipt among them is its provider's affair alone."""
        voids, context = self._answer.voids, self._context
        while voids:
            placed, receipt = voids[0]
            await context.ledger.record_receipt(
                IncomingReceipt(context.domain, self.id, placed, receipt, None, context.now(), final=False)
            )
            if voids:  # a reader that was cancelled here may have left it for another one
                voids.popleft()

    async def _fill(self) -> None:
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await self._cut_off(str(error) or type(error).__name__)
            return
        if not data:
            await self._cut_off("it closed")
            return
        try:
            self._frames.extend(self._reader.feed(data))
        except PeerError as error:
            error.fault = Fault.COORDINATOR
            await self._break(error)

    async def _break(self, error: TallyError) -> NoReturn:
        self._error = error
        await self._abandon()
        self._fail(error)

    def _fail(self, error: TallyError) -> NoReturn:
        self._error = error
        self._leave()
        raise error

    def _leave(self) -> None:
        self._done = True
        if not self._response.content.at_eof():  # at its end the connection went back to the pool by itself
            self._response.close()
        self._context.left(self)

    def _raise_again(self) -> None:
        if self._error is not None:
            raise self._error
        if self._cancelling:
            raise Unavailable(Code.CANCELLED, "the job was cancelled by this client", fault=Fault.CLIENT)

    async def _cut_off(self, how: str) -> None:
        """The stream is gone: finds out what the coordinator knows of the job. A whole answer is delivered all the same;
        otherwise raises what says how much had been received.
        """
        answer = self._answer
        received = f"{answer.chunks} chunks with {answer.body_bytes} bytes of the answer"
        receipt: Verified[Receipt] | None = None
        over = False
        try:
            arrived = await self._note(StreamEnd.RESUMABLE if self._keyed else StreamEnd.ABANDONED)
            if answer.whole:
                await self._deliver(arrived)
            remote, receipt = await self._context.resolver.resolve(self.id, arrived, self._doubt)
            told = f"the coordinator says that the job is {remote.state.value}"
            over = remote.state in TERMINAL
            if receipt is None and remote.receipt is None and not answer.whole:
                await self._abandon()
        except BadReceipt as error:
            self._fail(error)
        except TallyError as error:
            told = str(error)
            if not answer.whole:
                await self._abandon()
        if answer.whole:
            answer.receipt = receipt
            self._leave()
            return
        if receipt is not None:
            told += f", billed {receipt.message.cost} base units"
        text = f"the stream from the coordinator broke ({how}) after {received}; {told}"
        self._fail(StreamInterrupted(text, receipt, retry=self._keyed or over))

    # Ending

    async def _deliver(self, arrived: dict[Hash, Delivery]) -> None:
        """The whole answer came, whatever is said of the job afterwards; its receipt is still to come."""
        text = "the whole answer came; its receipt is outstanding"
        await self._context.ledger.end_job(self.id, JobState.COMPLETED, text, self._context.now(), arrived=arrived)

    async def _finish_without(self, failure: TallyError) -> None:
        """The coordinator says that the job failed. Raises that, unless the whole answer had come."""
        answer, context = self._answer, self._context
        if answer.whole and answer.head is not None:
            log.warning("a job failed after its whole answer", job=self.id.hex(), reason=str(failure))
            await self._deliver(self._arrived())
            context.resolver.fetch(self.id)
            self._leave()
            return
        state = JobState.CANCELLED if self._cancelling else JobState.FAILED
        await context.ledger.end_job(self.id, state, str(failure), context.now(), arrived=self._arrived())
        if failure.code is Code.UNAUTHORISED_TAB:  # the provider has receipts that this ledger lacks
            context.resolver.wake()
            self._fail(await context.resolver.recovery.refused(self.id, failure))
        self._fail(failure)

    async def _finish(self) -> None:
        answer, context = self._answer, self._context
        if answer.failure is not None:
            await self._finish_without(answer.failure)
            return
        if answer.receipt is None or answer.match is None:
            raise RuntimeError("an answer ended without a receipt or a failure")
        delivered = answer.delivered(self._body_bytes, bounded=self._call.bounded, cancelled=self._cancelling or self._resumed)
        took = None if self._began is None else int((asyncio.get_running_loop().time() - self._began) * 1_000)
        doubt = await self._doubt(answer.receipt.message)
        arrival = IncomingReceipt(
            context.domain,
            self.id,
            answer.match,
            answer.receipt,
            delivered,
            context.now(),
            took,
            doubt,
            self.proof,
            arrived=self._arrived(),
        )
        complaint = await context.ledger.record_receipt(arrival)
        if answer.failed_providers:
            context.resolver.look_into(answer.failed_providers)
        if context.proofs is not None and self.proof is not None:
            await context.proofs.put(self.id, self.proof)
        error = complaint or outcome_error(answer, answer.receipt.message, cancelling=self._cancelling)
        if error is not None:
            self._fail(error)
        self._leave()

    async def _doubt(self, receipt: Receipt) -> AuditFinding | None:
        """What a recount has against the receipt of a whole answer."""
        auditor, answer = self._context.auditor, self._answer
        if auditor is None or not answer.whole or not auditor.counts(self._call.model, self._path):
            return None
        found = await auditor.audit(self._call.model, self._request, answer.kept, receipt)
        if found is not None:
            log.warning("a receipt is doubted", job=self.id.hex(), provider=receipt.provider, reason=found.reason)
        return found
