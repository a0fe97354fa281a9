"""Resumes a job with an idempotency key: the same signed bytes return the job that they placed before, or place it now."""

from __future__ import annotations

from tallystick.client.coordinator.job_stream import JobStream
from tallystick.client.coordinator.transport import ConnectionLost, NotSent
from tallystick.client.jobs.placed_job import PlacedJob
from tallystick.client.jobs.response import JobResponse
from tallystick.client.jobs.running_job import JobContext, RunningJob
from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import PlacedOrder
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.sealing import ContentKey
from tallystick.protocol.types import Address, JobId, format_amount
from tallystick.protocol.versions import PROTOCOL


class KeyFreed(Unavailable):
    """The job of an idempotency key was lost or failed, and costs nothing. The key may place another job."""

    def __init__(self) -> None:
        text = "the job of this idempotency key was lost, or failed, and costs nothing; send the request again"
        super().__init__(Code.COORDINATOR_UNAVAILABLE, text)


async def resume_job(
    context: JobContext, coordinator: Address, keyed: IdempotencyKey, request: ApiRequest, *, keep_bytes: int
) -> RunningJob:
    """The job of an idempotency key, read from its first frame on. It costs what it cost before, and nothing more.

    A key whose job was never admitted, or was lost or failed and costs nothing, is forgotten, so that the next request
    with it places a new job. A job that a release with another protocol submitted cannot be resumed, since its bytes would be
    refused. Raises TallyError.
    """
    if keyed.header[:1] != bytes((PROTOCOL,)):
        text = "the request of this idempotency key was signed by another release and never arrived; send it again"
        raise await _explain_refusal(context, keyed, Unavailable(Code.COORDINATOR_UNAVAILABLE, text, fault=Fault.CLIENT))
    key, plaintext = ContentKey(keyed.content_key), request.plaintext
    known_job = await context.ledger.find_job(keyed.job)
    orders = () if known_job is None else known_job.orders
    placed = [PlacedOrder(known.order.verify(context.domain), known.terms) for known in orders]
    await context.ledger.set_reader(keyed.job)
    stream = await _post(context, keyed, keyed.header + key.seal_request(keyed.job, plaintext))
    by_digest = {order.order.digest: order for order in placed}
    response = JobResponse(keyed.job, key, by_digest, context.domain, coordinator, keep_bytes=keep_bytes, may_hedge=True)
    placed_job = PlacedJob(context, response, stream, request, keyed=True, resumed=True)
    return RunningJob(context, placed_job, request)


async def _post(context: JobContext, keyed: IdempotencyKey, submission: bytes) -> JobStream:
    try:
        return await context.coordinator.submit(submission, linger=context.config.linger_seconds)
    except (ConnectionLost, NotSent):
        raise
    except TallyError as refused:
        if refused.code is Code.COORDINATOR_UNAVAILABLE:
            raise
        raise await _explain_refusal(context, keyed, refused) from refused


async def _explain_refusal(context: JobContext, keyed: IdempotencyKey, refused: TallyError) -> TallyError:
    """Returns the error that says what became of a job whose answer can no longer be had."""
    job = keyed.job
    try:
        remote, receipt = await context.reconciler.reconcile(job)
    except Refusal as error:
        if error.code is not Code.UNKNOWN_JOB:
            raise
        return await _explain_unknown(context, job, refused)
    if remote.state is not State.CANCELLED and context.coordinator.replicas.has_several:
        if await context.reconciler.await_free_end(job, remote, cancels=False):  # another process may read it
            await context.ledger.forget_key_of(job)
            return KeyFreed()
        remote, receipt = await context.reconciler.reconcile(job)
    if remote.state in TERMINAL and remote.state is not State.CANCELLED and await context.reconciler.costs_nothing(job):
        await context.ledger.forget_key_of(job)
        return KeyFreed()
    if remote.state not in TERMINAL:
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, f"job {job.hex()} is {remote.state.value}; send the request again later")
    return _answer_gone(job, remote.state.value, receipt)


async def _explain_unknown(context: JobContext, job: JobId, refused: TallyError) -> TallyError:
    """The same for a job that the coordinator does not know. Its key is free if no provider is known to have had it."""
    known = await context.ledger.find_job(job)
    if known is not None and known.receipt is not None:  # the coordinator lost a job that was paid for: not to be paid twice
        return _answer_gone(job, known.state.value, known.receipt)
    if known is not None and _may_be_billed(known, context.now()):
        text = f"the coordinator lost job {job.hex()} of this idempotency key, and a provider that had it may still bill it"
        advice = "send the request again later; with another key it is another job"
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, f"{text}; {advice}", fault=Fault.COORDINATOR)
    await context.ledger.end_job(job, JobState.FAILED, str(refused), context.now(), keep_orders_open=True)
    await context.ledger.forget_key_of(job)
    if refused.code is Code.ORDER_EXPIRED:  # its caller did nothing wrong: the coordinator was away for too long
        text = "the orders of this idempotency key expired before the coordinator had them; send the request again"
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, text, fault=Fault.COORDINATOR)
    return refused


def _may_be_billed(known: KnownJob, now: int) -> bool:
    """Whether a provider that had a job, as its reader saw, may still collect on its order."""
    return any(order.state is OrderState.DISPATCHED and order.order.message.claim_by > now for order in known.orders)


def _answer_gone(job: JobId, state: str, receipt: Signed[Receipt] | None) -> Refusal:
    billed = "nothing was billed" if receipt is None else f"{format_amount(receipt.message.cost)} dollars were billed"
    text = (
        f"job {job.hex()} of this idempotency key ended as {state}, and {billed}; the coordinator no longer has its answer; use "
        "another key to place a new job"
    )
    return Refusal(Code.ORDER_REPLAYED, text, fault=Fault.NOBODY)
