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

from tallystick.client.answer import Answer
from tallystick.client.books import Arrival
from tallystick.client.config import ClientConfig
from tallystick.client.deltas import Deltas
from tallystick.client.folder import ProofFolder
from tallystick.client.ledger import Ledger
from tallystick.client.openai import EVENT_STREAM, Call
from tallystick.client.payer import Doubt, Placed
from tallystick.client.proof import Proof
from tallystick.client.recount import Auditor
from tallystick.client.resolver import Resolver
from tallystick.client.result import Result, Unfinished, require_success
from tallystick.client.tables import JobState
from tallystick.client.transport import Coordinator
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadReceipt, BadSeal, Code, Fault, PeerError, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.routes import media_type
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import FrameReader, Kind, ResponseHead, split_request

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Desk:
    """What a job needs of its market."""

    config: ClientConfig
    coordinator: Coordinator
    ledger: Ledger
    resolver: Resolver
    domain: Domain
    now: Callable[[], int]
    left: Callable[[Job], None]
    shared: Callable[[Job], bool]
    proofs: ProofFolder | None
    auditor: Auditor | None = None


class Job:
    """One job under way. `head` is None until `start` returned or the first bytes came."""

    def __init__(
        self,
        desk: Desk,
        answer: Answer,
        response: aiohttp.ClientResponse,
        call: Call,
        request: bytes,
        *,
        keyed: bool = False,
        began: float | None = None,
    ) -> None:
        """`keyed`: the job has an idempotency key, so a lost stream does not end it. `began`: the loop's time at the request."""
        self._began = began
        self._keyed = keyed
        self._desk, self._answer, self._response, self._call = desk, answer, response, call
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
    def candidates(self) -> tuple[Placed, ...]:
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
    def booked(self) -> bool:
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
        """The body, as the engine sent it, piece by piece. Ends once the receipt is booked; raises TallyError, also if it was
        cancelled meanwhile: what came is then not the whole answer.
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
        deltas = Deltas()
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
            if size > self._desk.config.max_answer_bytes:
                await self.cancel()
                text = f"the answer is longer than {self._desk.config.max_answer_bytes} bytes; stream it"
                raise Refusal(Code.BODY_TOO_LARGE, text)
        return self._result(b"".join(parts))

    def _result(self, body: bytes) -> Result:
        answer = self._answer
        if answer.head is None or answer.receipt is None or answer.match is None:
            raise Unavailable(Code.CANCELLED, "the job ended before an answer began", fault=Fault.CLIENT)
        placed, key = answer.match, answer.key.commitment_key
        return Result(self.id, answer.head, body, answer.receipt, placed.order, placed.terms, key, self.proof)

    @property
    def proof(self) -> Proof | None:
        """What proves the job to others, once its receipt came. None before, and where it was not to be kept or is too long."""
        answer = self._answer
        if answer.kept is None or answer.receipt is None or answer.match is None:
            return None
        order, receipt = answer.match.order, answer.receipt
        return Proof(
            domain=self._desk.domain,
            order=Signed(order.message, order.signature),
            terms=answer.match.terms,
            receipt=Signed(receipt.message, receipt.signature),
            commitment_key=answer.key.commitment_key,
            request=self._request,
            response=tuple(answer.kept),
        )

    async def cancel(self) -> Result | None:
        """Stops the job and waits, for a bounded time, for the receipt of what was delivered. None if it is not known yet."""
        self._cancelling = True
        try:
            async with asyncio.timeout(self._desk.config.cancel_seconds):
                if not self._done and not self._answer.ended:
                    await self._desk.coordinator.cancel(self.id)
                while not self._done:
                    await self._frame()
        except TimeoutError:
            self._leave()
            self._desk.resolver.abandon(self.id)
            return None
        except TallyError:
            if not self._done:
                self._leave()
                self._desk.resolver.abandon(self.id)
            return None
        answer = self._answer
        return self._result(b"") if self._error is None and answer.receipt is not None and answer.head is not None else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._done:
            return
        if self._desk.shared(self):  # a retry with the same key reads it now
            self._leave()
        else:
            await self.cancel()

    def _abandon(self) -> None:
        """Nobody reads the stream any more. A keyed job goes on for a while: a retry may take it up."""
        if not self._keyed:
            self._desk.resolver.abandon(self.id)

    # Reading

    async def _frame(self) -> bytes:
        """Takes one frame. Returns the body bytes in it, often none; raises what ended the job, if it ended badly."""
        async with self._reading:
            if self._done:
                return b""
            if self._answer.ended:  # a former reader was cancelled while it wrote the end down
                await self._finish()
                return b""
            while not self._frames:
                await self._fill()
            try:
                chunk = self._answer.accept(*self._frames.popleft())
            except PeerError as error:
                self._break(error)
            if self._answer.ended:
                await self._finish()
            return chunk

    async def _fill(self) -> None:
        try:
            data = await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await self._cut_off(str(error) or type(error).__name__)
        if not data:
            await self._cut_off("it closed")
        try:
            self._frames.extend(self._reader.feed(data))
        except PeerError as error:
            error.fault = Fault.COORDINATOR
            self._break(error)

    def _break(self, error: TallyError) -> NoReturn:
        self._abandon()
        self._fail(error)

    def _fail(self, error: TallyError) -> NoReturn:
        self._error = error
        self._leave()
        raise error

    def _leave(self) -> None:
        self._done = True
        if not self._response.content.at_eof():  # at its end the connection went back to the pool by itself
            self._response.close()
        self._desk.left(self)

    def _raise_again(self) -> None:
        if self._error is not None:
            raise self._error
        if self._cancelling:
            raise Unavailable(Code.CANCELLED, "the job was cancelled by this client", fault=Fault.CLIENT)

    async def _cut_off(self, how: str) -> NoReturn:
        """The stream is gone: finds out what the coordinator knows of the job, and says what had been received."""
        received = f"{self._answer.chunks} chunks with {self._answer.body_bytes} bytes of the answer"
        delivered = self._answer.delivered(self._body_bytes, bounded=self._call.bounded)
        receipt: Verified[Receipt] | None = None
        try:
            remote, receipt = await self._desk.resolver.resolve(self.id, delivered)
            told = f"the coordinator says that the job is {remote.state.value}"
            if receipt is None and remote.receipt is None:
                self._abandon()
        except BadReceipt as error:
            self._fail(error)
        except TallyError as error:
            told = str(error)
            self._abandon()
        if receipt is not None:
            told += f", billed {receipt.message.cost} base units"
        self._fail(Unfinished(f"the stream from the coordinator broke ({how}) after {received}; {told}", receipt))

    # Ending

    async def _finish(self) -> None:
        answer, desk = self._answer, self._desk
        if answer.failure is not None:
            state = JobState.CANCELLED if self._cancelling else JobState.FAILED
            await desk.ledger.end(self.id, state, str(answer.failure), desk.now())
            if answer.failure.code is Code.UNAUTHORISED_TAB:  # the provider has receipts that this ledger lacks
                desk.resolver.wake()
                self._fail(await desk.resolver.recovery.refused(self.id, answer.failure))
            self._fail(answer.failure)
        if answer.receipt is None or answer.match is None:
            raise RuntimeError("an answer ended without a receipt or a failure")
        delivered = answer.delivered(self._body_bytes, bounded=self._call.bounded)
        took = None if self._began is None else int((asyncio.get_running_loop().time() - self._began) * 1_000)
        doubt = await self._doubt(answer.receipt.message)
        arrival = Arrival(desk.domain, self.id, answer.match, answer.receipt, delivered, desk.now(), took, doubt, self.proof)
        complaint = await desk.ledger.book(arrival)
        if answer.passed_over:
            desk.resolver.look_into(answer.passed_over)
        if desk.proofs is not None and self.proof is not None:
            await desk.proofs.put(self.id, self.proof)
        error = complaint or self._shortfall(answer.receipt.message)
        if error is not None:
            self._fail(error)
        self._leave()

    async def _doubt(self, receipt: Receipt) -> Doubt | None:
        auditor, kept = self._desk.auditor, self._answer.kept
        if auditor is None or not self._answer.whole or not auditor.counts(self._call.model, self._path):
            return None
        if kept is None:
            found: Doubt | None = Doubt("the answer is too long to be counted again", refuse=False)
        else:
            found = await auditor.doubt(self._call.model, self._request, kept, receipt)
        if found is not None:
            log.warning("a receipt is doubted", job=self.id.hex(), provider=receipt.provider, reason=found.reason)
        return found

    def _shortfall(self, receipt: Receipt) -> TallyError | None:
        """What the caller must be told of an honestly billed job that did not bring the whole answer."""
        outcome = Outcome(receipt.outcome)
        answer = self._answer
        if outcome in (Outcome.COMPLETED, Outcome.LENGTH):
            return None if answer.whole else BadSeal("the answer was cut off before its last chunk", fault=Fault.COORDINATOR)
        if outcome is Outcome.CLIENT_CANCELLED:
            text = "the answer was cancelled on its way, not by this client"
            return None if self._cancelling else Unavailable(Code.CANCELLED, text, fault=Fault.COORDINATOR)
        if answer.whole and answer.head is not None and answer.head.status >= 400:
            return None
        code = Code.TIMED_OUT if outcome is Outcome.TIMED_OUT else Code.PROVIDER_FAILED
        text = f"the provider did not finish the answer ({outcome.name.lower()}); nothing was billed"
        return Unavailable(code, text, fault=Fault.PROVIDER)
