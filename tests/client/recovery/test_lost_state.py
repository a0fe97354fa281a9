"""A wallet whose ledger file lacks some of the key's signatures recovers them from signed messages, and never more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from tallystick.client.config import ClientConfig
from tallystick.client.ledger.repair import PaidOrder, RecoveryResult
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.receipts.delivery_check import QUARTERS_UNDELIVERED
from tallystick.client.recovery import lost_state
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount, Hash
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session, eventually, honest, run
from tests.client.parties import DOMAIN, Provider, bill, place, signer


@pytest.fixture(autouse=True)
def query_at_any_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows queries about tabs at any interval."""
    monkeypatch.setattr(lost_state, "QUERY_INTERVAL_SECONDS", 0.0)


@pytest.fixture
async def fake() -> AsyncIterator[FakeMarket]:
    """A market with one provider, which refuses orders that its tab does not allow and bills most of each order."""
    async with FakeMarket(Provider.make("alice")).serve() as market:
        market.script = refuse_unauthorised
        yield market


async def refuse_unauthorised(session: Session) -> None:
    """A node that knows its tab."""
    try:
        await session.match()
    except Refusal as refusal:
        await session.fail(refusal)
        return
    await session.answer()
    await session.chunk(b"{}", last=True)
    await session.finish(Usage(min(30, len(session.body)), 0, 60))


@asynccontextmanager
async def opened(fake: FakeMarket, wallet: Signer, config: ClientConfig, name: str) -> AsyncIterator[Market]:
    """A client with a ledger file of this name."""
    path = config.ledger_path(wallet.address).with_name(name)
    async with Market(fake.url, wallet, replace(config, ledger_file=path)) as market:
        yield market


def delete_ledger(config: ClientConfig, wallet: Signer, name: str) -> None:
    """Deletes a ledger file and SQLite's files beside it."""
    path = config.ledger_path(wallet.address).with_name(name)
    for each in path.parent.glob(f"{name}*"):
        each.unlink()


async def test_lost_ledger_file(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """After its ledger file was deleted, a client's first job succeeds: the tab is recovered before an order is signed."""
    for turn in range(3):
        async with opened(fake, wallet, config, "a.db") as market:
            await run(market)
            await run(market)
            tab = await market.tab(fake.providers[0].address)
        cumulative = fake.providers[0].tab.cumulative
        assert (tab.total, tab.blocked_reason) == (cumulative, "")
        assert fake.orders()[-1].ceiling - cumulative < fake.submissions[-1].candidates[0].terms.max_cost
        delete_ledger(config, wallet, "a.db")
        assert len({order.seq for order in fake.orders()}) == 2 * (turn + 1)


async def test_refusal_without_evidence(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """If no signatures can be recovered, the refusal states the possible cause and what to do. The next job works once they
    can.
    """
    async with opened(fake, wallet, config, "a.db") as market:
        await run(market)
    fake.forgets = True
    async with opened(fake, wallet, config, "b.db") as market:

        async def keyed() -> bytes:
            async with await market.submit(CHAT, BODY, key="one") as job:
                return (await job.result()).body

        with pytest.raises(Unavailable, match=r"b\.db\) has less.*one ledger file") as caught:
            await keyed()
        assert caught.value.code is Code.UNAUTHORISED_TAB
        fake.forgets = False
        with pytest.raises(Unavailable, match=r"lacked 0\.0000.*Ask again"):
            await keyed()
        assert await keyed() == b"{}", "the key stood for no job that ran"
        assert await market.evidence() == []


async def test_two_ledger_files(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With two ledger files for one key, each recovers what it lacks and logs the reason; nobody is blocked."""
    messages: list[str] = []

    async def persist(market: Market) -> None:
        try:
            await run(market)
        except TallyError as error:
            messages.append(str(error))
            await run(market)

    async with opened(fake, wallet, config, "a.db") as first_market, opened(fake, wallet, config, "b.db") as other:
        for _ in range(4):
            await persist(first_market)
            await persist(other)
        provider = fake.providers[0].address
        await first_market._reconciler.recovery.recover([provider], chain=False)
        for market in (first_market, other):
            tab = await market.tab(provider)
            assert (tab.total, tab.blocked_reason) == (fake.providers[0].tab.cumulative, "")
            assert await market.evidence() == []
    assert fake.providers[0].tab.seq == 8
    assert len(messages) in range(5, 8), "the second file learnt of the tab before its first order"
    assert all("one ledger file" in text for text in messages)
    assert any("another process signs with this key" in text for text in messages)
    assert len({order.seq for order in fake.orders()}) == len(fake.orders())


async def test_old_ceilings_do_no_harm(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A provider may accept a job because of an order that the file lacks, so the total exceeds all known ceilings. The
    receipt is recorded, its total is not believed, and the provider is not blocked.
    """
    async with opened(fake, wallet, config, "a.db") as market:
        for _ in range(4):
            await run(market)
        await run(market, BODY | {"max_tokens": 8_000})
    fake.script, fake.forgets = honest, True
    async with opened(fake, wallet, config, "b.db") as market:
        await run(market, BODY | {"max_tokens": 5})
        provider = fake.providers[0]
        tab = await market.tab(provider.address)
        assert tab.ceiling < provider.tab.cumulative
        assert (tab.accepted, tab.total, tab.blocked_reason) == (3, 0, "")
        fake.forgets = False
        await market._reconciler.recovery.recover([provider.address], chain=False)
        assert (await market.tab(provider.address)).total == provider.tab.cumulative


async def test_made_up_receipts(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A provider that invents a receipt for a payer without a ledger gets at most what the shown orders allow. A message
    that this payer did not sign, or that belongs to another order, does not count.
    """
    alice, signed = fake.providers[0], place()
    huge: dict[str, Any] = {"seq": 99, "cumulative_cost": Amount(10**12)}

    def shown(receipt: Verified[Receipt], order: object = signed.order) -> LateReceipt:
        return LateReceipt(receipt, order, signed.terms)  # type: ignore[arg-type]

    lie = alice.signer.sign(bill(signed, **huge), DOMAIN)
    thief = signer("thief")
    stranger = thief.sign(replace(signed.order.message, payer=thief.address, ceiling=Amount(10**12)), DOMAIN)
    unbacked = bill(replace(signed, order=stranger), payer=thief.address, **huge)
    forged = replace(signed.order, message=replace(signed.order.message, ceiling=Amount(10**12)))
    fake.shows = [shown(alice.signer.sign(unbacked, DOMAIN), stranger), shown(lie, forged)]
    fake.shows += [shown(signer("bob").sign(bill(signed, provider=signer("bob").address, **huge), DOMAIN))]
    async with opened(fake, wallet, config, "a.db") as market:
        await market._reconciler.recovery.recover([alice.address], chain=False)
        assert (await market.tab(alice.address)).ceiling == 0
        fake.shows.append(shown(lie))
        await market._reconciler.recovery.recover([alice.address], chain=False)
        tab = await market.tab(alice.address)
        assert tab.total == tab.ceiling == signed.order.message.ceiling
        for _ in range(3):
            await market._reconciler.recovery.recover([alice.address], chain=False)
        assert await market.tab(alice.address) == tab


async def test_failover_hides_no_missing_tab(wallet: Signer, config: ClientConfig) -> None:
    """If another provider does a job that one refused because of its tab, that tab is still queried."""

    async def turned_down(session: Session) -> None:
        """Alice refuses the job and Bob does it."""
        await session.match(0)
        session.provider.tab = session.provider.tab.drop(session.candidate.terms.max_cost)
        await session.match(1)
        await session.answer()
        await session.chunk(b"{}", last=True)
        await session.finish()

    async with FakeMarket().serve() as fake:
        async with opened(fake, wallet, config, "a.db") as market:
            await run(market)
        fake.script, fake.forgets = turned_down, True
        async with opened(fake, wallet, config, "b.db") as market:
            alice = fake.providers[0]
            await run(market, BODY | {"max_tokens": 90})
            assert (await market.tab(alice.address)).total == 0
            fake.forgets = False
            market._reconciler.recovery.asked_at.clear()
            await run(market, BODY | {"max_tokens": 90})

            async def learnt() -> bool:
                return (await market.tab(alice.address)).total == alice.tab.cumulative

            await eventually(learnt)


async def test_an_unanswered_query_delays_no_job(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that does not answer the query delays the first job only for a bounded time."""
    monkeypatch.setattr(lost_state, "QUERY_TIMEOUT_SECONDS", 0.05)

    async def never(*_: object) -> list[LateReceipt]:
        raise Refusal(Code.RATE_LIMITED, "not now", fault=Fault.COORDINATOR)

    async with opened(fake, wallet, config, "a.db") as market:
        monkeypatch.setattr(market._reconciler.recovery.coordinator, "receipts", never)
        assert await run(market) == b"{}"


@dataclass
class Chain:
    """A chain that reports the given payment."""

    settled_: int
    orders: list[PaidOrder] | None
    asked: list[int] = field(default_factory=list)

    async def settled(self, _provider: str) -> Amount:
        return Amount(self.settled_)

    async def paid(self, _provider: str, enough: Amount) -> list[PaidOrder] | None:
        self.asked.append(enough)
        return self.orders

    async def close(self) -> None:
        return None


async def test_a_payment_beyond_receipts_blocks_by_itself(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Recently used providers are watched: a payment on chain beyond a provider's receipts blocks it automatically."""
    async with opened(fake, wallet, config, "a.db") as market:
        await run(market)
        provider, recovery = fake.providers[0].address, market._reconciler.recovery
        cost = (await market.tab(provider)).accepted
        for settled, blocked in ((cost, False), (cost + 1, True)):
            chain = Chain(settled, [])
            watching = replace(recovery, escrow=chain, asked_at={})  # type: ignore[arg-type]
            await watching.check_payments(0.0)
            assert bool((await market.tab(provider)).blocked_reason) is blocked
            assert chain.asked == ([settled] if blocked else [])
        with pytest.raises(TallyError) as caught:
            await run(market)
        assert caught.value.code is Code.NO_PROVIDER


async def test_a_slow_chain_hides_no_payment(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the search for a payment's orders takes longer than a job waits, the provider is blocked."""
    monkeypatch.setattr(lost_state, "QUERY_TIMEOUT_SECONDS", 0.05)

    class Slow(Chain):
        async def paid(self, provider: str, enough: Amount) -> list[PaidOrder] | None:
            await asyncio.sleep(0.2)
            return await super().paid(provider, enough)

    async with opened(fake, wallet, config, "a.db") as market:
        await run(market)
        provider, recovery = fake.providers[0].address, market._reconciler.recovery
        slow = Slow((await market.tab(provider)).accepted + 1, [])
        await replace(recovery, escrow=slow, asked_at={}).check_payments(0.0)  # type: ignore[arg-type]
        assert (await market.tab(provider)).blocked_reason


@pytest.mark.parametrize("orders", [[], None])
async def test_a_lying_chain_gets_no_order(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, orders: list[PaidOrder] | None
) -> None:
    """If a provider refuses because of its tab and a lying chain reports a payment of the whole purse, no ceiling exceeds
    what this wallet signed.
    """
    fake.script = _unauthorised
    async with opened(fake, wallet, config, "a.db") as market:
        market._reconciler.recovery = replace(market._reconciler.recovery, escrow=Chain(50_000_000, orders))  # type: ignore[arg-type]
        for _ in range(3):
            with pytest.raises(TallyError):
                await run(market)
    caps = [session.candidates[0].terms.max_cost for session in fake.submissions]
    assert max(order.ceiling for order in fake.orders()) <= sum(caps)
    assert len(caps) == (3 if orders is None else 1), "where nothing proves it, a person is asked"


async def _unauthorised(session: Session) -> None:
    await session.match()
    await session.fail(Refusal(Code.UNAUTHORISED_TAB, "below the tab's total", fault=Fault.CLIENT))


async def test_receipts_at_no_cost_are_learnt_from_the_tab(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """If the job's own response lacked a receipt at no cost, the coordinator's list of receipts releases the cap. A listed
    receipt that charges for undelivered output is not recorded.
    """

    async def fails(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.NODE_BUSY, "busy", fault=Fault.PROVIDER))

    fake.script = fails
    async with opened(fake, wallet, config, "a.db") as market:
        alice = fake.providers[0]
        for charges in (False, True):
            with pytest.raises(Unavailable):
                await run(market)
            session = fake.last
            session.take(0)
            receipt = session.bill(Usage(10, 0, 100), result_commitment=Hash(b"\7" * 32)) if charges else session.release()
            session.receipt = None
            fake.shows = [LateReceipt(receipt, session.candidate.order, session.candidate.terms)]
            with capture_logs() as logs:
                await market._reconciler.recovery.recover([alice.address], chain=False)
            assert ("refused a late receipt" in [entry["event"] for entry in logs]) is charges
            tab = await market.tab(alice.address)
            cap = session.candidate.terms.max_cost
            assert (tab.accepted, tab.open_caps) == (0, cap if charges else 0)
            assert tab.undelivered_quarters == (QUARTERS_UNDELIVERED if charges else 0)


async def test_a_late_receipt_at_no_cost_leaves_the_answer_alone(wallet: Signer, config: ClientConfig) -> None:
    """A late receipt at no cost releases the order of its provider; the job that another provider completed stays completed."""
    async with FakeMarket().serve() as fake, opened(fake, wallet, config, "a.db") as market:

        async def stood_in(session: Session) -> None:
            await session.match(0)
            fake.shows = [LateReceipt(session.release(), session.candidate.order, session.candidate.terms)]
            await session.match(1)
            await session.answer()
            await session.chunk(b"{}", last=True)
            await session.finish()

        fake.script = stood_in
        await run(market)
        alice = fake.providers[0].address
        assert (await market.tab(alice)).open_caps > 0
        await market._reconciler.recovery.recover([alice], chain=False)
        assert (await market.tab(alice)).open_caps == 0
        known = await market.find(fake.last.job)
        assert known is not None
        assert (known.state, known.reason) == (JobState.COMPLETED, "")
        assert [order.state for order in known.orders] == [OrderState.RELEASED, OrderState.RECORDED]


async def test_the_interval_between_queries_about_a_tab(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A tab is queried again only after the given interval; before an order it is queried only if the ledger does not know it."""
    alice = fake.providers[0].address
    async with opened(fake, wallet, config, "a.db") as market:
        recovery = market._reconciler.recovery
        assert await recovery.recover([], chain=False) == []
        assert await recovery.recover([alice], chain=False, interval=60.0) == [RecoveryResult()]
        assert await recovery.recover([alice], chain=False, interval=60.0) == []
        assert await recovery.recover([alice], chain=False) == [RecoveryResult()]
        far = 1e300  # too large for the clock to change it
        recovery.asked_at[alice] = -far
        assert await recovery.recover([alice], chain=False, interval=far) == []
        assert len(fake.inquiries) == 2
    for inquiries in (3, 3):
        async with opened(fake, wallet, config, "b.db") as market:
            await run(market)
            await run(market)
        assert len(fake.inquiries) == inquiries, "once, by the first process that used this file"


async def test_an_inquiry_has_its_time(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The query has the client's time; a clock before 1970 counts as 0, the lowest time that a message can have."""
    async with opened(fake, wallet, config, "a.db") as market:
        for clock, expected in ((1_700_000_000, 1_700_000_000), (-5, 0)):
            asking = replace(market._reconciler.recovery, now=lambda clock=clock: clock, asked_at={})  # type: ignore[misc]
            await asking.recover([fake.providers[0].address], chain=False)
            assert fake.inquiries[-1].asked_at == expected


async def test_the_chain_is_queried_only_on_request(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Before an order only the coordinator is queried, because the chain may be slow."""
    alice = fake.providers[0].address
    async with opened(fake, wallet, config, "a.db") as market:
        chain = Chain(10**6, [])
        asking = replace(market._reconciler.recovery, escrow=chain, asked_at={})  # type: ignore[arg-type]
        assert await asking.recover([alice], chain=False) == [RecoveryResult()]
        assert chain.asked == []
        (result,) = await asking.recover([alice], chain=True)
        assert (result.unexplained, chain.asked) == (10**6, [10**6])


async def test_the_hint_names_the_last_foreign_order(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The hint names the latest time at which another process signed; without one, it says that the file may be old."""
    async with opened(fake, wallet, config, "a.db") as market:
        note = market._reconciler.recovery.origin_hint
        hint = note(RecoveryResult(elsewhere=1_600_000_000), RecoveryResult(elsewhere=1_700_000_000), RecoveryResult())
        assert "last: 2023-11-14 22:13:20 UTC" in hint
        assert "is new, lost or restored" in note(RecoveryResult(), RecoveryResult())
        assert "is new, lost or restored" in note()
