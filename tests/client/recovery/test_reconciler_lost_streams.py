"""Bills for lost streams are remembered, however early the streams broke; one network failure counts once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.receipts.delivery_check import QUARTERS_CUT_SHORT, QUARTERS_UNDELIVERED, UndeliveredCharge
from tallystick.client.recovery import reconciler
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Hash
from tests.client.fake_coordinator import BODY, CHAT, EVENTS, STREAM, FakeMarket, Session, event, eventually, run
from tests.client.parties import NOW, Provider

OTHER = Hash(b"\6" * 32)
ALL = Usage(100, 0, 100)
"""All the output that BODY pays for."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short intervals between queries."""
    monkeypatch.setattr(reconciler, "POLLS", (0.01, 0.05))


@pytest.fixture
async def fake() -> AsyncIterator[FakeMarket]:
    """A market with one provider."""
    async with FakeMarket(Provider.make("mallory")).serve() as market:
        yield market


async def cut_before_match(session: Session) -> None:
    """The provider takes the job and bills all of it; the client gets no match, and its stream is cut."""
    session.take(0)
    session.bill(ALL, result_commitment=OTHER)
    session.survives = True
    await session.cut()


@pytest.mark.parametrize("keyed", [False, True])
async def test_no_answer_is_billed_for_ever_before_its_match(market: Market, fake: FakeMarket, *, keyed: bool) -> None:
    """A stream that is cut before the client knows its provider causes no crash. The bill counts as not delivered, and the
    third one blocks the provider.
    """
    fake.script, mallory = cut_before_match, fake.providers[0].address
    for number in range(1, 4):
        with pytest.raises(TallyError) as caught:
            async with await market.submit(CHAT, BODY, key=f"key {number}" if keyed else None) as job:
                await job.result()
        assert caught.value.retry is keyed, "a key is the same job, which costs nothing more"
        assert (await market.tab(mallory)).undelivered_quarters == number * QUARTERS_UNDELIVERED
    with pytest.raises(Refusal) as refused:
        await run(market)
    assert (refused.value.code, len(fake.submissions)) == (Code.NO_PROVIDER, 3)


async def test_a_submission_that_broke_is_not_billed_unremembered(market: Market, fake: FakeMarket) -> None:
    """A keyed job whose connection broke before its stream began, and whose answer cannot be fetched, counts as not delivered."""
    fake.drops, fake.keeps = 2, True
    with pytest.raises(TallyError) as caught:
        await market.submit(CHAT, BODY, key="one")
    assert caught.value.retry
    fake.last.take(0)
    fake.last.bill(ALL, result_commitment=OTHER)
    with pytest.raises(Refusal, match="no longer has its answer"):
        await market.submit(CHAT, BODY, key="one")
    tab = await market.tab(fake.providers[0].address)
    assert (tab.accepted, tab.undelivered_quarters) == (50, QUARTERS_UNDELIVERED)


async def test_one_failure_of_the_network_blocks_no_provider(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Sixteen simultaneously lost streams of one provider count once, as the worst of them; the next failure counts again."""
    now, lost = NOW, asyncio.Event()

    async def begins(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("word"))
        await lost.wait()
        session.bill(Usage(10, 0, 3), Outcome.CLIENT_CANCELLED, result_commitment=OTHER)
        session.survives = True
        await session.cut()

    async def run_job() -> None:
        with pytest.raises(TallyError):
            await run(market, STREAM)

    fake.script, mallory = begins, fake.providers[0].address
    async with Market(fake.url, wallet, config, clock=lambda: now) as market:
        for turn in (1, 2):
            lost.clear()
            running = [asyncio.create_task(run_job()) for _ in range(16)]
            await eventually(lambda turn=turn: sum(bool(s.output_bytes) for s in fake.sessions.values()) == 16 * turn)  # type: ignore[misc]
            now += 10 * 10**9
            lost.set()
            await asyncio.gather(*running)
            tab = await market.tab(mallory)
            assert (tab.undelivered_quarters, tab.blocked_reason, tab.open_caps) == (turn * QUARTERS_CUT_SHORT, "", 0)


async def test_answers_that_were_kept_back_at_once_count_each(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Streams that were read to their end are no network failure, however many end without answers at once."""
    now, over = NOW, asyncio.Event()

    async def keeps_back(session: Session) -> None:
        await session.match()
        await over.wait()
        await session.finish(ALL, result_commitment=OTHER)

    async def run_job() -> None:
        with pytest.raises(UndeliveredCharge):
            await run(market, STREAM)

    fake.script = keeps_back
    async with Market(fake.url, wallet, config, clock=lambda: now) as market:
        running = [asyncio.create_task(run_job()) for _ in range(2)]
        await eventually(lambda: sum(session.attempts for session in fake.sessions.values()) == 2)
        now += 10 * 10**9
        over.set()
        await asyncio.gather(*running)
        assert (await market.tab(fake.providers[0].address)).undelivered_quarters == 2 * QUARTERS_UNDELIVERED
