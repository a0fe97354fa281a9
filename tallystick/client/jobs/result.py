"""What a job comes to: its answer with order and receipt, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.client.jobs.response import JobResponse
from tallystick.client.openai.answers import TextDeltas, read_text
from tallystick.client.openai.errors import read_engine_error
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadSeal, Code, Fault, TallyError, Unavailable
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.pricing import Usage, usage_of
from tallystick.protocol.routes import media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import ResponseHead, loads


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """A finished job. `body`: the bytes of the answer that were not taken by iterating. `cost` is in base units.

    `receipt` is None where the whole answer came and its receipt is outstanding: the ledger has it once it came (`Market.find`).
    `commitment_key` opens the commitments of order and receipt; whoever has it can confirm guesses of the prompt. `proof` is
    None unless it was to be kept.
    """

    job: JobId
    head: ResponseHead
    body: bytes
    receipt: Verified[Receipt] | None
    order: Verified[Order]
    terms: Terms
    commitment_key: bytes
    proof: Proof | None = None

    @property
    def provider(self) -> Address:
        """Who did it."""
        return self.order.message.provider

    @property
    def usage(self) -> Usage:
        """The tokens that were billed; none as long as the receipt is outstanding."""
        return Usage(0, 0, 0) if self.receipt is None else usage_of(self.receipt.message)

    @property
    def cost(self) -> Amount:
        """What was billed, in base units; nothing yet as long as the receipt is outstanding."""
        return Amount(0) if self.receipt is None else self.receipt.message.cost

    @property
    def highest_cost(self) -> Amount:
        """The most that it may cost, in base units: what was billed, or the order's cap as long as the receipt is outstanding."""
        return self.terms.max_cost if self.receipt is None else self.receipt.message.cost

    @property
    def outcome(self) -> Outcome:
        """How it ended; completed as long as the receipt is outstanding, since the whole answer came."""
        return Outcome.COMPLETED if self.receipt is None else Outcome(self.receipt.message.outcome)

    def json(self) -> Any:
        """The body as JSON. Raises BadMessage."""
        return loads(self.body, "answer")

    @property
    def text(self) -> str:
        """The text of a completion's first choice; of a streamed one, what iterating left of it. Raises BadMessage or, for an
        error in the stream, Unavailable.
        """
        if media_type(self.head.content_type) == EVENT_STREAM:
            return "".join(TextDeltas().feed(self.body))
        return read_text(self.body)

    def __repr__(self) -> str:
        return f"Result(job={self.job.hex()}, provider={self.provider}, status={self.head.status}, cost={self.cost})"


class StreamInterrupted(Unavailable):
    """The stream ended without a receipt or a reason: the coordinator's fault. `receipt` is what it had when asked afterwards.
    `retry` is false where that bills something, and where the job may go on: asking again might buy the answer twice.
    """

    def __init__(self, message: str, receipt: Verified[Receipt] | None, *, retry: bool) -> None:
        super().__init__(Code.COORDINATOR_UNAVAILABLE, message, fault=Fault.COORDINATOR)
        self.receipt = receipt
        self.retry = retry and (receipt is None or receipt.message.cost == 0)


def require_success(result: Result) -> Result:
    """The result, unless the engine answered with an error. Raises Refusal or Unavailable with the engine's own words."""
    if result.head.status >= 400:
        raise read_engine_error(result.head.status, result.body)
    return result


def build_proof(domain: Domain, answer: JobResponse, request: bytes) -> Proof | None:
    """The proof of a job whose receipt came; None before, and where its answer was not to be kept or is too long."""
    if answer.kept is None or answer.receipt is None or answer.match is None:
        return None
    order, receipt = answer.match.order, answer.receipt
    return Proof(
        domain=domain,
        order=Signed(order.message, order.signature),
        terms=answer.match.terms,
        receipt=Signed(receipt.message, receipt.signature),
        commitment_key=answer.key.commitment_key,
        request=request,
        response=tuple(answer.kept),
    )


def outcome_error(answer: JobResponse, receipt: Receipt, *, cancelling: bool) -> TallyError | None:
    """What the caller must be told of a job whose receipt was booked and that did not bring the whole answer; None if all is
    well. `cancelling`: the caller itself stopped it.
    """
    outcome = Outcome(receipt.outcome)
    if outcome in (Outcome.COMPLETED, Outcome.LENGTH):
        return None if answer.whole else BadSeal("the answer was cut off before its last chunk", fault=Fault.COORDINATOR)
    if outcome is Outcome.CLIENT_CANCELLED:
        error = Unavailable(Code.CANCELLED, "the answer was cancelled on its way, not by this client", fault=Fault.COORDINATOR)
        error.retry = False
        return None if cancelling else error
    if answer.whole and answer.head is not None and answer.head.status >= 400:
        return None
    code = Code.TIMED_OUT if outcome is Outcome.TIMED_OUT else Code.PROVIDER_FAILED
    text = f"the provider did not finish the answer ({outcome.name.lower()}); nothing was billed"
    return Unavailable(code, text, fault=Fault.PROVIDER)
