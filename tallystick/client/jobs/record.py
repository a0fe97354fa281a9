"""What a job leaves in the ledger: what arrived of its answer, its receipts, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from tallystick.client.jobs.response import JobResponse
from tallystick.client.jobs.result import build_proof, outcome_error
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.client.receipts.file_store import ProofStore
from tallystick.client.receipts.proof import Proof
from tallystick.client.receipts.token_audit import AuditFinding, TokenAuditor
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.errors import Code, TallyError
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Hash

log = structlog.get_logger()
LARGE = 1 << 15
"""Bytes of evidence, a thousand rows, from which on they are checked beside the event loop."""
_NEVER_RAN = (Code.NODE_BUSY, Code.NO_PROVIDER)
"""Failures of a job that no provider took, such as the end of its wait for a slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordContext:
    """What the record of a job needs from its market. `now` is Unix time in seconds."""

    ledger: Ledger
    reconciler: Reconciler
    domain: Domain
    now: Callable[[], int]
    proof_folder: ProofStore | None
    auditor: TokenAuditor | None = None


class JobRecord:
    """The record of one job. `cancelling`: whether this client has cancelled it."""

    def __init__(
        self,
        context: RecordContext,
        response: JobResponse,
        request: ApiRequest,
        *,
        keyed: bool,
        resumed: bool,
        began: float | None,
    ) -> None:
        """`keyed`, `resumed` and `began`: see `Job`."""
        self._context, self._response, self._summary = context, response, request.summary
        self._request, self._path, self._body_bytes = request.plaintext, request.head.path, len(request.body)
        self._keyed, self._resumed, self._began = keyed, resumed, began
        self.cancelling = False
        self.for_audit_only = False
        """Whether the answer is kept for a possible audit alone, and not for a proof."""

    @property
    def proof(self) -> Proof | None:
        """See `Job.proof`."""
        return None if self.for_audit_only else self.audit_proof

    @property
    def audit_proof(self) -> Proof | None:
        """The proof of the job if its answer was kept, for whatever reason."""
        return build_proof(self._context.domain, self._response, self._request)

    async def arrived(self, stream: StreamEnd) -> dict[Hash, Delivery]:
        """Records what arrived on a stream that was lost or left: nothing for orders without a match. Returns what arrived for
        the matched orders.
        """
        ledger, response = self._context.ledger, self._response
        deliveries = self._delivered_by_order(stream)
        await ledger.store_deliveries(response.job, deliveries)
        unmatched = response.unmatched(self._body_bytes, bounded=self._summary.bounded, stream=stream)
        await ledger.store_deliveries(response.job, unmatched, matched=False)
        return deliveries

    async def voids(self) -> None:
        """Records receipts at no cost, which releases the caps of their orders. A dishonest one concerns its provider alone."""
        voids, context = self._response.voids, self._context
        while voids:
            placed, receipt = voids[0]
            await context.ledger.record_receipt(
                IncomingReceipt(context.domain, self._response.job, placed, receipt, None, context.now(), final=False)
            )
            if voids:  # another reader may have removed it meanwhile
                voids.popleft()

    async def whole_answer(self, deliveries: dict[Hash, Delivery]) -> None:
        """Records that the whole answer came while its receipt is outstanding."""
        text = "the whole answer came; its receipt is outstanding"
        await self._context.ledger.end_job(
            self._response.job, JobState.COMPLETED, text, self._context.now(), deliveries=deliveries
        )

    async def end(self) -> TallyError | None:
        """Records the end of a job whose response ended. Returns the error that its reader gets; None after a whole answer."""
        response = self._response
        if response.failure is not None:
            return await self._failure(response.failure)
        if response.receipt is None or response.match is None:
            raise RuntimeError("a response ended without a receipt or a failure")
        objection = await self._receipt(response.receipt)
        return objection or outcome_error(response, response.receipt.message, cancelling=self.cancelling)

    async def _evidence_finding(self) -> AuditFinding | None:
        """What is wrong with the rows of evidence that came, which take a while to check if they are many."""
        response = self._response
        evidence = await asyncio.to_thread(lambda: response.evidence) if len(response.packed_rows) > LARGE else response.evidence
        if evidence.finding is not None:
            provider = None if response.match is None else response.match.provider
            log.warning("false evidence", job=response.job.hex(), provider=provider, reason=evidence.reason)
        return evidence.finding

    async def doubt(self, receipt: Receipt) -> AuditFinding | None:
        """What the token audit objects to in the receipt of a whole answer."""
        auditor, response = self._context.auditor, self._response
        if auditor is None or not response.complete or not auditor.counts(self._summary.model, self._path):
            return None
        doubt = await auditor.audit(self._summary.model, self._request, response.kept, receipt)
        if doubt is not None:
            log.warning("receipt doubted", job=response.job.hex(), provider=receipt.provider, reason=doubt.reason)
        return doubt

    def _delivered_by_order(self, stream: StreamEnd = StreamEnd.ENDED) -> dict[Hash, Delivery]:
        cancelled = self.cancelling or self._resumed or stream is not StreamEnd.ENDED
        return self._response.delivered_by_order(
            self._body_bytes, bounded=self._summary.bounded, cancelled=cancelled, stream=stream
        )

    async def _failure(self, failure: TallyError) -> TallyError | None:
        """Ends a job that the coordinator reported as failed. Returns the failure, unless the whole answer had come."""
        response, context = self._response, self._context
        if response.complete and response.head is not None:
            log.warning("job failed after its whole answer", job=response.job.hex(), reason=failure.public_text)
            await self.whole_answer(self._delivered_by_order())
            context.reconciler.fetch_receipt(response.job)
            return None
        state = JobState.CANCELLED if self.cancelling else JobState.FAILED
        deliveries = self._delivered_by_order()
        await context.ledger.end_job(response.job, state, failure.public_text, context.now(), deliveries=deliveries)
        never_ran = failure.code in _NEVER_RAN or (failure.retry and response.match is None)
        if self._keyed and never_ran and response.head is None:
            await self._free_key()
        if failure.code is Code.UNAUTHORISED_TAB:  # the provider has receipts that this ledger does not have
            context.reconciler.wake()
            return await context.reconciler.recovery.explain_refusal(response.job, failure)
        return failure

    async def _free_key(self) -> None:
        """Lets the key of a job that never ran place a new one: the coordinator keeps this failure.

        Not while a provider that had the job may bill it. Then a later request with the key looks again.
        """
        job, reconciler = self._response.job, self._context.reconciler
        if await reconciler.costs_nothing(job):
            await self._context.ledger.forget_key_of(job)
        else:
            reconciler.fetch_void(job)

    async def _receipt(self, receipt: Verified[Receipt]) -> TallyError | None:
        """Records the receipt that ended the job. Returns what is wrong with it, if anything is."""
        response, context, job = self._response, self._context, self._response.job
        if response.match is None:
            raise RuntimeError("a receipt came without a match")
        delivered = response.delivered(
            self._body_bytes, bounded=self._summary.bounded, cancelled=self.cancelling or self._resumed
        )
        took_ms = None if self._began is None else int((asyncio.get_running_loop().time() - self._began) * 1_000)
        doubt = await self._evidence_finding() or await self.doubt(receipt.message)
        incoming = IncomingReceipt(
            context.domain,
            job,
            response.match,
            receipt,
            delivered,
            context.now(),
            took_ms,
            doubt,
            self.proof,
            hedge_cost=response.hedge_cost,
            other_deliveries=self._delivered_by_order(),
        )
        objection = await context.ledger.record_receipt(incoming)
        if response.failed_providers:
            context.reconciler.recover_tabs(response.failed_providers)
        if response.outrun_order is not None:
            context.reconciler.fetch_void(job)
        if context.proof_folder is not None and self.proof is not None:
            await context.proof_folder.put(job, self.proof)
        return objection
