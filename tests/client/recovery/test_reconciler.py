from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.ledger.schema import JobState
from tallystick.client.recovery import reconciler
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import Amount, JobId
from tests.client.fake_coordinator import CHAT, EVENTS, STREAM, FakeMarket, Session, eventually, honest, run, until_cancelled


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short intervals between queries."""
    monkeypatch.setattr(reconciler, "POLLS", (0.01, 0.05))


@pytest.fixture
async def reconciling_market(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[Market]:
    """A client that reconciles its open jobs every second."""
    async with Market(fake.url, wallet, replace(config, start_seconds=1, cancel_seconds=0.2)) as market:
        yield market


async def state_of(market: Market, job: JobId) -> JobState | None:
    """Returns the state of a job."""
    known = await market.find(job)
    return None if known is None else known.state


async def survives(session: Session) -> None:
    """Breaks the stream of a job that continues."""
    await session.match()
    await session.answer(200, EVENTS)
    session.survives = True
    await session.cut()


async def test_lost_job_is_settled_when_its_end_is_known(reconciling_market: Market, fake: FakeMarket) -> None:
    """A job whose stream broke is recorded by the running client once the coordinator has its receipt."""
    fake.script = survives
    with pytest.raises(Unavailable):
        await run(reconciling_market, STREAM)
    lost = fake.last
    fake.script = honest

    async def is_lost() -> bool:
        return await state_of(reconciling_market, lost.job) is JobState.LOST

    await eventually(is_lost)
    lost.bill()

    async def settled() -> bool:
        return await state_of(reconciling_market, lost.job) is JobState.COMPLETED

    await eventually(settled)
    assert (await reconciling_market.tab(fake.providers[0].address)).accepted == 3


async def test_job_that_never_got_there_is_given_up(reconciling_market: Market, fake: FakeMarket) -> None:
    """A job that the coordinator does not know is given up. That nobody has its orders is only the coordinator's claim, so
    they count until nobody can collect on them.
    """
    fake.script = until_cancelled
    task = asyncio.create_task(run(reconciling_market, STREAM))
    await eventually(lambda: bool(fake.sessions))
    job = fake.last.job
    fake.sessions.clear()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    async def failed() -> bool:
        return await state_of(reconciling_market, job) is JobState.FAILED

    await eventually(failed)
    cap = fake.submissions[0].candidates[0].terms.max_cost
    assert [(await reconciling_market.tab(provider.address)).open_caps for provider in fake.providers] == [cap, cap]


async def test_dishonest_receipt_of_a_lost_job(reconciling_market: Market, fake: FakeMarket) -> None:
    """A dishonest receipt that is fetched later is still evidence."""
    fake.script = survives
    with pytest.raises(Unavailable):
        await run(reconciling_market, STREAM)
    fake.last.bill(cost=Amount(50), cumulative_cost=Amount(50))

    async def evidence_stored() -> bool:
        return len(await reconciling_market.evidence()) == 1

    await eventually(evidence_stored)
    assert await state_of(reconciling_market, fake.last.job) is JobState.DISPUTED


async def test_jobs_that_run_here_are_left_alone(reconciling_market: Market, fake: FakeMarket) -> None:
    """A job that is being read is not queried, however long it runs."""
    fake.script = until_cancelled
    async with await reconciling_market.submit(CHAT, STREAM) as job:
        await job.start()
        fake.sessions[job.id].bill()
        await asyncio.sleep(1.5)
        assert await state_of(reconciling_market, job.id) is JobState.OPEN
        fake.sessions[job.id].provider.tab = fake.last.provider.tab._replace(seq=0, cumulative=Amount(0))
