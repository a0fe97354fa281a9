"""Jobs with idempotency keys at a coordinator that lost them, such as one whose database was away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.types import JobId
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session
from tests.client.parties import Provider


@pytest.fixture
async def fake() -> AsyncIterator[FakeMarket]:
    """A market with one provider."""
    async with FakeMarket(Provider.make("ann")).serve() as market:
        yield market


async def _buy(market: Market) -> int:
    """Buys an answer with the key. Returns its cost in base units."""
    async with await market.submit(CHAT, BODY, key="one") as job:
        result = await job.result()
    assert result.receipt is not None
    return int(result.receipt.message.cost)


@pytest.mark.parametrize("code", [Code.ORDER_EXPIRED, Code.ORDER_REPLAYED, Code.UNAUTHORISED_TAB])
async def test_a_paid_job_that_the_coordinator_lost_is_not_bought_again(market: Market, fake: FakeMarket, code: Code) -> None:
    """However often the key is used again, and whatever the coordinator says, its job stays the one that was paid for."""
    cost = await _buy(market)
    assert cost > 0
    fake.sessions.clear()
    for _ in range(3):
        fake.refusals = [Refusal(code, "the coordinator knows nothing of it")]
        with pytest.raises(
            Refusal, match=r"ended as completed, and [0-9.]+ dollars were billed.* no longer has its answer"
        ) as refused:
            await market.submit(CHAT, BODY, key="one")
        assert (refused.value.code, refused.value.retry) == (Code.ORDER_REPLAYED, False)
    assert len({submission.job for submission in fake.submissions}) == 1


async def _no_database(session: Session) -> None:
    await session.fail(Unavailable(Code.COORDINATOR_UNAVAILABLE, "the database does not answer"))


async def _no_database_after_match(session: Session) -> None:
    await session.match()
    await session.fail(Unavailable(Code.COORDINATOR_UNAVAILABLE, "the database does not answer"))


async def _failed_jobs(market: Market, fake: FakeMarket, script: Callable[[Session], Awaitable[None]]) -> set[JobId]:
    """The jobs that one key places while each of them fails as the script says."""
    fake.script = script
    for _ in range(3):
        with pytest.raises(TallyError):
            async with await market.submit(CHAT, BODY, key="one") as job:
                await job.result()
    return {submission.job for submission in fake.submissions}


async def test_a_failure_before_any_match_frees_its_key(market: Market, fake: FakeMarket) -> None:
    """The coordinator keeps the failure of such a job for as long as an answer: a repeated request gets a new job instead."""
    works = fake.script
    assert len(await _failed_jobs(market, fake, _no_database)) == 3
    fake.script = works
    assert await _buy(market) > 0


async def test_a_failure_after_a_match_keeps_its_key(market: Market, fake: FakeMarket) -> None:
    """A provider may have run and may charge the job, so its key places no second one."""
    assert len(await _failed_jobs(market, fake, _no_database_after_match)) == 1


async def test_a_job_that_was_never_admitted_frees_its_key(market: Market, fake: FakeMarket) -> None:
    """A key whose job nobody ran buys an answer as soon as it can."""
    fake.refusals = [Refusal(Code.ORDER_EXPIRED, "too late")]
    with pytest.raises(Refusal):
        await market.submit(CHAT, BODY, key="one")
    assert await _buy(market) > 0


async def test_a_job_whose_orders_expired_on_their_way_may_be_sent_again(market: Market, fake: FakeMarket) -> None:
    """A coordinator that was away for longer than its orders are valid never had it. That is no fault of its caller."""
    fake.drops = 2
    with pytest.raises(TallyError):
        await market.submit(CHAT, BODY, key="one")
    fake.refusals = [Refusal(Code.ORDER_EXPIRED, "order.deadline: passed 11 s ago")]
    with pytest.raises(Unavailable, match="expired before the coordinator had them; send the request again") as failed:
        await market.submit(CHAT, BODY, key="one")
    assert (failed.value.retry, failed.value.fault) == (True, Fault.COORDINATOR)
    assert await _buy(market) > 0
