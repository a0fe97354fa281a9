"""A client of a coordinator with replicas: which one it uses, and what becomes of its jobs when one is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from tallystick.cli.local.processes import free_port
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator import replica_watch, transport
from tallystick.client.gateway.operations import Operations
from tallystick.client.jobs.job import run_of
from tallystick.client.jobs.result import StreamInterrupted
from tallystick.client.jobs.running_job import MAX_MOVES
from tallystick.client.recovery import reconciler
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.health import Health
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.replicas import replica_order
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind
from tests.client.fake_coordinator import (
    BODY,
    CHAT,
    EVENTS,
    STREAM,
    WORDS,
    FakeMarket,
    Script,
    Session,
    completion,
    event,
    eventually,
    honest,
    run,
)
from tests.client.parties import signer

ANSWER = completion("".join(WORDS))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short intervals between queries, and replicas that are slow but not lost."""
    monkeypatch.setattr(transport, "REPLICA_CONNECT_SECONDS", 60.0)
    monkeypatch.setattr(reconciler, "POLLS", (0.01, 0.05))
    monkeypatch.setattr(reconciler, "REPLICA_POLLS", (0.02,) * 3_000)


class Replicas:
    """The replicas of one coordinator, in the order in which the wallet uses them. They share what a database would hold."""

    def __init__(self, served: list[FakeMarket], wallet: Signer) -> None:
        urls = [market.url for market in served]
        order = replica_order(wallet.address, urls)
        self.served = sorted(served, key=lambda market: order.index(market.url))
        first = served[0]
        for market in served:
            market.sessions, market.providers, market.submissions = first.sessions, first.providers, first.submissions
        self.list(*served)

    def list(self, *listed: FakeMarket) -> None:
        """Changes the list that all of them give."""
        entries = [{"id": str(i), "url": market.url} for i, market in enumerate(listed)]
        for market in self.served:
            market.info["replicas"] = entries

    async def kill_first(self) -> None:
        """Kills the replica that the wallet uses; the others notice."""
        self.list(*self.served[1:])
        await self.served[0].kill()

    def hang_first(self) -> None:
        """Lets the replica that the wallet uses answer nothing any more, as a stopped process; the others notice."""
        self.list(*self.served[1:])
        self.served[0].hangs = True

    def script(self, script: Script) -> None:
        """Plays a script at the first replica, and an honest one at the others."""
        self.served[0].script = script


@pytest.fixture
async def replicas(wallet: Signer) -> AsyncIterator[Replicas]:
    """Three replicas that serve."""
    async with AsyncExitStack() as stack:
        yield Replicas([await stack.enter_async_context(FakeMarket().serve()) for _ in range(3)], wallet)


@asynccontextmanager
async def client(replicas: Replicas, wallet: Signer, config: ClientConfig, seed: int = 2) -> AsyncIterator[Market]:
    """A client whose config names the replica that it likes least."""
    async with Market(replicas.served[seed].url, wallet, config) as market:
        yield market


async def test_a_payers_requests_go_to_one_replica(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """The configured URL gives the list; everything else goes to the replica that is first for the payer."""
    async with client(replicas, wallet, config) as market:
        for _ in range(2):
            assert await run(market) == ANSWER
    assert replicas.served[2].requests == ["/v1/info"]
    assert not replicas.served[1].requests
    assert replicas.served[0].requests[0] == "/v1/info"
    assert replicas.served[0].requests.count("/v1/jobs") == 2


async def test_a_replica_that_is_gone_before_the_job(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """The next one serves; when the first one is back and listed, it is used again."""
    async with client(replicas, wallet, config) as market:
        assert await run(market) == ANSWER
        await replicas.kill_first()
        assert await run(market) == ANSWER
        assert replicas.served[1].requests.count("/v1/jobs") == 1
        assert await run(market) == ANSWER


async def test_a_replica_that_stops(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A replica that refuses because it stops has no job: the same submission goes to the next one."""
    async with client(replicas, wallet, config) as market:
        await run(market)
        replicas.served[0].refusals.append(Unavailable(Code.COORDINATOR_UNAVAILABLE, "this coordinator is stopping"))
        assert await run(market) == ANSWER
        assert len({submission.job for submission in replicas.served[0].submissions}) == 2
        assert (await market.tab(replicas.served[0].providers[0].address)).open_caps == 0


class _Late(list[TallyError]):
    """Refusals of a replica that hung until the orders had expired: each takes as long as the clock then shows."""

    def __init__(self, late_ns: int) -> None:
        super().__init__([Refusal(Code.ORDER_EXPIRED, "order.deadline: passed 0 s ago")])
        self.late_ns, self.passed_ns = late_ns, 0

    def pop(self, *index: Any) -> TallyError:
        self.passed_ns += self.late_ns
        return super().pop(*index)


@pytest.mark.parametrize("hung", [True, False])
async def test_orders_that_expired_on_their_way(replicas: Replicas, wallet: Signer, config: ClientConfig, hung: bool) -> None:
    """A replica that hung for so long had no job, so the request is submitted anew; a wrong clock is told to the caller."""
    late = _Late(3_600_000_000_000 if hung else 0)
    async with Market(replicas.served[2].url, wallet, config, clock=lambda: time.time_ns() + late.passed_ns) as market:
        await run(market)
        replicas.served[0].refusals = late
        if hung:
            assert await run(market) == ANSWER
        else:
            with pytest.raises(Refusal, match="passed 0 s ago"):
                await run(market)
    assert not replicas.served[1].requests


async def test_other_refusals_are_final(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A refusal that is not about the replica goes to the caller and to no other replica."""
    async with client(replicas, wallet, config) as market:
        await run(market)
        replicas.served[0].refusals.append(Refusal(Code.ORDER_TERMS, "no"))
        with pytest.raises(Refusal, match="no"):
            await run(market)
    assert not replicas.served[1].requests


# Lost in the middle of a job


async def before_match(session: Session) -> None:
    """The job waits in the queue."""
    await session.send(0x05)  # type: ignore[arg-type]
    await session.hang()


async def after_dispatch(session: Session) -> None:
    """A provider has the job and has sent nothing. It signs a receipt at no cost when the replica is gone."""
    await session.match()
    try:
        await session.hang()
    finally:
        session.release(Outcome.PROVIDER_ERROR)


async def after_dispatch_running(session: Session) -> None:
    """The same, where the database says for long that the job runs."""
    session.survives = True
    session.state = State.STREAMING
    await after_dispatch(session)


async def after_dispatch_void(session: Session) -> None:
    """The same, where the receipt at no cost is known before the client asks."""
    await session.match()
    try:
        await session.hang()
    finally:
        session.bill(Usage(10, 0, 0), Outcome.PROVIDER_ERROR)


@pytest.mark.parametrize("script", [before_match, after_dispatch, after_dispatch_running, after_dispatch_void])
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "streamed"])
async def test_a_replica_lost_before_the_answer(
    replicas: Replicas, wallet: Signer, config: ClientConfig, script: Script, body: dict[str, Any]
) -> None:
    """The request is submitted anew to the next replica by itself: the caller sees one answer, and one job is paid."""
    replicas.script(script)
    async with client(replicas, wallet, config) as market:
        async with await market.submit(CHAT, body) as job:
            lost = job.id
            reading = asyncio.create_task(job.result())
            await eventually(lambda: script is before_match or replicas.served[0].last.attempts == 1)
            await replicas.kill_first()
            result = await reading
            assert b"tally" in result.body
            assert job.id == result.job != lost
        assert market.running == 0
        assert [submission.job for submission in replicas.served[0].submissions] == [lost, job.id]
        assert lost in replicas.served[1].cancels
        tab = await market.tab(replicas.served[0].providers[0].address)
        assert (tab.accepted, tab.open_caps) == (3, 0)


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short time in which a replica must show that it lives."""
    monkeypatch.setattr(replica_watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(replica_watch, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(transport, "HEALTH_SECONDS", 0.5)


@pytest.mark.usefixtures("quick_watch")
@pytest.mark.parametrize("hanging", [1, 2])
async def test_a_replica_that_hangs_with_a_job(replicas: Replicas, wallet: Signer, config: ClientConfig, hanging: int) -> None:
    """Its connections stay open. A job that waits for a provider moves on once the replica is silent and no longer listed, as any
    of the others says that answers.
    """
    replicas.script(before_match)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        first, reading = job.id, asyncio.create_task(job.result())
        await eventually(lambda: bool(replicas.served[0].sessions))
        replicas.served[0].sessions.clear()
        replicas.hang_first()
        replicas.served[1].hangs = hanging == 2
        replicas.list(*replicas.served[hanging:])
        assert (await reading).body == ANSWER
        assert job.id == first
        tab = await market.tab(replicas.served[0].providers[0].address)
        assert (tab.accepted, tab.open_caps) == (3, 0)
    assert replicas.served[hanging].requests.count("/v1/jobs") == 1


@pytest.mark.usefixtures("quick_watch")
@pytest.mark.parametrize("path", ["shortlist", "jobs"])
async def test_a_replica_that_hangs_with_a_request(replicas: Replicas, wallet: Signer, config: ClientConfig, path: str) -> None:
    """The request goes to the next one. A job that may have arrived is asked for there first."""
    remembered = {"shortlist": 0.0, "jobs": 60.0}[path]
    async with client(replicas, wallet, replace(config, shortlist_seconds=remembered)) as market:
        await run(market)
        replicas.hang_first()
        before = len(replicas.served[1].requests)
        assert await run(market) == ANSWER
        assert replicas.served[1].requests[before:].count("/v1/jobs") == 1
        assert await run(market) == ANSWER, "later requests do not wait for it"


@pytest.mark.usefixtures("quick_watch")
@pytest.mark.parametrize("state", ["busy", "stopping", "matched"])
async def test_a_replica_that_may_go_on_is_waited_for(
    replicas: Replicas, wallet: Signer, config: ClientConfig, state: str
) -> None:
    """It is busy, if the others still list it, or about to stop, if it still answers. One that hangs with a job that a provider
    has may be back before the answer is lost, which will be paid for.
    """
    goes_on = asyncio.Event()

    async def slow(session: Session) -> None:
        await session.send(Kind.BEAT)
        if state == "matched":
            await session.match()
            await session.answer()
        await goes_on.wait()
        if state == "matched":
            await session.chunk(ANSWER, last=True)
            await session.finish()
        else:
            await honest(session)

    replicas.script(slow)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        reading = asyncio.create_task(job.result())
        await eventually(lambda: bool(replicas.served[0].sessions))
        replicas.served[0].hangs = state != "stopping"
        if state != "busy":
            replicas.list(*replicas.served[1:])
        await asyncio.sleep(1.0)
        goes_on.set()
        assert (await reading).body == ANSWER
    assert len(replicas.served[0].submissions) == 1


@pytest.mark.parametrize("words", [1, 30])
async def test_a_whole_answer_of_which_a_part_came(replicas: Replicas, wallet: Signer, config: ClientConfig, words: int) -> None:
    """Its caller has seen nothing of it yet, so the request is submitted anew, and the answer is the second one alone."""

    async def breaks_off(session: Session) -> None:
        await session.match()
        await session.answer()
        for _ in range(words):
            await session.chunk(b"lost ")
        try:
            await session.hang()
        finally:
            session.release(Outcome.PROVIDER_ERROR)

    replicas.script(breaks_off)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        reading = asyncio.create_task(job.result())
        await eventually(lambda: job.head is not None)
        await replicas.kill_first()
        result = await reading
        assert (result.body, result.job) == (ANSWER, job.id)
        assert len(replicas.served[0].submissions) == 2
        tab = await market.tab(replicas.served[0].providers[0].address)
        assert (tab.accepted, tab.open_caps) == (3, 0)


async def test_a_part_that_its_reader_has_is_not_replaced(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """Not even if the rest is read as a whole."""

    async def breaks_off(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(b"seen ")
        try:
            await session.hang()
        finally:
            session.release(Outcome.PROVIDER_ERROR)

    replicas.script(breaks_off)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        assert await anext(aiter(job)) == b"seen "
        reading = asyncio.create_task(job.result())
        await replicas.kill_first()
        with pytest.raises(StreamInterrupted) as caught:
            await reading
        assert caught.value.retry
    assert len(replicas.served[0].submissions) == 1


async def test_a_job_that_waits_goes_to_the_next_replica(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A job that no provider had is in no database. The next replica gets the same job: the same id, and the same orders."""
    replicas.script(before_match)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        first, reading = job.id, asyncio.create_task(job.result())
        await eventually(lambda: bool(replicas.served[0].sessions))
        replicas.served[0].sessions.clear()
        await replicas.kill_first()
        assert (await reading).body == ANSWER
        assert job.id == first
        submitted = replicas.served[0].submissions
        assert [submission.job for submission in submitted] == [first, first]
        assert submitted[0].candidates == submitted[1].candidates
        tab = await market.tab(replicas.served[0].providers[0].address)
        assert (tab.accepted, tab.open_caps) == (3, 0)


async def test_replicas_that_are_lost_one_after_the_other(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """The request moves on each time."""
    for served in replicas.served[:2]:
        served.script = before_match
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        reading = asyncio.create_task(job.result())
        await replicas.kill_first()
        await eventually(lambda: len(replicas.served[1].submissions) == 2)
        await replicas.served[1].kill()
        assert (await reading).body == ANSWER


async def test_a_request_is_submitted_anew_a_few_times(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """After that the loss is the caller's to know, who may send the request again."""

    async def breaks_off(session: Session) -> None:
        await session.match()
        session.release(Outcome.PROVIDER_ERROR)
        await session.cut()

    for served in replicas.served:
        served.script = breaks_off
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        with pytest.raises(StreamInterrupted) as caught:
            await job.result()
        assert caught.value.retry
    assert len(replicas.served[0].submissions) == 1 + MAX_MOVES


# Lost in the middle of a job with an idempotency key


def _jobs(replicas: Replicas) -> list[JobId]:
    """The jobs that were posted, each once."""
    return list(dict.fromkeys(submission.job for submission in replicas.served[0].submissions))


async def _until_dispatched(replicas: Replicas) -> None:
    await eventually(lambda: bool(replicas.served[0].sessions and replicas.served[0].last.attempts))


@pytest.mark.parametrize("script", [after_dispatch, after_dispatch_void])
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "streamed"])
async def test_a_keyed_job_lost_before_the_answer(
    replicas: Replicas, wallet: Signer, config: ClientConfig, script: Script, body: dict[str, Any]
) -> None:
    """It is submitted anew as any other, once the lost one can cost nothing. Its key is then the new job's."""
    replicas.script(script)
    async with client(replicas, wallet, config) as market:
        async with await market.submit(CHAT, body, key="one") as job:
            lost, reading = job.id, asyncio.create_task(job.result())
            await _until_dispatched(replicas)
            await replicas.kill_first()
            assert b"tally" in (await reading).body
            assert _jobs(replicas) == [lost, job.id]
        assert market.running == 0
        assert lost not in replicas.served[1].cancels  # another process may read it
        tab = await market.tab(replicas.served[0].providers[0].address)
        assert (tab.accepted, tab.open_caps) == (3, 0)
        with pytest.raises(Refusal, match="ended as completed"):  # the fake keeps no answers
            await market.submit(CHAT, body, key="one")
        assert len(_jobs(replicas)) == 2


async def test_processes_that_share_the_key_of_a_lost_job(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """Of several that all find that it costs nothing, one buys the answer; the others look for that one's job."""
    replicas.script(after_dispatch)
    async with AsyncExitStack() as stack:
        markets = [await stack.enter_async_context(client(replicas, wallet, config)) for _ in range(3)]
        job = await markets[0].submit(CHAT, BODY, key="one")
        await _until_dispatched(replicas)
        await replicas.kill_first()

        async def again(market: Market) -> bytes:
            async with await market.submit(CHAT, BODY, key="one") as job:
                return (await job.result()).body

        answers = await asyncio.gather(job.result(), *map(again, markets[1:]), return_exceptions=True)
        assert any(ANSWER in (answer, getattr(answer, "body", None)) for answer in answers)
        assert len(_jobs(replicas)) == 2
        for answer in answers:  # the fake keeps no answers for the others
            assert not isinstance(answer, BaseException) or "ended as completed" in str(answer) or "running" in str(answer)
        tab = await markets[0].tab(replicas.served[0].providers[0].address)
        assert (tab.accepted, tab.open_caps) == (3, 0)


async def test_a_keyed_job_whose_client_was_gone(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A later process that sends the request again gets an answer, without an error in between."""
    replicas.script(after_dispatch)
    async with client(replicas, wallet, config) as market:
        job = await market.submit(CHAT, BODY, key="one")
        job.runs_on = lambda: True
        async with job:
            await _until_dispatched(replicas)
    await replicas.kill_first()
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY, key="one") as job:
        assert (await job.result()).body == ANSWER
    assert len(_jobs(replicas)) == 2


async def test_a_keyed_job_whose_connection_alone_was_lost(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """The job goes on. Its reader asks for it again, and gets the answer once, from its beginning."""

    async def cut_once(session: Session) -> None:
        tab = replicas.served[0].providers[0].tab
        await session.match()
        await session.answer()
        await session.chunk(ANSWER[:5])
        replicas.served[0].script = honest
        del replicas.served[0].sessions[session.job]  # so that the fake takes the job up again, as a real one resumes it
        replicas.served[0].providers[0].tab = tab
        await session.cut()

    replicas.script(cut_once)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY, key="one") as job:
        first = job.id
        assert (await job.result()).body == ANSWER
        assert (job.id, _jobs(replicas)) == (first, [first])


@pytest.mark.parametrize("billed", [True, False])
async def test_a_lost_keyed_job_that_costs_something(
    replicas: Replicas, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch, billed: bool
) -> None:
    """While a provider may bill it, or once it did, its key buys no other job, however often it is used."""
    monkeypatch.setattr(reconciler, "REPLICA_POLLS", (0.01,) * 5)

    async def script(session: Session) -> None:
        session.survives = not billed
        session.state = State.STREAMING
        await session.match()
        try:
            await session.hang()
        finally:
            if billed:
                session.bill(Usage(10, 0, 5), Outcome.CLIENT_CANCELLED)

    replicas.script(script)
    async with client(replicas, wallet, config) as market:
        async with await market.submit(CHAT, BODY, key="one") as job:
            reading = asyncio.create_task(job.result())
            await _until_dispatched(replicas)
            await replicas.kill_first()
            with pytest.raises(TallyError):
                await reading
        for _ in range(2):
            with pytest.raises(TallyError, match="were billed" if billed else "send the request again later"):
                await market.submit(CHAT, BODY, key="one")
    assert len(_jobs(replicas)) == 1


async def test_a_key_whose_slots_were_given_away_twice(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """It is submitted anew as a request without a key is."""
    scripts = [refuses_as_busy, honest]

    async def script(session: Session) -> None:
        await scripts.pop(0)(session)

    replicas.script(script)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY, key="one") as job:
        assert (await job.result()).body == ANSWER
    assert len(_jobs(replicas)) == 2


# Slots that two replicas gave away at once


async def refuses_as_busy(session: Session) -> None:
    """Each provider's slot was taken by a job of another replica; each signs a receipt at no cost."""
    for index in range(len(session.submission.candidates)):
        await session.match(index)
        await session.void()
    await session.fail(Unavailable(Code.NODE_BUSY, "all slots are taken", fault=Fault.PROVIDER))


async def test_slots_that_were_given_away_twice(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A job that all its providers refused as busy is submitted anew, and waits for a slot; the caller sees one answer."""
    scripts = [refuses_as_busy, honest]

    async def script(session: Session) -> None:
        await scripts.pop(0)(session)

    replicas.script(script)
    async with client(replicas, wallet, config) as market:
        assert await run(market) == ANSWER
        assert len(replicas.served[0].submissions) == 2
        assert replicas.served[0].submissions[1].wait
        tab = await market.tab(replicas.served[0].providers[0].address)
        assert (tab.accepted, tab.open_caps) == (3, 0)


async def test_a_wait_that_ended_without_a_slot(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """The end of the wait is the caller's to know: the job was offered to nobody."""

    async def waits_in_vain(session: Session) -> None:
        await session.fail(Unavailable(Code.NODE_BUSY, "no slot became free", fault=Fault.PROVIDER))

    replicas.script(waits_in_vain)
    async with client(replicas, wallet, config) as market:
        with pytest.raises(Unavailable, match="no slot became free"):
            await run(market)
    assert len(replicas.served[0].submissions) == 1


async def test_busy_providers_without_their_receipts(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """While an order may still be billed, the request is not submitted anew."""

    async def keeps_receipts(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.NODE_BUSY, "all slots are taken", fault=Fault.PROVIDER))

    replicas.script(keeps_receipts)
    async with client(replicas, wallet, config) as market:
        with pytest.raises(Unavailable, match="all slots are taken"):
            await run(market)
    assert len(replicas.served[0].submissions) == 1


async def test_a_lone_coordinator_knows_its_slots(market: Market, fake: FakeMarket) -> None:
    """Without replicas, a job that was refused as busy fails."""
    fake.script = refuses_as_busy
    with pytest.raises(Unavailable, match="all slots are taken"):
        await run(market)
    assert len(fake.submissions) == 1


async def test_a_job_that_may_still_cost_something(
    replicas: Replicas, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a provider may still bill the lost job, no second job is bought; the caller is told not to retry."""
    monkeypatch.setattr(reconciler, "REPLICA_POLLS", (0.01,) * 5)

    async def bills_later(session: Session) -> None:
        session.survives = True
        session.state = State.STREAMING
        await session.match()
        await session.hang()

    replicas.script(bills_later)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        reading = asyncio.create_task(job.result())
        await eventually(lambda: bool(replicas.served[0].sessions and replicas.served[0].last.attempts))
        await replicas.kill_first()
        with pytest.raises(StreamInterrupted) as caught:
            await reading
        assert not caught.value.retry
    assert len(replicas.served[0].submissions) == 1


async def test_a_lost_job_that_was_billed(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A job whose provider charges for it is not bought a second time."""

    async def bills(session: Session) -> None:
        await session.match()
        try:
            await session.hang()
        finally:
            session.bill(Usage(10, 0, 5), Outcome.CLIENT_CANCELLED)

    replicas.script(bills)
    async with client(replicas, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        reading = asyncio.create_task(job.result())
        await eventually(lambda: bool(replicas.served[0].sessions and replicas.served[0].last.attempts))
        await replicas.kill_first()
        with pytest.raises(TallyError):
            await reading
    assert len(replicas.served[0].submissions) == 1


async def test_a_replica_lost_after_the_first_chunk(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """What was streamed cannot be taken back: the caller learns at once what had come, and that it may send the request again."""

    async def streams(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("A "))
        try:
            await session.hang()
        finally:
            session.release(Outcome.PROVIDER_ERROR)

    replicas.script(streams)
    async with client(replicas, wallet, config) as market:
        async with await market.submit(CHAT, STREAM) as job:
            pieces = aiter(job)
            assert b"A " in await anext(pieces)
            await replicas.kill_first()
            with pytest.raises(StreamInterrupted) as caught:
                await anext(pieces)
            assert caught.value.retry
        assert len(replicas.served[0].submissions) == 1
        await eventually(lambda: _is_settled(market, replicas))
        assert (await market.tab(replicas.served[0].providers[0].address)).accepted == 0


async def _is_settled(market: Market, replicas: Replicas) -> bool:
    return (await market.tab(replicas.served[0].providers[0].address)).open_caps == 0


async def test_a_replica_lost_with_the_receipt(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A whole answer is a success; its receipt comes from another replica."""

    async def keeps_receipt(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(ANSWER, last=True)
        try:
            await session.hang()
        finally:
            session.bill()

    replicas.script(keeps_receipt)
    async with client(replicas, wallet, config) as market:
        async with await market.submit(CHAT, BODY) as job:
            reading = asyncio.create_task(job.result())
            await eventually(lambda: bool(replicas.served[0].sessions and replicas.served[0].last.output_bytes))
            await eventually(lambda: run_of(job).placed.response.complete)
            await replicas.kill_first()
            assert (await reading).body == ANSWER
        await eventually(lambda: _is_settled(market, replicas))
        assert (await market.tab(replicas.served[0].providers[0].address)).accepted == 3


async def test_a_submission_lost_after_it_was_admitted(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """If the next replica says that the job was admitted, its free end is awaited, and the request is submitted anew."""
    async with client(replicas, wallet, config) as market:
        await run(market)
        replicas.served[0].drops, replicas.served[0].keeps = 2, True
        assert await run(market) == ANSWER
        jobs = [submission.job for submission in replicas.served[0].submissions]
        assert len(set(jobs)) == 3
        assert (await market.tab(replicas.served[0].providers[0].address)).open_caps == 0


async def test_a_submission_lost_before_it_was_admitted(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """The same submission, with the same id, goes to the next replica."""
    async with client(replicas, wallet, config) as market:
        await run(market)
        replicas.served[0].drops = 2
        assert await run(market) == ANSWER
    assert len({submission.job for submission in replicas.served[0].submissions}) == 2


async def test_a_doubt_outlasts_another_replicas_refusal(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A replica that refuses a job without knowing whether another one has it does not make the job free."""
    async with client(replicas, wallet, config) as market:
        await run(market)
        replicas.served[0].drops = 2
        replicas.served[1].refusals.append(Unavailable(Code.RATE_LIMITED, "too many"))
        with pytest.raises(Unavailable) as caught:
            await run(market)
        assert (caught.value.code, caught.value.retry) == (Code.COORDINATOR_UNAVAILABLE, False)


async def test_cancelling_while_the_replica_is_lost(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A job that the caller gives up meanwhile is not submitted anew."""
    replicas.script(before_match)
    async with client(replicas, wallet, config) as market:
        job = await market.submit(CHAT, BODY)
        reading = asyncio.create_task(job.result())
        await asyncio.sleep(0)
        cancelling = asyncio.create_task(job.cancel())
        await replicas.kill_first()
        await asyncio.gather(reading, cancelling, return_exceptions=True)
        assert job.done
        assert market.running == 0
    assert len(replicas.served[0].submissions) == 1


# Which URLs are used


async def test_a_listed_url_of_another_coordinator(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """A listed replica that is another coordinator's gets neither jobs nor access tokens."""
    replicas.served[0].info = replicas.served[0].info | {"coordinator": signer("other").address}
    with capture_logs() as logs:
        async with client(replicas, wallet, config) as market:
            for _ in range(2):
                assert await run(market) == ANSWER
    assert replicas.served[0].requests == ["/v1/info"]
    assert any(entry["event"].startswith("a listed replica is another coordinator's") for entry in logs)


async def test_all_listed_replicas_are_gone(wallet: Signer, config: ClientConfig) -> None:
    """The configured URL, such as that of a load balancer, is the last resort."""
    async with FakeMarket().serve() as balancer, FakeMarket().serve() as listed:
        listed.sessions, listed.providers, listed.submissions = balancer.sessions, balancer.providers, balancer.submissions
        for served in (balancer, listed):
            served.info["replicas"] = [{"id": "a", "url": listed.url}]
        async with Market(balancer.url, wallet, config) as market:
            assert await run(market) == ANSWER
            assert "/v1/jobs" not in balancer.requests
            await listed.kill()
            assert await run(market) == ANSWER
            assert "/v1/jobs" in balancer.requests


async def test_a_gateway_is_well_without_the_configured_replica(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """The gateway's check of its coordinator passes while any replica answers."""
    async with client(replicas, wallet, config) as market:
        await run(market)
        assert market.coordinator_urls == tuple(served.url for served in replicas.served)
        await replicas.served[2].kill()
        checks = await Operations(market)._check_coordinator()
        assert checks["coordinator"].status is Health.PASS


async def test_several_configured_urls(wallet: Signer, config: ClientConfig) -> None:
    """A client starts with any of the configured URLs that answers."""
    async with FakeMarket().serve() as fake:
        settings = replace(config, coordinator_urls=(fake.url,))
        async with Market(f"http://127.0.0.1:{free_port(0)}", wallet, settings) as market:
            assert await run(market) == ANSWER


async def test_nobody_answers(wallet: Signer, config: ClientConfig) -> None:
    """The error names the URL that was tried last, and nothing is owed."""
    last = f"http://localhost:{free_port(0)}"
    settings = replace(config, coordinator_urls=(last,))
    async with Market(f"http://127.0.0.1:{free_port(0)}", wallet, settings) as market:
        with pytest.raises(Unavailable, match=f"no coordinator answers at {last}"):
            await run(market)


async def test_the_list_is_read_again(replicas: Replicas, wallet: Signer, config: ClientConfig) -> None:
    """After a while, with the next request, a client learns of new replicas."""
    replicas.list(replicas.served[2])
    async with client(replicas, wallet, config) as market:
        assert await run(market) == ANSWER
        assert not replicas.served[0].requests
        replicas.list(*replicas.served)
        market._coordinator.replicas.read_at = float("-inf")
        await market.models()
        await eventually(lambda: market._coordinator.replicas.urls[0] == replicas.served[0].url)
        assert await run(market) == ANSWER
    assert replicas.served[0].requests.count("/v1/jobs") == 1
