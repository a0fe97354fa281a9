"""Orders that were matched count until a receipt releases them or nobody can collect on them; whole answers are kept."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tallystick.client.config import Budget, ClientConfig
from tallystick.client.coordinator.info import RemoteJob
from tallystick.client.gateway.app import build_app
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.orders.tab import MAX_AWAITING_RECEIPTS
from tallystick.client.recovery import reconciler
from tallystick.client.recovery.reconciler import Reconciler
from tallystick.client.sdk.market import Market
from tallystick.client.selection.shortlist import OWING_SECONDS
from tallystick.protocol.eip712 import Signer, read_signed
from tallystick.protocol.errors import BadMessage, BadSignature, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount, Hash
from tallystick.protocol.wire import Failure, Kind, dumps
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import (
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
)
from tests.client.parties import ALICE, BOB, DOMAIN, MODEL, NOW_S, PAYER, SOME, Provider, bill, signer, take

BUSY = Unavailable(Code.NODE_BUSY, "busy", fault=Fault.PROVIDER)
NONE = Usage(0, 0, 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short intervals between queries."""
    monkeypatch.setattr(reconciler, "POLLS", (0.01, 0.05))


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


async def refuses(session: Session) -> None:
    """Every provider got the job, none did it, and none released its order."""
    for index in range(len(session.submission.candidates)):
        await session.match(index)
    await session.fail(BUSY)


async def test_no_budget_is_exceeded_by_jobs_that_failed(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The collectable caps of failed jobs, over all providers, stay within the day's budget; receipts make room."""
    fake.providers = [Provider.make(f"sybil{n}") for n in range(9)]
    fake.script = refuses
    bounded = replace(config, budgets=(Budget(per_day=Amount(250)),))
    async with Market(fake.url, wallet, bounded) as market:
        for turn in range(3):
            fake.asks = (
                lambda turn=turn: [  # type: ignore[misc]
                    {"ask": p.ask.to_json(), "free": 1} for p in fake.providers[3 * turn : 3 * turn + 3]
                ]
            )
            market._shortlists.forget()
            with pytest.raises(TallyError):
                await run(market)
        highest: dict[str, int] = {}
        for order in fake.orders():
            highest[order.provider] = max(highest.get(order.provider, 0), order.ceiling)
        assert sum(highest.values()) <= 250
        assert len(fake.submissions) == 1

        async def voids(session: Session) -> None:
            for index in range(len(session.submission.candidates)):
                await session.match(index)
                await session.void()
            await session.fail(BUSY)

        held = (await market._ledger.budget_status(bounded.budgets[0], market._now())).reserved
        job, session = fake.last.job, fake.last
        for attempt in session.tried:
            provider = next(p for p in fake.providers if p.address == attempt["provider"])
            session.provider = provider
            session.candidate = next(c for c in session.submission.candidates if c.order.message.provider == provider.address)
            session.order = session.candidate.order.verify(DOMAIN)
            attempt["receipt"] = session.release().to_json()
        await market._reconciler.reconcile(job)
        assert held > 0
        assert (await market._ledger.budget_status(bounded.budgets[0], market._now())).reserved == 0
        fake.script = voids
        for _ in range(3):
            with pytest.raises(Unavailable):
                await run(market)


async def test_a_failed_attempt_counts_beside_the_answer(market: Market, fake: FakeMarket) -> None:
    """If one provider took over another's job, the first one's order still counts after the job has ended."""

    async def second(session: Session) -> None:
        await session.match(0)
        await session.match(1)
        await session.answer()
        await session.chunk(completion("from bob"), last=True)
        await session.finish()

    fake.script = second
    result = await market.chat(MODEL, MESSAGES)
    alice, bob = fake.providers
    cap = fake.last.submission.candidates[0].terms.max_cost
    assert (await market.tab(alice.address)).open_caps == cap
    assert (await market.tab(bob.address)).open_caps == 0
    known = await market.find(result.job)
    assert known is not None
    assert [order.state for order in known.orders] == [OrderState.DISPATCHED, OrderState.RECORDED]
    order = known.orders[0].order.message
    assert (await market._ledger.tab(DOMAIN, alice.address, order.claim_by - 1)).open_caps == cap
    assert (await market._ledger.tab(DOMAIN, alice.address, order.claim_by)).open_caps == 0


async def test_the_receipt_in_a_failure_releases(market: Market, fake: FakeMarket) -> None:
    """A FAIL frame with the receipt at no cost releases the cap as VOID does; both together release it once."""

    async def fails(session: Session) -> None:
        await session.match()
        receipt = session.release(Outcome.TIMED_OUT)
        await session.send(Kind.VOID, receipt.to_bytes())
        await session.send(Kind.FAIL, Failure(BUSY, receipt).dumps())

    fake.script = fails
    with pytest.raises(Unavailable, match="busy"):
        await run(market)
    tab = await market.tab(fake.providers[0].address)
    assert (tab.open_caps, tab.awaiting_receipts, tab.accepted) == (0, 0, 0)
    fake.script = honest
    assert (await market.chat(MODEL, MESSAGES)).cost == 3, "the provider's next receipt has the next number"
    assert await market.evidence() == []


async def _void_first(session: Session) -> None:
    session.take(0)
    await session.void()


async def _void_that_charges(session: Session) -> None:
    await session.match()
    await session.void(Outcome.COMPLETED)


async def _void_with_a_cost(session: Session) -> None:
    await session.match()
    await session.void(cost=Amount(1), cumulative_cost=Amount(1))


async def _void_of_another(session: Session) -> None:
    await session.match(0)
    session.take(1)
    await session.void()


async def _forged_void(session: Session) -> None:
    await session.match()
    receipt = session.release()
    forged = replace(receipt, signature=signer("eve").sign_digest(receipt.digest))
    await session.send(Kind.VOID, forged.to_bytes())


async def _two_voids(session: Session) -> None:
    await session.match()
    await session.void()
    await session.void()


async def _chunk_after_void(session: Session) -> None:
    await session.match()
    await session.void()
    await session.answer()


@pytest.mark.parametrize(
    "script", [_void_first, _void_that_charges, _void_with_a_cost, _void_of_another, _forged_void, _two_voids, _chunk_after_void]
)
async def test_only_a_valid_void_releases_a_cap(
    market: Market, fake: FakeMarket, script: Callable[[Session], Awaitable[None]]
) -> None:
    """A VOID that is misplaced, forged, of an order that was not matched or not free ends the job as the coordinator's fault."""

    async def play(session: Session) -> None:
        await script(session)
        await session.cancelled.wait()

    fake.script = play
    with pytest.raises((BadMessage, BadSignature)) as caught:
        await run(market)
    assert caught.value.fault is Fault.COORDINATOR
    assert await market.evidence() == []


async def test_no_provider_climbs_by_jobs_that_it_fails(market: Market, fake: FakeMarket) -> None:
    """After the stated number of orders without a receipt, a provider gets no more. This is no block, and receipts end it."""
    fake.providers, fake.script = fake.providers[:1], refuses
    alice = fake.providers[0].address
    for _ in range(MAX_AWAITING_RECEIPTS):
        with suppress(Unavailable):
            await run(market)
    for cached in (True, False):  # the exclusion shows as the orders are signed, or in the shortlist
        if not cached:
            market._shortlists.forget()
            fake.refusals = [Refusal(Code.NO_PROVIDER, "none fits")]
        with pytest.raises(Unavailable) as caught:
            await run(market)
        assert (caught.value.code, len(fake.submissions)) == (Code.NO_PROVIDER, MAX_AWAITING_RECEIPTS)
        assert (caught.value.retry, caught.value.retry_after) == (True, OWING_SECONDS), "receipts may come"
    tab = await market.tab(alice)
    assert (tab.blocked_reason, tab.awaiting_receipts) == ("", MAX_AWAITING_RECEIPTS)
    assert alice in await market._ledger.excluded(DOMAIN, market._now())
    until = max(order.claim_by for order in fake.orders())
    assert await market._ledger.excluded(DOMAIN, until) == {}
    session = next(iter(fake.sessions.values()))
    session.take(0)
    session.tried[-1]["receipt"] = session.release().to_json()
    await market._reconciler.reconcile(session.job)
    assert await market._ledger.excluded(DOMAIN, market._now()) == {}


async def test_outstanding_receipts_are_asked_for_less_and_less(ledger: Ledger) -> None:
    """A job without a receipt is queried soon, then at intervals equal to its age, until nobody can collect on it."""
    job, (placed,) = await take(ledger)
    await ledger.end_job(job, JobState.FAILED, "gone", NOW_S, matched=[placed.order.digest])
    queries, now = 0, NOW_S
    while now < placed.order.message.claim_by + 1_000:
        for due in await ledger.jobs_awaiting_receipts(now, 60):
            await ledger.record_inquiry(due, now)
            queries += 1
        now += 60
    assert 8 <= queries <= 14
    _, (other,) = await take(ledger)
    assert await ledger.jobs_awaiting_receipts(NOW_S, 60) == []
    assert other.order.message.ceiling == placed.terms.max_cost + other.terms.max_cost


async def test_an_unknown_job_releases_no_order(ledger: Ledger) -> None:
    """If it is unknown which orders of a job were matched, all count; if it is known, the others stop counting."""
    job, (alice, bob) = await take(ledger, ALICE, BOB)
    await ledger.end_job(job, JobState.FAILED, "never admitted", NOW_S, keep_orders_open=True)
    assert [(await ledger.tab(DOMAIN, placed.provider, NOW_S)).open_caps for placed in (alice, bob)] == [alice.terms.max_cost] * 2
    job, (alice, bob) = await take(ledger, ALICE, BOB)
    await ledger.end_job(job, JobState.FAILED, "bob failed", NOW_S, matched=[bob.order.digest])
    caps = [(await ledger.tab(DOMAIN, placed.provider, NOW_S)).open_caps for placed in (alice, bob)]
    assert caps == [alice.terms.max_cost, 2 * bob.terms.max_cost]


async def test_a_receipt_at_no_cost_ends_no_job_that_goes_on(ledger: Ledger) -> None:
    """A receipt at no cost releases only its own order, counts as no request, and leaves the tab's totals unchanged."""
    job, (alice, bob) = await take(ledger, ALICE, BOB)
    void = ALICE.signer.sign(bill(alice, NONE, Outcome.REFUSED), DOMAIN)
    for _ in range(2):
        assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, alice, void, None, NOW_S, final=False)) is None
    known = await ledger.find_job(job)
    assert known is not None
    assert (known.state, known.receipt) == (JobState.OPEN, None)
    assert await ledger.spending(NOW_S, ()) == []
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, bob, BOB.signer.sign(bill(bob), DOMAIN), None, NOW_S)) is None
    known = await ledger.find_job(job)
    assert known is not None
    assert known.receipt is not None
    assert known.receipt.message.provider == BOB.address
    assert (await ledger.spending(NOW_S, ()))[0].requests == 1
    again = ALICE.signer.sign(bill(alice, Usage(10, 0, 5), seq=2), DOMAIN)
    complaint = await ledger.record_receipt(IncomingReceipt(DOMAIN, job, alice, again, None, NOW_S))
    assert complaint is not None
    assert complaint.fault is Fault.PROVIDER
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).open_caps == alice.terms.max_cost, "it counts again"


@pytest.mark.parametrize("charging", [0, 1])
async def test_no_job_is_free_for_which_one_provider_charged(ledger: Ledger, charging: int) -> None:
    """A receipt at no cost from the last provider says nothing about that of the one before it, whichever order is first."""
    parties = (ALICE, BOB)
    job, placed = await take(ledger, *parties)
    settler = Reconciler(ledger, None, now=lambda: NOW_S, live=dict, limit=1, every=60, keep=60, recovery=None)  # type: ignore[arg-type]  # nothing is asked
    for index, usage, outcome in ((charging, SOME, Outcome.COMPLETED), (1 - charging, NONE, Outcome.REFUSED)):
        receipt = parties[index].signer.sign(bill(placed[index], usage, outcome), DOMAIN)
        final = index != charging
        assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed[index], receipt, None, NOW_S, final=final)) is None
    known = await ledger.find_job(job)
    assert known is not None
    assert known.receipt is not None
    assert [order.state for order in known.orders] == [OrderState.RECORDED] * 2
    assert known.cost == known.receipt.message.cost > 0
    assert not await settler.costs_nothing(job)
    remote = RemoteJob(State.FAILED, None, {"attempts": [{"provider": party.address} for party in parties]})
    assert not await settler._is_free(job, remote)


# Whole answers


async def whole_then_fail(session: Session) -> None:
    """Sends the whole answer, then a failure, and withholds the receipt."""
    await session.match()
    if session.request.get("stream"):
        await session.answer(200, EVENTS)
        await session.chunk(event("whole"))
        await session.chunk(b"data: [DONE]\n\n", last=True)
    else:
        await session.answer()
        await session.chunk(completion("whole"), last=True)
    await session.send(Kind.FAIL, dumps(Unavailable(Code.NODE_GONE, "sorry", fault=Fault.PROVIDER).as_json()))


async def test_a_whole_answer_is_not_thrown_away(market: Market, fake: FakeMarket) -> None:
    """If a job fails after the last chunk, the caller has the answer, the order counts, and the receipt is fetched."""
    fake.script = whole_then_fail
    async with await market.submit(CHAT, STREAM) as job:
        assert [chunk async for chunk in job] == [event("whole"), b"data: [DONE]\n\n"]
        assert job.receipt_outstanding
        result = await job.result()
    cap = fake.last.submission.candidates[0].terms.max_cost
    assert (result.receipt, result.cost, result.highest_cost) == (None, 0, cap)
    tab = await market.tab(fake.providers[0].address)
    assert (tab.accepted, tab.open_caps) == (0, cap)
    fake.last.bill()

    async def booked() -> bool:
        return (await market.tab(fake.providers[0].address)).accepted == 3

    await market._reconciler.reconcile(job.id)
    await eventually(booked)
    known = await market.find(job.id)
    assert known is not None
    assert (known.state, known.receipt is not None) == (JobState.COMPLETED, True)
    assert (await market._ledger.spending(0, ()))[0].failed == 0


async def test_a_whole_answer_with_a_dishonest_receipt_is_not_paid(market: Market, fake: FakeMarket) -> None:
    """A later receipt is checked against the answer that had arrived."""
    fake.script = whole_then_fail
    await run(market)
    fake.last.bill(result_commitment=Hash(bytes(32)))
    with suppress(TallyError):
        await market._reconciler.reconcile(fake.last.job)
    await eventually(lambda: _is(market.evidence))
    assert (await market.tab(fake.providers[0].address)).accepted == 0


async def _is(ask: Callable[[], Awaitable[object]]) -> bool:
    return bool(await ask())


async def test_a_connection_that_breaks_after_the_end_loses_nothing(market: Market, fake: FakeMarket) -> None:
    """After the last chunk the answer is whole, whether or not the receipt is available then."""

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(completion("whole"), last=True)
        if billed:
            session.bill()
        session.survives = True
        await session.cut()

    fake.script = breaks
    for billed in (True, False):
        result = await market.chat(MODEL, MESSAGES)
        assert result.text == "whole"
        assert (result.receipt is not None) is billed
    assert fake.cancels == []


async def test_the_gateway_reports_an_outstanding_receipt(market: Market, fake: FakeMarket) -> None:
    """The response is a 200 with its body; headers say that the receipt is outstanding, and the highest possible cost."""
    fake.script = whole_then_fail
    async with (
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        answer = await http.post(CHAT, json={"model": MODEL, "messages": MESSAGES, "max_tokens": 100})
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"] == "whole"
        assert answer.headers["x-tally-receipt"] == "outstanding"
        assert int(answer.headers["x-tally-cost"]) == fake.last.candidate.terms.max_cost
        streamed = await http.post(CHAT, json=STREAM)
    assert streamed.content == event("whole") + b"data: [DONE]\n\n"


@pytest.mark.parametrize("alone", [True, False], ids=["one provider", "hedged"])
async def test_a_released_attempt_turns_out_to_be_the_last(market: Market, fake: FakeMarket, alone: bool) -> None:
    """If the coordinator dies right after an attempt's receipt at no cost, the job ends with that receipt, and counts once."""

    async def dies(session: Session) -> None:
        await session.match(0)
        if not alone:
            await session.hedge(1)
            session.swap()
        await session.void()
        session.state, session.survives = State.FAILED, True
        if not alone:
            session.swap()
            session.release(Outcome.PROVIDER_ERROR)
            session.swap()
            session.tried.reverse()
        session.receipt = read_signed(Receipt, session.tried[-1]["receipt"])
        await session.cut()

    fake.script = dies
    with pytest.raises(TallyError):
        await market.chat(MODEL, MESSAGES, tally={"hedge_after": 0.5})
    job = fake.last.job

    async def ended() -> bool:
        known = await market.find(job)
        assert known is not None
        return known.state is JobState.FAILED

    await eventually(ended)
    known = await market.find(job)
    assert known is not None
    assert known.receipt is not None
    assert known.receipt.message.cost == 0
    (spent,) = await market._ledger.spending(0, ())
    assert (spent.requests, spent.failed, spent.cost) == (1, 1, 0)
    assert {order.state for order in known.orders} <= {OrderState.RECORDED, OrderState.RELEASED, OrderState.CLOSED}
