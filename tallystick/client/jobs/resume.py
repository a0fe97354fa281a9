"""Taking a keyed job up again: the same signed bytes bring the job that they placed before, or place it now."""

from __future__ import annotations

import aiohttp

from tallystick.client.coordinator.http_client import ConnectionLost, NotSent
from tallystick.client.jobs.job import Job, JobContext
from tallystick.client.jobs.response import JobResponse
from tallystick.client.ledger.idempotency import IdempotencyKey
from tallystick.client.ledger.schema import JobState
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import PlacedOrder
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import TERMINAL
from tallystick.protocol.sealing import ContentKey
from tallystick.protocol.types import Address


async def resume_job(
    context: JobContext, coordinator: Address, known: IdempotencyKey, asked: ApiRequest, *, keep_bytes: int
) -> Job:
    """The job that a key stands for, from its first frame on. Raises TallyError: nothing more is owed than the job itself.

    A key whose job was never admitted is forgotten, so that the next request with it is a new job.
    """
    key, plain = ContentKey(known.content_key), asked.plaintext
    found = await context.ledger.find_job(known.job)
    orders = () if found is None else found.orders
    placed = [PlacedOrder(one.order.verify(context.domain), one.terms) for one in orders]
    await context.ledger.set_reader(known.job)
    response = await _post(context, known, known.header + key.seal_request(known.job, plain))
    answer = JobResponse(known.job, key, {p.order.digest: p for p in placed}, context.domain, coordinator, keep_bytes=keep_bytes)
    return Job(context, answer, response, asked.summary, plain, keyed=True, resumed=True)


async def _post(context: JobContext, known: IdempotencyKey, submission: bytes) -> aiohttp.ClientResponse:
    try:
        return await context.coordinator.submit(submission, linger=context.config.linger_seconds)
    except (ConnectionLost, NotSent):
        raise
    except TallyError as refused:
        if refused.code is Code.COORDINATOR_UNAVAILABLE:
            raise
        raise await _explain(context, known, refused) from refused


async def _explain(context: JobContext, known: IdempotencyKey, refused: TallyError) -> TallyError:
    """What became of a job whose answer cannot be had again."""
    job = known.job
    try:
        remote, receipt = await context.resolver.resolve(job)
    except Refusal as error:
        if error.code is not Code.UNKNOWN_JOB:
            raise
        await context.ledger.end_job(job, JobState.FAILED, str(refused), context.now(), keep=True)
        await context.ledger.forget_key(known.key)
        return refused
    if remote.state not in TERMINAL:
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, f"job {job.hex()} is {remote.state.value}; ask again")
    billed = "nothing was billed" if receipt is None else f"{receipt.message.cost} base units were billed"
    text = (
        f"job {job.hex()} of this idempotency key ended as {remote.state.value}, {billed}; the coordinator keeps its answer no "
        "longer; another key places a new job"
    )
    return Refusal(Code.ORDER_REPLAYED, text, fault=Fault.NOBODY)
