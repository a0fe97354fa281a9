"""Jobs of a batch whose answers come when its window is over, or after a cancel."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from tallystick.client.batches.ports import LineAnswer, LineJob
from tallystick.client.batches.records import Batch, BatchStatus, StoredFile
from tallystick.client.batches.service import BatchService
from tallystick.client.config import ClientConfig
from tallystick.client.gateway.batch_answers import BatchAnswers
from tallystick.client.gateway.handler import RequestHandler
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tests.client.fake_coordinator import CHAT, FakeMarket, Session, honest
from tests.client.gateway.test_batch_routes import jsonl, request_line


class Killed:
    """A process that ends after the first answer came, and before its line is stored."""

    def __init__(self, inner: BatchAnswers) -> None:
        self._inner, self.answered = inner, asyncio.Event()
        self.keys, self.key_state, self.key_cost = inner.keys, inner.key_state, inner.key_cost
        self.forget, self.leave = inner.forget, inner.leave

    async def answer(self, job: LineJob) -> LineAnswer:
        """Answers, and hangs."""
        answer = await self._inner.answer(job)
        assert answer.cost == 3
        self.answered.set()
        await asyncio.get_running_loop().create_future()
        return answer


def _alone(config: ClientConfig) -> ClientConfig:
    return replace(config, batch_concurrency=1)


async def _begin(service: BatchService, now: Callable[[], float], count: int) -> None:
    upload = await service.begin_upload()
    upload.add(jsonl(*map(request_line, range(count))))
    begin = int(now())
    await upload.finish(service.store, StoredFile(upload.id, "", "f", "batch", upload.size, begin, begin + 99_999))
    await service.end_upload(upload)
    batch = Batch(
        id="batch_1",
        caller="",
        endpoint=CHAT,
        input_file=upload.id,
        window="1m",
        status=BatchStatus.VALIDATING,
        created_at=begin,
        expires_at=begin + 60,
    )
    await service.store.create(batch, None)
    service.created()


async def _ended(service: BatchService) -> Batch:
    async with asyncio.timeout(120):
        while (batch := await service.store.batch("", "batch_1")).status not in (  # noqa: ASYNC110
            BatchStatus.COMPLETED,
            BatchStatus.EXPIRED,
            BatchStatus.CANCELLED,
        ):
            await asyncio.sleep(0.02)
    return batch


async def _errors(service: BatchService, batch: Batch) -> list[str]:
    if batch.error_file is None:
        return []
    content = b"".join([piece async for piece in service.folder.pieces(batch.error_file)])
    return [json.loads(line)["error"]["code"] for line in content.splitlines()]


class Clock:
    """Unix time, moved on by the test."""

    late = 0.0

    def now(self) -> float:
        """The time."""
        return time.time() + self.late


async def _stop_early(service: BatchService, clock: Clock, *, cancelled: bool) -> None:
    """What happened until the gateway comes back: a cancel, or the end of the window."""
    if cancelled:
        await service.store.advance("batch_1", BatchStatus.CANCELLING, int(clock.now()))
    else:
        clock.late = 100.0


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_paid_job_without_an_answer_counts(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, *, cancelled: bool
) -> None:
    """A line was answered when the gateway was killed, and nobody has its answer any more: it is no line that did not run, and
    its cost is the batch's. A line that was never begun is not begun now.
    """
    clock = Clock()
    async with Market(fake.url, wallet, config) as market:
        inner = BatchAnswers(market, RequestHandler(market))
        killed = Killed(inner)
        async with BatchService(_alone(config), wallet, killed, now=clock.now, grace=0.1) as service:
            await _begin(service, clock.now, 2)
            async with asyncio.timeout(120):
                await killed.answered.wait()
            await _stop_early(service, clock, cancelled=cancelled)
        answerer = BatchAnswers(market, RequestHandler(market))
        async with BatchService(_alone(config), wallet, answerer, now=clock.now, grace=60) as service:
            batch = await _ended(service)
            errors = await _errors(service, batch)
    assert batch.status is (BatchStatus.CANCELLED if cancelled else BatchStatus.EXPIRED)
    assert (batch.completed, batch.failed, batch.cost) == (0, 2, 3)
    assert errors == ["answer_lost", "batch_cancelled" if cancelled else "batch_expired"]
    assert len(fake.submissions) == 1


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_job_that_runs_is_waited_for(fake: FakeMarket, wallet: Signer, config: ClientConfig, *, cancelled: bool) -> None:
    """A line's job ran when the gateway stopped. After the end of its window, or a cancel, the next one still gets its answer."""
    clock, held = Clock(), asyncio.Event()

    async def holds(session: Session) -> None:
        held.set()
        await session.hang()

    fake.script = holds
    async with Market(fake.url, wallet, config) as market:
        answerer = BatchAnswers(market, RequestHandler(market))
        async with BatchService(_alone(config), wallet, answerer, now=clock.now) as service:
            await _begin(service, clock.now, 2)
            async with asyncio.timeout(120):
                await held.wait()
            await _stop_early(service, clock, cancelled=cancelled)
    job = fake.submissions[-1].job
    del fake.sessions[job]  # this fake keeps no answers; it takes the same bytes again instead
    fake.script = honest
    async with Market(fake.url, wallet, config) as market:
        answerer = BatchAnswers(market, RequestHandler(market))
        async with BatchService(_alone(config), wallet, answerer, now=clock.now, grace=60) as service:
            batch = await _ended(service)
            errors = await _errors(service, batch)
    assert (batch.completed, batch.failed, batch.cost) == (1, 1, 3)
    assert errors == ["batch_cancelled" if cancelled else "batch_expired"]
    assert {submission.job for submission in fake.submissions} == {job}
