"""A market whose coordinator takes no more jobs of its payer for now."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.routes import CHAT
from tests.client.fake_coordinator import BODY, FakeMarket, Session, eventually, honest, run

PATIENT = 600


def _full() -> Unavailable:
    error = Unavailable(Code.RATE_LIMITED, "2 jobs here, the maximum per payer (max_jobs_per_payer)", fault=Fault.CLIENT)
    error.retry_after = PATIENT
    return error


async def test_a_request_waits_until_a_job_of_this_client_ends(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """It is then ordered anew. What it may wait at the coordinator is what is left of its patience, and nothing of it is owed."""
    go_on = asyncio.Event()

    async def held(session: Session) -> None:
        await go_on.wait()
        await honest(session)

    fake.script = held
    async with Market(fake.url, wallet, replace(config, wait_seconds=PATIENT)) as market:
        first = await market.submit(CHAT, BODY)
        fake.refusals = [_full(), _full()]
        second = asyncio.create_task(market.submit(CHAT, BODY))
        await eventually(lambda: not fake.refusals)
        assert not second.done()
        go_on.set()
        await first.result()
        await (await second).result()
        assert len(fake.sessions) == 2
        assert 0 < (fake.last.submission.wait or 0) <= PATIENT
        assert (await market.tab(fake.orders()[0].provider)).open_caps == 0


async def test_a_request_without_patience_fails_at_once(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With the coordinator's own error."""
    async with Market(fake.url, wallet, config) as market:
        await run(market)
        fake.refusals = [_full()]
        with pytest.raises(Unavailable, match="max_jobs_per_payer"):
            await market.submit(CHAT, BODY, wait=0)


async def test_a_market_that_closes_lets_nobody_wait(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A request that waits is told that the client is stopping."""
    async with Market(fake.url, wallet, replace(config, wait_seconds=PATIENT)) as market:
        await run(market)
        fake.refusals = [_full(), _full()]
        waiting = asyncio.create_task(market.submit(CHAT, BODY))
        await eventually(lambda: not fake.refusals)
    with pytest.raises(Unavailable) as caught:
        await waiting
    assert caught.value.code is Code.SHUTTING_DOWN
