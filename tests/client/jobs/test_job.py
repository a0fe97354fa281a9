from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.jobs.job import run_of
from tallystick.client.jobs.result import StreamInterrupted
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.sdk.market import Market
from tallystick.client.selection.options import read_options
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import (
    BadMessage,
    BadReceipt,
    BadSeal,
    BadSignature,
    Code,
    Fault,
    Refusal,
    TallyError,
    Unavailable,
)
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Amount, Hash
from tallystick.protocol.wire import Kind
from tests.client.fake_coordinator import (
    BODY,
    CHAT,
    EVENTS,
    MESSAGES,
    STREAM,
    FakeMarket,
    Session,
    completion,
    event,
    eventually,
    honest,
    run,
    until_cancelled,
)
from tests.client.parties import DOMAIN, MODEL, signer


async def test_a_waiting_job_tells_its_place(market: Market, fake: FakeMarket) -> None:
    """While a job waits for a slot its place is known; after the match it waits no more."""
    places: list[QueuePlace] = []

    async def queued(session: Session) -> None:
        for place in (QueuePlace(2), QueuePlace(1, 4_000)):
            await session.send(Kind.BEAT, place.dumps())
        await honest(session)

    fake.script = queued
    async with await market.submit(CHAT, BODY) as job:
        run_of(job).on_place = places.append
        assert (await job.start()).status == 200
        assert (places, job.place) == ([QueuePlace(2), QueuePlace(1, 4_000)], None)
        await job.result()


async def test_a_place_that_cannot_be_read(market: Market, fake: FakeMarket) -> None:
    """A malformed place is the coordinator's fault."""

    async def garbled(session: Session) -> None:
        await session.send(Kind.BEAT, b'{"position": -1}')
        await until_cancelled(session)

    fake.script = garbled
    with pytest.raises(BadMessage, match=r"place\.position") as caught:
        await market.chat(MODEL, MESSAGES)
    assert caught.value.fault is Fault.COORDINATOR


async def test_a_job_says_how_long_it_waits(market: Market, fake: FakeMarket) -> None:
    """A job waits as long as it was asked to, or as the config says; its orders can start until then."""
    waits: list[tuple[int | None, int]] = []

    async def noting(session: Session) -> None:
        order = session.submission.candidates[0].order.message
        waits.append((session.submission.wait, order.deadline - order.seq // 1_000_000_000))
        await honest(session)

    fake.script = noting
    start, default = market.config.start_seconds, market.config.wait_seconds
    for wait in (None, 0, 7):
        async with await market.submit(CHAT, BODY, wait=wait, exclude=[f"0x{len(waits):040x}"]) as job:
            await job.result()
    assert waits == [(default, start + default), (0, start), (7, start + 7)]
    async with await market.submit(CHAT, BODY, exclude=[f"0x{2:040x}"]) as job:
        await job.result()
    assert waits[-1] == (0, start), "a cached shortlist is not waited for"
    with pytest.raises(BadMessage, match="wait"):
        await market.submit(CHAT, BODY, wait=-1)


async def test_failover_restarts_the_answer(market: Market, fake: FakeMarket) -> None:
    """A second match before any output continues with the next provider; the first one's receipt at no cost releases its cap."""

    async def second(session: Session) -> None:
        await session.match(0)
        await session.void()
        await session.match(1)
        await session.answer()
        await session.chunk(completion("from bob"), last=True)
        await session.finish()

    fake.script = second
    result = await market.chat(MODEL, MESSAGES)
    alice, bob = fake.providers
    assert (result.text, result.provider) == ("from bob", bob.address)
    assert (await market.tab(alice.address)).open_caps == 0
    assert (await market.tab(bob.address)).accepted == 3


async def test_a_failure_has_the_engines_own_words(market: Market, fake: FakeMarket) -> None:
    """They come sealed for this client and become part of the message: printable and bounded. Garbage is left out."""
    reason: list[Any] = []

    async def failing(session: Session) -> None:
        await session.match()
        error = Unavailable(Code.ENGINE_UNAVAILABLE, "the engine answered with the status 500", fault=Fault.ENGINE)
        error.sealed_reason = reason[0](session)
        await session.fail(error)

    fake.script = failing
    for seal, shown in (
        (lambda session: session.key.seal_reason(session.order.digest, "CUDA\x1b died"), "the status 500: CUDA died"),
        (lambda session: session.key.seal_reason(session.order.digest, "x" * 5_000), "the status 500: " + "x" * 1_000),
        (lambda session: session.key.seal_reason(Hash(bytes(32)), "of another order"), "the status 500"),
        (lambda _: "garbage", "the status 500"),
    ):
        reason[:] = [seal]
        with pytest.raises(Unavailable) as caught:
            await run(market)
        assert str(caught.value) == f"the engine answered with {shown}"
        assert caught.value.as_json()["error"].keys() & {"sealed_reason", "private_reason", "opened_reason"} == set()
        known = await market.find(list(fake.sessions)[-1])
        assert known is not None
        assert known.reason == "the engine answered with the status 500", "it may quote the request, which the ledger never does"


async def test_fail_frame(market: Market, fake: FakeMarket) -> None:
    """A FAIL frame ends the job with its error, before and after output."""

    async def before(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.NODE_GONE, "gone", fault=Fault.PROVIDER))

    async def after(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half "))
        await session.fail(Unavailable(Code.TIMED_OUT, "too slow", fault=Fault.PROVIDER))

    fake.script = before
    with pytest.raises(Unavailable, match="gone") as caught:
        await run(market)
    assert (caught.value.code, caught.value.fault, caught.value.retry) == (Code.NODE_GONE, Fault.PROVIDER, True)
    fake.script = after
    async with await market.submit(CHAT, STREAM) as job:
        chunks = aiter(job)
        assert await anext(chunks) == event("half ")
        with pytest.raises(Unavailable, match="too slow"):
            await anext(chunks)
    known = await market.find(job.id)
    assert known is not None
    assert known.state is JobState.FAILED
    assert [order.state for order in known.orders] == [OrderState.DISPATCHED, OrderState.CLOSED]


async def test_engine_error_is_an_answer(market: Market, fake: FakeMarket) -> None:
    """A deterministic error of the engine passes through unchanged and is not charged; `chat` raises it with the engine's
    message.
    """

    async def rejects(session: Session) -> None:
        await session.match()
        await session.answer(400)
        await session.chunk(b'{"error": {"message": "bad temperature"}}', last=True)
        await session.finish(Usage(10, 0, 0), Outcome.UPSTREAM_ERROR)

    fake.script = rejects
    async with await market.submit(CHAT, BODY) as job:
        result = await job.result()
    assert (result.head.status, result.cost) == (400, 0)
    with pytest.raises(Refusal, match="bad temperature"):
        await market.chat(MODEL, MESSAGES)


async def test_broken_answer_costs_nothing(market: Market, fake: FakeMarket) -> None:
    """An answer that its provider broke off raises an error, and its receipt of zero is recorded."""

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half "))
        await session.chunk(b"", last=True)
        await session.finish(outcome=Outcome.PROVIDER_ERROR)

    fake.script = breaks
    with pytest.raises(Unavailable) as caught:
        await run(market, STREAM)
    assert (caught.value.code, caught.value.fault) == (Code.PROVIDER_FAILED, Fault.PROVIDER)
    assert (await market.tab(fake.providers[0].address)).accepted == 0


LIES: dict[str, dict[str, Any]] = {
    "cost": {"cost": Amount(4), "cumulative_cost": Amount(4)},
    "transcript": {"result_commitment": Hash(b"\7" * 32)},
    "total": {"cumulative_cost": Amount(10**9)},
    "seq": {"seq": 0},
}


@pytest.mark.parametrize("lie", [*LIES, "input", "output"])
async def test_dishonest_receipt_blocks_the_provider(market: Market, fake: FakeMarket, lie: str) -> None:
    """A receipt with a false cost, total, transcript or usage raises BadReceipt, is kept as evidence, and blocks its provider."""

    async def lies(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(completion("x"), last=True)
        usage = {"input": Usage(100_000, 0, 1), "output": Usage(1, 0, 900)}.get(lie)
        await session.finish(usage, **LIES.get(lie, {}))

    fake.script = lies
    with pytest.raises(BadReceipt) as caught:
        await run(market, BODY | {"max_tokens": 1_000})
    assert caught.value.fault is Fault.PROVIDER
    alice, bob = fake.providers
    (evidence,) = await market.evidence()
    assert (evidence.provider, evidence.reason) == (alice.address, str(caught.value))
    assert evidence.receipt.verify(DOMAIN).message.order_hash == evidence.order.verify(DOMAIN).digest
    assert (await market.tab(alice.address)).blocked_reason
    fake.script = honest
    assert (await market.chat(MODEL, MESSAGES)).provider == bob.address
    assert alice.address in fake.shortlists[-1]["exclude"]
    fake.providers = [alice]
    fake.asks = lambda: [{"ask": alice.ask.to_json(), "free": 1}]
    with pytest.raises(Unavailable):
        await market.submit(CHAT, BODY, max_output_price=10**9)


async def test_same_seq_twice_is_equivocation(market: Market, fake: FakeMarket) -> None:
    """Two different receipts with one seq are evidence against their provider."""

    async def repeats(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(completion("x"), last=True)
        await session.finish(seq=1, cumulative_cost=Amount(3))

    await run(market)
    fake.script = repeats
    with pytest.raises(BadReceipt, match="equivocation"):
        await run(market)
    assert len(await market.evidence()) == 1


async def test_receipt_of_another_order_blocks_no_provider(market: Market, fake: FakeMarket) -> None:
    """A genuine receipt that the coordinator attached to the wrong job is refused, and no provider is blocked for it."""

    async def swaps(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(completion("x"), last=True)
        await session.finish(order_hash=Hash(b"\5" * 32))

    fake.script = swaps
    with pytest.raises(BadReceipt) as caught:
        await run(market)
    assert caught.value.fault is Fault.COORDINATOR
    assert await market.evidence() == []
    assert (await market.tab(fake.providers[0].address)).blocked_reason == ""


async def _match_that_commits_to_another_order(session: Session) -> None:
    await session.match(commitment=Hash(bytes(32)))


async def _match_of_another_order(session: Session) -> None:
    await session.match(order_hash=Hash(b"\1" * 32))


async def _late_match(session: Session) -> None:
    await session.match()
    await session.answer()
    await session.match(1)


async def _same_match_again(session: Session) -> None:
    await session.match()
    await session.match()


async def _chunk_first(session: Session) -> None:
    session.take(0)
    await session.answer()


async def _receipt_first(session: Session) -> None:
    session.take(0)
    await session.finish()


async def _garbage(session: Session) -> None:
    await session.match()
    await session.response.write(b"\xff" * 40)


async def _huge_frame(session: Session) -> None:
    await session.response.write(b"\2\xff\xff\xff\xff")


async def _not_json(session: Session) -> None:
    await session.send(Kind.MATCH, b"{")


async def _node_frame(session: Session) -> None:
    await session.match()
    await session.send(Kind.ACCEPT)


async def _altered_chunk(session: Session) -> None:
    await session.match()
    await session.answer()
    sealed = session.sealer.seal(b"hello")
    await session.send(Kind.CHUNK, sealed[:-1] + bytes((sealed[-1] ^ 1,)))


async def _repeated_chunk(session: Session) -> None:
    await session.match()
    await session.answer()
    sealed = session.sealer.seal(b"hello")
    await session.send(Kind.CHUNK, sealed)
    await session.send(Kind.CHUNK, sealed)


async def _forged_receipt(session: Session) -> None:
    await session.match()
    await session.answer()
    await session.chunk(b"{}", last=True)
    receipt = session.bill()
    forged = replace(receipt, signature=signer("mallory").sign_digest(receipt.digest))
    session.receipt = None
    await session.send(Kind.RECEIPT, forged.to_bytes())


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (_match_that_commits_to_another_order, BadMessage),
        (_match_of_another_order, BadMessage),
        (_late_match, BadMessage),
        (_same_match_again, TallyError),
        (_chunk_first, BadMessage),
        (_receipt_first, BadMessage),
        (_garbage, BadMessage),
        (_huge_frame, BadMessage),
        (_not_json, BadMessage),
        (_node_frame, BadMessage),
        (_altered_chunk, BadSeal),
        (_repeated_chunk, BadSeal),
        (_forged_receipt, BadSignature),
    ],
)
async def test_broken_protocol_is_the_coordinators_fault(
    market: Market, fake: FakeMarket, script: object, error: type[TallyError]
) -> None:
    """Frames that are forged, garbled or out of order end the job with a typed error, and no provider is blamed."""

    async def play(session: Session) -> None:
        if script is _same_match_again:
            session.provider.tab = session.provider.tab._replace(in_flight=Amount(-(10**9)))
        await script(session)  # type: ignore[operator]
        await session.cancelled.wait()

    fake.script = play
    with pytest.raises(error) as caught:
        await run(market)
    assert caught.value.fault is Fault.COORDINATOR
    assert await market.evidence() == []
    fake.crash = None


async def test_truncated_stream_reports_what_arrived(market: Market, fake: FakeMarket) -> None:
    """A stream that ends without a receipt or a failure raises an error that says how much arrived, and ends a failed job."""

    async def ends(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half "))

    fake.script = ends
    async with await market.submit(CHAT, STREAM) as job:
        with pytest.raises(StreamInterrupted, match=rf"2 chunks with {len(event('half '))} bytes.*failed") as caught:
            await job.result()
    assert (caught.value.retry, caught.value.receipt) == (True, None)
    known = await market.find(job.id)
    assert known is not None
    assert known.state is JobState.FAILED


async def test_receipt_is_fetched_when_the_connection_breaks(market: Market, fake: FakeMarket) -> None:
    """If the connection breaks after the job was billed, the receipt is fetched and recorded, and no retry is suggested."""

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half "))
        session.transcript.add(b"data: [DONE]\n\n")  # the last chunk is lost
        session.bill()
        await session.cut()

    fake.script = breaks
    with pytest.raises(StreamInterrupted) as caught:
        await run(market, STREAM)
    assert caught.value.receipt is not None
    assert not caught.value.retry
    assert (await market.tab(fake.providers[0].address)).accepted == 3


async def test_silence_has_a_deadline(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A stream without any data, not even a heartbeat, counts as lost, and the job is cancelled."""

    async def silent(session: Session) -> None:
        await session.match()
        await session.cancelled.wait()

    fake.script = silent
    async with Market(fake.url, wallet, replace(config, stream_idle_seconds=0.1)) as market:
        with pytest.raises(Unavailable):
            await run(market)
    assert fake.cancels


async def test_cancel_returns_the_receipt(market: Market, fake: FakeMarket) -> None:
    """Cancelling stops the job, waits for the receipt of what was delivered, and records it."""
    fake.script = until_cancelled
    job = await market.submit(CHAT, STREAM)
    async for chunk in job:
        assert chunk == event("on and on ")
        break
    result = await job.cancel()
    assert result is not None
    assert (result.outcome, result.cost) == (Outcome.CLIENT_CANCELLED, 2)
    assert (await market.tab(fake.providers[0].address)).accepted == 2
    assert await job.cancel() is not None


async def test_leaving_a_job_cancels_it(market: Market, fake: FakeMarket) -> None:
    """Leaving a job before its end cancels it, and what was delivered is recorded."""
    fake.script = until_cancelled
    async with await market.submit(CHAT, STREAM) as job:
        await job.start()
    assert fake.cancels == [job.id]
    known = await market.find(job.id)
    assert known is not None
    assert (known.state, known.receipt is not None) == (JobState.CANCELLED, True)


async def test_cancel_is_bounded(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """If the receipt of a cancelled job does not come, cancelling still ends, and the orders keep counting."""

    async def deaf(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        session.survives = True
        await session.hang()

    fake.script = deaf
    async with Market(fake.url, wallet, replace(config, cancel_seconds=0.2)) as market:
        job = await market.submit(CHAT, STREAM)
        await job.start()
        assert await job.cancel() is None
        assert (await market.tab(fake.providers[0].address)).open_caps > 0
    assert job.done


async def test_cancelled_while_being_placed(market: Market, fake: FakeMarket) -> None:
    """A caller that is cancelled while the job is posted leaves no running job behind."""
    fake.script = until_cancelled
    task = asyncio.create_task(run(market, STREAM))
    await eventually(lambda: bool(fake.submissions))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: bool(fake.cancels))


async def test_answer_too_long_to_keep(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """An answer beyond the limit is not gathered in memory: the job is cancelled, and the error suggests streaming."""

    async def floods(session: Session) -> None:
        await session.match()
        await session.answer()
        while not session.cancelled.is_set():
            await session.chunk(b" " * 1_000)
            await asyncio.sleep(0.001)
        await session.chunk(b"", last=True)
        await session.finish(outcome=Outcome.CLIENT_CANCELLED)

    fake.script = floods
    async with Market(fake.url, wallet, replace(config, max_answer_bytes=5_000)) as market:
        with pytest.raises(Refusal) as caught:
            await run(market)
    assert caught.value.code is Code.BODY_TOO_LARGE


async def test_the_priority_of_a_job(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A job is interactive unless the request or the config says batch; another word is refused."""
    cases = (("interactive", None, False), ("interactive", "batch", True), ("batch", None, True), ("batch", "interactive", False))
    for configured, asked, batch in cases:
        async with Market(fake.url, wallet, replace(config, priority=configured)) as market:
            async with await market.submit(CHAT, BODY, priority=asked) as job:
                await job.result()
            assert fake.submissions[-1].batch is batch
            with pytest.raises(BadMessage, match="priority: expected one of interactive, batch, got 'urgent'"):
                await market.submit(CHAT, BODY, priority="urgent")
    with pytest.raises(BadMessage, match="config: priority"):
        replace(config, priority="")
    assert read_options('{"priority": "batch"}')[0] == {"priority": "batch"}
    with pytest.raises(BadMessage, match=r"x-tally-options\.priority"):
        read_options('{"priority": 1}')
