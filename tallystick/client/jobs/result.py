"""What a finished job gives its caller: the result, or the error that says why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.client.jobs.response import JobResponse
from tallystick.client.openai.answers import TextDeltas, read_text
from tallystick.client.openai.errors import read_engine_error
from tallystick.client.receipts.answer_evidence import NO_EVIDENCE, AnswerEvidence
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Domain, Signed, Verified
from tallystick.protocol.errors import BadSeal, Code, Fault, TallyError, Unavailable
from tallystick.protocol.lenient_json import parse_lenient
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.plaintext_heads import ResponseHead
from tallystick.protocol.pricing import Usage, usage_of
from tallystick.protocol.routes import media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.types import Address, Amount, JobId, format_amount


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """A finished job. `body`: the bytes of the answer that were not read by iterating.

    `receipt` is None if the whole answer came and its receipt is outstanding; the ledger has the receipt once it came
    (`Market.find`). `commitment_key` opens the commitments in the order and the receipt; anyone who has it can confirm guesses of
    the request. `proof` is None unless it was to be kept. `answer_evidence`: the rows of evidence that came, and what is known of
    them.
    """

    job: JobId
    head: ResponseHead
    body: bytes
    receipt: Verified[Receipt] | None
    order: Verified[Order]
    terms: Terms
    commitment_key: bytes
    proof: Proof | None = None
    answer_evidence: AnswerEvidence = NO_EVIDENCE

    @property
    def provider(self) -> Address:
        """The provider that did the job."""
        return self.order.message.provider

    @property
    def evidence(self) -> tuple[EvidenceRow, ...]:
        """What the provider committed to of each token of the answer, checked against the receipt; empty without."""
        return self.answer_evidence.rows

    @property
    def usage(self) -> Usage:
        """The tokens that were billed; none while the receipt is outstanding."""
        return Usage(0, 0, 0) if self.receipt is None else usage_of(self.receipt.message)

    @property
    def cost(self) -> Amount:
        """What was billed, in base units; 0 while the receipt is outstanding."""
        return Amount(0) if self.receipt is None else self.receipt.message.cost

    @property
    def highest_cost(self) -> Amount:
        """What was billed, in base units; while the receipt is outstanding, the most that can be billed."""
        return self.terms.max_cost if self.receipt is None else self.receipt.message.cost

    @property
    def outcome(self) -> Outcome:
        """How the job ended; COMPLETED while the receipt is outstanding, because the whole answer came."""
        return Outcome.COMPLETED if self.receipt is None else Outcome(self.receipt.message.outcome)

    def json(self) -> Any:
        """The body as JSON. Raises BadMessage."""
        return parse_lenient(self.body, "answer")

    @property
    def text(self) -> str:
        """The text of the first choice of a completion; of a streamed one, the text that iterating left.

        Raises BadMessage if the body is no completion, and Unavailable for an error event in the stream.
        """
        if media_type(self.head.content_type) == EVENT_STREAM:
            return "".join(TextDeltas().feed(self.body))
        return read_text(self.body)

    def __repr__(self) -> str:
        cost = f"{format_amount(self.cost)} dollars"
        return f"Result(job={self.job.hex()}, provider={self.provider}, status={self.head.status}, cost={cost})"


class StreamInterrupted(Unavailable):
    """The stream ended without a receipt or a failure: the coordinator's fault.

    `receipt` is the receipt that the coordinator had when it was asked afterwards. `retry` is False if that receipt bills
    something or the job may still run, because another request could then buy the answer twice. It is always True for a job with
    an idempotency key: a request with that key is the same job, and brings its answer.
    """

    def __init__(self, message: str, receipt: Verified[Receipt] | None, *, keyed: bool, over: bool) -> None:
        """`keyed`: the job has an idempotency key; `over`: it has ended."""
        super().__init__(Code.COORDINATOR_UNAVAILABLE, message, fault=Fault.COORDINATOR)
        self.receipt = receipt
        self.retry = keyed or (over and (receipt is None or receipt.message.cost == 0))


def require_success(result: Result) -> Result:
    """Returns the result. Raises Refusal or Unavailable, with the engine's own message, if the engine answered with an error."""
    if result.head.status >= 400:
        raise read_engine_error(result.head.status, result.body)
    return result


def build_proof(domain: Domain, response: JobResponse, request: bytes) -> Proof | None:
    """The proof of a job. None before its receipt came, and if its answer was not to be kept or is too long."""
    if response.kept is None or response.receipt is None or response.match is None:
        return None
    order, receipt = response.match.order, response.receipt
    return Proof(
        domain=domain,
        order=Signed(order.message, order.signature),
        terms=response.match.terms,
        receipt=Signed(receipt.message, receipt.signature),
        commitment_key=response.key.commitment_key,
        request=request,
        response=tuple(response.kept),
        evidence=response.packed_rows,
    )


def outcome_error(response: JobResponse, receipt: Receipt, *, cancelling: bool) -> TallyError | None:
    """The error of a job whose receipt was recorded but whose answer is incomplete; None if all is well.

    `cancelling`: whether the caller itself cancelled the job.
    """
    outcome = Outcome(receipt.outcome)
    if outcome in (Outcome.COMPLETED, Outcome.LENGTH):
        if response.complete:
            return None
        return BadSeal("the coordinator cut off the answer before its last chunk", fault=Fault.COORDINATOR)
    if outcome is Outcome.CLIENT_CANCELLED:
        text = "the job was cancelled before its answer was complete, and not by this client"
        error = Unavailable(Code.CANCELLED, text, fault=Fault.COORDINATOR)
        error.retry = False
        return None if cancelling else error
    if response.complete and response.head is not None and response.head.status >= 400:
        return None
    code = Code.TIMED_OUT if outcome is Outcome.TIMED_OUT else Code.PROVIDER_FAILED
    text = f"the provider did not finish the answer ({outcome.name.lower()}); nothing was billed"
    return Unavailable(code, text, fault=Fault.PROVIDER)
