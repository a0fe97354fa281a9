"""Shortlists: what the coordinator is asked for once, and what again."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.routes import CHAT, MESSAGES
from tests.client.fake_coordinator import BODY, FakeMarket
from tests.client.parties import MODEL


async def _refusal(market: Market, route: str) -> Code:
    with pytest.raises(TallyError) as caught:
        await market.shortlist(MODEL, route=route)
    return caught.value.code


async def test_a_route_that_nobody_serves_is_remembered(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Requests in another dialect ask for their own route first; other refusals are asked for again."""
    async with Market(fake.url, wallet, replace(config, shortlist_seconds=600)) as market:
        assert [await _refusal(market, MESSAGES) for _ in range(3)] == [Code.UNKNOWN_ROUTE] * 3
        assert len(fake.shortlists) == 1
        for count in (2, 3):
            fake.refusals.append(Refusal(Code.NO_PROVIDER, "none fits"))
            assert await _refusal(market, CHAT) is Code.NO_PROVIDER
            assert len(fake.shortlists) == count
        for _ in range(2):
            assert await market.shortlist(MODEL)
        assert len(fake.shortlists) == 4


async def test_a_remembered_refusal_expires(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A provider that comes with the route is found."""
    async with Market(fake.url, wallet, replace(config, shortlist_seconds=0)) as market:
        for count in (1, 2):
            assert await _refusal(market, MESSAGES) is Code.UNKNOWN_ROUTE
            assert len(fake.shortlists) == count


async def test_jobs_that_lost_a_race_get_lists_of_their_own(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Jobs that began at the same time share a shortlist. Those whose providers were busy ask again, each for itself, and say how
    many they are, so that they do not all order on the same providers a second time. A single job says nothing of the kind.
    """
    fake.busy = True
    async with Market(fake.url, wallet, replace(config, shortlist_seconds=600)) as market:

        async def run() -> None:
            async with await market.submit(CHAT, BODY) as job:
                await job.result()

        await asyncio.gather(*(run() for _ in range(6)))
        first, *others = fake.shortlists
        assert "concurrent" not in first
        assert len(others) == 5, "one of six jobs asked for the list and waits for its providers"
        assert sum(query.get("concurrent", 0) > 0 for query in others) >= 4, "the last of them may be alone by then"
        assert max(query.get("concurrent", 0) for query in others) in (4, 5)
        del fake.shortlists[:]
        await market.submit(CHAT, BODY)
        await run()
        assert all("concurrent" not in query for query in fake.shortlists)
