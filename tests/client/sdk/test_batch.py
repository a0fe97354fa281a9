from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tallystick.client.sdk import batch
from tallystick.client.sdk.batch import BatchResult
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session, completion, eventually, until_cancelled
from tests.client.parties import MODEL


@pytest.fixture(autouse=True)
def _short_retry_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes retries fast enough for a test."""
    monkeypatch.setattr(batch, "LONGEST_RETRY_SECONDS", 0.01)


def numbered(count: int | None = None) -> Iterator[dict[str, Any]]:
    """Requests with a number in their text."""
    numbers = itertools.count() if count is None else range(count)
    return (BODY | {"messages": [{"role": "user", "content": str(number)}]} for number in numbers)


def number(session: Session) -> int:
    """The number in the session's request."""
    return int(session.request["messages"][0]["content"])


async def echo(session: Session) -> None:
    """Answers with the request's number; of four requests, the later ones are faster."""
    await session.match()
    await asyncio.sleep(0.01 * (4 - number(session) % 4))
    await say(session)


async def say(session: Session) -> None:
    """Answers after the match."""
    await session.answer()
    await session.chunk(completion(str(number(session))), last=True)
    await session.finish()


async def say_when_matched(session: Session) -> None:
    """Answers with the request's number."""
    await session.match()
    await say(session)


async def test_a_map_of_class_batch(market: Market, fake: FakeMarket) -> None:
    """All its jobs wait behind interactive ones, retries too. Each request has one result, also if it found no slot at first."""

    async def busy_at_first(session: Session) -> None:
        if len(fake.sessions) <= 2:
            await session.fail(Unavailable(Code.NODE_BUSY, "no slot became free", fault=Fault.PROVIDER))
        else:
            await session.match()
            await say(session)

    fake.script = busy_at_first
    found = [done async for done in market.map(numbered(4), priority="batch", wait=600, concurrency=2, ordered=False)]
    assert sorted((done.index, done.unwrap().text) for done in found) == [(at, str(at)) for at in range(4)]
    assert sum(done.attempts for done in found) == len(fake.submissions) == 6
    assert all(submission.batch for submission in fake.submissions)


async def test_results_in_order_or_as_they_end(market: Market, fake: FakeMarket) -> None:
    """Each request has exactly one result with its receipt, in the order of the requests or as they end."""
    fake.script = echo
    results = [result async for result in market.map(numbered(12), concurrency=4)]
    assert [result.index for result in results] == list(range(12))
    assert [result.unwrap().text for result in results] == [str(at) for at in range(12)]
    assert all(result.unwrap().cost == 3 and result.attempts == 1 for result in results)
    unordered = [result async for result in market.map(numbered(12), concurrency=4, ordered=False)]
    assert sorted(result.index for result in unordered) == list(range(12))
    assert all(result.unwrap().text == str(result.index) for result in unordered)


@pytest.mark.parametrize("ordered", [True, False])
async def test_concurrency_is_bounded(market: Market, fake: FakeMarket, ordered: bool) -> None:
    """An endless iterator is read only as far ahead as the running jobs and the unread results allow."""
    taken, most, together = 0, 0, asyncio.Event()

    async def endless() -> AsyncIterator[dict[str, Any]]:
        nonlocal taken
        for body in numbered():
            taken += 1
            yield body

    async def watched(session: Session) -> None:
        nonlocal most
        most = max(most, market.running)
        if market.running > 1:
            together.set()
        await together.wait()
        await echo(session)

    fake.script = watched
    async with contextlib.aclosing(market.map(endless(), concurrency=3, ordered=ordered)) as run:
        for _ in range(5):
            await anext(run)
        await eventually(lambda: taken == 5 + 2 * 3 and market.running == 0)  # results are no longer read
        await asyncio.sleep(0.05)
        assert taken == 5 + 2 * 3
    assert 1 < most <= 3


async def test_one_failure_loses_nothing(market: Market, fake: FakeMarket) -> None:
    """A permanent failure becomes a BatchResult with its error, a temporary one is retried, and the other requests go on."""
    attempts: dict[int, int] = {}

    async def fickle(session: Session) -> None:
        await session.match()
        at = number(session)
        attempts[at] = attempts.get(at, 0) + 1
        if at == 1:
            await session.fail(Refusal(Code.BAD_MESSAGE, "never"))
        elif at == 2 and attempts[at] < 3:
            await session.void()
            await session.fail(Unavailable(Code.NODE_GONE, "later", fault=Fault.PROVIDER))
        elif at == 3:
            await session.void()
            await session.fail(Unavailable(Code.NODE_GONE, "not today", fault=Fault.PROVIDER))
        else:
            await say(session)

    fake.script = fickle
    results = [result async for result in market.map(numbered(6), concurrency=2, retries=2)]
    assert [result.error is None for result in results] == [True, False, True, False, True, True]
    assert [result.attempts for result in results] == [1, 1, 3, 3, 1, 1]
    with pytest.raises(Refusal, match="never"):
        results[1].unwrap()
    assert results[3].error is not None
    assert results[3].error.retry
    assert "never" not in repr(results[0])


async def test_requests_that_are_none_lose_nothing(market: Market, fake: FakeMarket) -> None:
    """A request of another type, and a model that is no text, are errors of their own; the other requests go on."""
    fake.script = say_when_matched
    requests: list[Any] = [*numbered(1), 5, BODY | {"model": "\ud800"}, BODY | {"stop": {1}}, *numbered(1)]
    results = [result async for result in market.map(requests)]
    assert [type(result.error) for result in results] == [type(None), BadMessage, BadMessage, BadMessage, type(None)]


async def test_a_request_that_may_be_billed_is_not_retried(market: Market, fake: FakeMarket) -> None:
    """A provider that vanishes without a receipt costs one cap a request, however many retries are allowed."""

    async def vanishes(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.NODE_GONE, "gone", fault=Fault.PROVIDER))

    fake.script = vanishes
    results = [result async for result in market.map(numbered(2), retries=5)]
    assert [(result.attempts, result.error is None) for result in results] == [(1, False)] * 2
    assert len(fake.submissions) == 2


async def test_an_error_answer_is_an_error(market: Market, fake: FakeMarket) -> None:
    """An engine's own 400 is a Refusal, not a result."""

    async def wrong(session: Session) -> None:
        await session.match()
        await session.answer(400)
        await session.chunk(b'{"error": {"message": "no such thing"}}', last=True)
        await session.finish()

    fake.script = wrong
    (results,) = [result async for result in market.map([BODY])]
    assert isinstance(results.error, Refusal)
    assert "no such thing" in str(results.error)


@pytest.mark.parametrize("ordered", [True, False])
async def test_leaving_early_cancels(market: Market, fake: FakeMarket, ordered: bool) -> None:
    """Leaving the loop cancels running jobs, also at their providers."""

    async def first_only(session: Session) -> None:
        await session.match()
        if number(session) == 0:
            await say(session)
            return
        await session.answer()
        await session.cancelled.wait()
        await session.chunk(b"", last=True)
        await session.finish(Usage(8, 0, 0), Outcome.CLIENT_CANCELLED)

    fake.script = first_only
    async with contextlib.aclosing(market.map(numbered(), concurrency=3, ordered=ordered)) as run:
        assert (await anext(run)).index == 0
        await eventually(lambda: market.running == 3)
    assert market.running == 0
    assert len(fake.cancels) == 3


async def test_cancelling_the_task_cancels_the_jobs(market: Market, fake: FakeMarket) -> None:
    """Cancelling the task that reads the results cancels running jobs."""
    fake.script = until_cancelled

    async def take() -> list[BatchResult]:
        return [result async for result in market.map(numbered(), concurrency=2)]

    task = asyncio.create_task(take())
    await eventually(lambda: market.running == 2)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert market.running == 0
    assert len(fake.cancels) == 2


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_broken_iterator(market: Market, ordered: bool) -> None:
    """The error of a broken iterator is raised after all earlier requests have ended."""

    def breaks() -> Iterator[dict[str, Any]]:
        yield from numbered(3)
        raise ZeroDivisionError

    results: list[BatchResult] = []

    async def take() -> None:
        async for result in market.map(breaks(), ordered=ordered):
            results.append(result)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(ZeroDivisionError):
        await take()
    assert sorted(result.index for result in results) == [0, 1, 2]
    assert all(result.error is None for result in results)


async def test_a_market_that_closes_ends_the_run(market: Market, fake: FakeMarket) -> None:
    """When the market closes, running jobs end with errors, nothing is retried, and no further request is read."""
    fake.script = until_cancelled
    run = market.map(numbered(), concurrency=2)
    first = asyncio.create_task(anext(run))
    await eventually(lambda: market.running == 2)
    await market.drain(0)
    results = [await first, *[result async for result in run]]
    assert all(result.error is not None and result.attempts == 1 for result in results)
    assert len(results) <= 4


async def test_options_reach_every_job(market: Market, fake: FakeMarket) -> None:
    """Route and options reach `submit`; impossible numbers are refused at once."""
    bob = fake.providers[1].address
    body = {"model": MODEL, "input": "x"}
    results = [result async for result in market.map([body, body], path="/v1/embeddings", pin=[bob])]
    assert [result.unwrap().provider for result in results] == [bob, bob]
    with pytest.raises(BadMessage, match="concurrency"):
        market.map([], concurrency=0)
    with pytest.raises(BadMessage, match="retries"):
        market.map([], retries=-1)
    assert [result async for result in market.map([], path=CHAT)] == []
