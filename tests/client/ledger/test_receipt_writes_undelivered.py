"""A receipt charges at most for what arrived, by whichever path it comes; charges that cannot be checked are remembered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI

from tallystick.client.config import ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.receipts.delivery_check import (
    IN_FLIGHT_TOKENS,
    OUTPUT_ALLOWANCE,
    QUARTERS_CUT_SHORT,
    QUARTERS_UNDELIVERED,
    Delivery,
    StreamEnd,
    UndeliveredCharge,
)
from tallystick.client.recovery import reconciler
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import ZERO_HASH, Hash
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import (
    BODY,
    CHAT,
    EVENTS,
    MESSAGES,
    STREAM,
    FakeMarket,
    Session,
    event,
    eventually,
    honest,
    run,
)
from tests.client.parties import ALICE, DOMAIN, MODEL, NOW_S, PAYER, Provider, bill, take

OTHER = Hash(b"\6" * 32)
SEEN = Delivery(200, 50, ZERO_HASH, finished=True)
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


def withholding_last_chunk(outcome: Outcome, words: int) -> Callable[[Session], Awaitable[None]]:
    """Sends a number of words without the end of the answer, and bills the whole answer."""

    async def script(session: Session) -> None:
        await session.match()
        if words:
            await session.answer(200, EVENTS)
        for _ in range(words):
            await session.chunk(event("word"))
        await session.finish(ALL, outcome, result_commitment=OTHER)

    return script


@pytest.mark.parametrize("words", [0, 1, 3])
@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.LENGTH, Outcome.CLIENT_CANCELLED])
async def test_no_answer_that_did_not_arrive_is_paid(market: Market, fake: FakeMarket, outcome: Outcome, words: int) -> None:
    """A receipt that charges without the last chunk is neither recorded nor retried, and its order counts in full. After
    three such answers the provider gets no more orders until it is unblocked.
    """
    fake.script, mallory = withholding_last_chunk(outcome, words), fake.providers[0].address
    for number in range(1, 4):
        with pytest.raises(UndeliveredCharge) as caught:
            await run(market, STREAM)
        assert (caught.value.retry, caught.value.fault) == (False, Fault.COORDINATOR)
        tab = await market.tab(mallory)
        assert (tab.accepted, tab.undelivered_quarters) == (0, number * QUARTERS_UNDELIVERED)
        assert tab.open_caps == sum(session.candidates[0].terms.max_cost for session in fake.submissions)
    assert "did not arrive" in tab.blocked_reason
    with pytest.raises(TallyError) as refused:
        await run(market, STREAM)
    assert (refused.value.code, len(fake.submissions)) == (Code.NO_PROVIDER, 3)
    assert await market.evidence() == []
    assert await market._ledger.unblock(mallory, market._now())
    fake.script = honest
    market._shortlists.forget()
    await run(market)
    tab = await market.tab(mallory)
    assert (tab.accepted, tab.undelivered_quarters, tab.blocked_reason) == (3, 0, "")


async def test_whole_answers_pay_back_a_quarter(market: Market, fake: FakeMarket) -> None:
    """Four whole answers offset one charged answer that did not arrive; there is no credit in advance."""
    mallory = fake.providers[0].address
    await run(market)
    fake.script = withholding_last_chunk(Outcome.COMPLETED, 1)
    with pytest.raises(UndeliveredCharge):
        await run(market, STREAM)
    fake.script = honest
    for left in (3, 2, 1, 0, 0):
        await run(market)
        assert (await market.tab(mallory)).undelivered_quarters == left


async def test_the_official_sdk_does_not_buy_again(market: Market, fake: FakeMarket) -> None:
    """One create() of OpenAI's own client, with its default retries, buys a charged but withheld answer only once."""
    for outcome in (Outcome.COMPLETED, Outcome.CLIENT_CANCELLED):
        fake.script = withholding_last_chunk(outcome, 0)
        async with serving(build_app(market), "127.0.0.1", 0) as port:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x")
            create: Any = client.chat.completions.create
            with pytest.raises(APIStatusError) as caught:
                await asyncio.to_thread(create, model=MODEL, messages=MESSAGES, max_tokens=100)
            client.close()
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(fake.submissions) == 2


async def test_a_whole_answer_that_claims_a_cancel_is_not_paid(market: Market, fake: FakeMarket) -> None:
    """An answer that claims to be cancelled, although this client did not cancel it, is not recorded."""

    async def cancels(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half"))
        await session.chunk(b"", last=True)
        await session.finish(Usage(8, 0, 3), Outcome.CLIENT_CANCELLED)

    fake.script = cancels
    with pytest.raises(UndeliveredCharge, match="did not cancel"):
        await run(market, STREAM)
    assert (await market.tab(fake.providers[0].address)).accepted == 0


async def test_a_cancel_at_no_cost_is_not_bought_again(market: Market, fake: FakeMarket) -> None:
    """A cancellation that this client did not request never suggests a retry, whatever it cost."""

    async def cancels(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(b"", last=True)
        await session.finish(Usage(0, 0, 0), Outcome.CLIENT_CANCELLED)

    fake.script = cancels
    with pytest.raises(Unavailable) as caught:
        await run(market, STREAM)
    assert not caught.value.retry
    assert (await market.tab(fake.providers[0].address)).open_caps == 0


async def test_a_cancelled_job_pays_what_arrived_and_no_more(market: Market, fake: FakeMarket) -> None:
    """If this client cancels and the last chunk never comes, at most the cost of the received bytes is recorded."""
    bills: list[Usage] = []

    async def cut(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("on and on "))
        await session.cancelled.wait()
        await session.finish(bills.pop(), Outcome.CLIENT_CANCELLED, result_commitment=OTHER)

    fake.script = cut
    arrived = len(event("on and on ")) + OUTPUT_ALLOWANCE
    for used, accepted in ((Usage(8, 0, arrived), True), (Usage(8, 0, arrived + 1), False)):
        bills.append(used)
        before = (await market.tab(fake.providers[0].address)).accepted
        async with await market.submit(CHAT, STREAM | {"max_tokens": 1_000}) as job:
            async for _ in job:
                break
        assert job.done
        assert ((await market.tab(fake.providers[0].address)).accepted > before) is accepted


async def test_cancelling_before_the_first_byte_pays_the_input(market: Market, fake: FakeMarket) -> None:
    """An attempt that is cancelled before its first byte ends with an empty last chunk; its receipt is recorded, and nobody
    is blamed.
    """

    async def waits(session: Session) -> None:
        await session.match()
        await session.cancelled.wait()
        await session.chunk(b"", last=True)
        await session.finish(Usage(20, 0, 0), Outcome.CLIENT_CANCELLED)

    fake.script = waits
    job = await market.submit(CHAT, STREAM)
    await job.cancel()
    tab = await market.tab(fake.providers[0].address)
    assert (tab.accepted, tab.open_caps, tab.undelivered_quarters, tab.blocked_reason) == (2, 0, 0, "")


async def cut_after_one_word(session: Session) -> None:
    """Cuts the stream after one word; the job continues."""
    await session.match()
    await session.answer(200, EVENTS)
    await session.chunk(event("word"))
    session.survives = True
    await session.cut()


@pytest.mark.parametrize(
    ("beyond", "booked", "quarters"),
    [
        (0, True, QUARTERS_CUT_SHORT),
        (1, True, QUARTERS_UNDELIVERED),
        (IN_FLIGHT_TOKENS, True, QUARTERS_UNDELIVERED),
        (IN_FLIGHT_TOKENS + 1, False, QUARTERS_UNDELIVERED),
    ],
)
async def test_a_lost_stream_pays_what_arrived_and_what_was_in_flight(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, *, beyond: int, booked: bool, quarters: int
) -> None:
    """A later receipt of a broken stream is checked against what had arrived, also by the next process. Charges for the
    undelivered part are remembered.
    """
    fake.script = cut_after_one_word
    dear = STREAM | {"max_tokens": 8_000}
    async with Market(fake.url, wallet, replace(config, cancel_seconds=0.05)) as market:
        with pytest.raises(Unavailable):
            await run(market, dear)
        job = fake.last.job
    fake.last.transcript.add(b"more, and the end")
    fake.last.bill(Usage(10, 0, len(event("word")) + OUTPUT_ALLOWANCE + beyond))
    async with Market(fake.url, wallet, config, clock=lambda: 2 * 10**18) as market:
        await market.info()

        async def ended() -> bool:
            known = await market.find(job)
            return known is not None and known.state not in (JobState.OPEN, JobState.LOST)

        await eventually(ended)
        row = (await market._ledger._database.read(_all_tabs))[fake.providers[0].address]
    assert row == (fake.providers[0].tab.cumulative if booked else 0, quarters)


def _all_tabs(c: object) -> dict[str, tuple[int, int]]:
    from tallystick.client.ledger.schema import tabs

    return {row.provider: (row.accepted, row.undelivered_quarters) for row in c.execute(tabs.select())}  # type: ignore[attr-defined]


async def test_a_keyed_answer_that_is_fetched_later_is_whole(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The charge for a keyed job's lost stream is recorded within its terms, and counts as undelivered until the answer is
    fetched.
    """
    ledger = await Ledger.open(config.ledger_path(wallet.address), PAYER.address)
    job, (placed,) = await take(ledger)
    arrived = Delivery(200, 0, OTHER, finished=False, cancelled=True, stream=StreamEnd.RESUMABLE)
    await ledger.store_deliveries(job, {placed.order.digest: arrived})
    receipt = ALICE.signer.sign(bill(placed, Usage(10, 0, 100)), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, None, NOW_S)) is None
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.accepted, tab.undelivered_quarters) == (receipt.message.cost, QUARTERS_UNDELIVERED)
    for _ in range(2):
        assert (
            await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, replace(SEEN, response_bytes=500), NOW_S))
            is None
        )
        assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).undelivered_quarters == 0
    await ledger.close()


async def test_charges_for_undelivered_answers_are_remembered(tmp_path: Path) -> None:
    """A receipt without its answer counts once, however often and by whichever process it is read; unblocking does not
    record it.
    """
    path = tmp_path / "a.db"
    ledger = await Ledger.open(path, PAYER.address)
    job, (placed,) = await take(ledger)
    receipt = ALICE.signer.sign(bill(placed, Usage(10, 0, 100), result_commitment=OTHER), DOMAIN)
    seen = Delivery(200, 0, ZERO_HASH, finished=False)
    for delivered in (seen, None, None):
        complaint = await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, delivered, NOW_S))
        assert isinstance(complaint, UndeliveredCharge)
        await ledger.close()
        ledger = await Ledger.open(path, PAYER.address)
    tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.accepted, tab.undelivered_quarters, tab.open_caps) == (0, QUARTERS_UNDELIVERED, placed.terms.max_cost)
    known = await ledger.find_job(job)
    assert known is not None
    assert (known.state, known.orders[0].state) == (JobState.FAILED, OrderState.DISPATCHED)
    job, (placed,) = await take(ledger)
    lie = ALICE.signer.sign(bill(placed, result_commitment=OTHER), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, lie, SEEN, NOW_S)) is not None
    assert await ledger.unblock(ALICE.address, NOW_S)
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).accepted == 0
    await ledger.close()


async def test_an_attempt_that_was_passed_over_bills_nothing(market: Market, fake: FakeMarket) -> None:
    """A provider whose attempt ended before any output and which charges afterwards is not paid, by whichever path the
    charge comes.
    """
    fake.providers.append(Provider.make("bob"))

    async def twice(session: Session) -> None:
        await session.match(0)
        late_receipt = session.release(Outcome.REFUSED)
        session.provider.tab = session.provider.tab._replace(seq=0)
        charged = session.bill(ALL, result_commitment=OTHER)
        assert late_receipt.message.order_hash == charged.message.order_hash
        session.tried[-1]["receipt"] = charged.to_json()
        session.receipt = None
        await session.match(1)
        await session.answer()
        await session.chunk(b"{}", last=True)
        await session.finish(Usage(3, 0, 1))

    fake.script = twice
    await run(market)
    job = fake.last.job
    assert (await market.tab(fake.providers[0].address)).open_caps > 0
    await market._reconciler.reconcile(job)
    tab = await market.tab(fake.providers[0].address)
    assert (tab.accepted, tab.undelivered_quarters) == (0, QUARTERS_UNDELIVERED)
    known = await market.find(job)
    assert known is not None
    assert known.state is JobState.COMPLETED


async def test_a_gateway_does_not_record_a_job_that_another_process_reads(config: ClientConfig, wallet: Signer) -> None:
    """While the process that reads a job is alive, no other process records its receipt: only the reader knows what arrived."""
    path = config.ledger_path(wallet.address)
    reader, other = await Ledger.open(path, wallet.address), await Ledger.open(path, wallet.address)
    job, _ = await take(reader)
    assert await reader.unresolved_jobs() == [job]
    assert await other.unresolved_jobs() == []
    await other.set_reader(job)
    assert (await reader.unresolved_jobs(), await other.unresolved_jobs()) == ([], [job])
    await other.close()
    assert await reader.unresolved_jobs() == [job]
    await reader.close()
    assert not list(path.parent.glob("*.alive"))


async def test_http_shape_of_an_undelivered_answer(market: Market, fake: FakeMarket) -> None:
    """The gateway answers 502 and says not to retry."""
    fake.script = withholding_last_chunk(Outcome.COMPLETED, 0)
    async with (
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        answer = await http.post(CHAT, json=BODY)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "false")
    assert answer.json()["error"]["code"] == "bad_receipt"
