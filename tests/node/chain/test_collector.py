from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from node.chain import collector
from node.chain.claim_policy import ClaimPolicy
from node.chain.collector import (
    EXPIRING,
    MAX_REFRESHED,
    MAX_ROWS,
    MAX_TABS,
    MIN_RETRY_DELAY,
    NO_COINS,
    RELEASING,
    THAWING,
    WRITTEN_OFF,
    Collector,
)
from node.domain.tabs import Funds
from node.ports import ClaimableTab, DebtAlarm, Link, SettlementResult
from node.testing.memory import MemoryChain, MemoryLink, MemoryStore
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.messages import Claim, Order
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import NO_JOB, Kind, loads
from tests.node.harness import COORDINATOR, DOMAIN, NOW, PAYER, PROVIDER, Client, make_asks, signer
from tests.node.storage.test_store import finish

TAB = ClaimableTab(
    payer=PAYER.address,
    seq=1,
    cumulative=Amount(500),
    settled=Amount(100),
    reserved=Amount(0),
    order=Client().order(make_asks().current[0], order_with={"ceiling": Amount(10_000)}).order,
    since=NOW,
    claimed_at=0,
    claimed=Amount(0),
)
POLICY = ClaimPolicy(
    claim_amount=Amount(1_000), max_age=60, reserve_percent=50, expiry_margin=3_600, retry_after=30, direct_min_amount=Amount(20)
)


@pytest.mark.parametrize(
    ("tab", "now", "wants"),
    [
        (TAB, NOW, False),
        (replace(TAB, cumulative=Amount(1_100)), NOW, True),
        (replace(TAB, cumulative=Amount(1_099)), NOW, False),
        (TAB, NOW + 60, True),
        (replace(TAB, reserved=Amount(800)), NOW, True),
        (replace(TAB, reserved=Amount(801)), NOW, False),
        (TAB, NOW + 86_400 - 3_600, True),
        (replace(TAB, settled=Amount(500)), NOW + 1_000, False),
    ],
)
def test_when_a_tab_is_due(tab: ClaimableTab, now: int, wants: bool) -> None:
    """A tab is due when it owes enough, has waited enough, used enough of its reservation, or rests on an order that soon
    expires.
    """
    assert POLICY.is_due(tab, now) is wants


def test_a_claim_must_be_worth_its_gas() -> None:
    """A claim must bring its gas cost however old it is, unless it would be lost."""
    policy = replace(POLICY, gas_cost_per_tab=Amount(41), min_gas_multiple=10)
    assert not policy.is_due(TAB, NOW + 60), "400 are due, 410 would be worth it"
    assert policy.is_due(replace(TAB, cumulative=Amount(510)), NOW + 60)
    assert policy.is_due(TAB, NOW + 86_400 - 3_600)


class FakeSettlement:
    """A settlement that pays every claim, or raises."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.fault: TallyError | None = None

    async def settle(self, claim: Signed[Claim], orders: Sequence[Signed[Order]]) -> SettlementResult:
        """See ports.Settlement."""
        signed = claim.verify(DOMAIN).message
        assert [row.order_hash for row in signed.rows] == [order.message.digest(DOMAIN) for order in orders]
        self.claims.append(signed)
        if self.fault is not None:
            raise self.fault
        return SettlementResult(("0x1",), {row.payer: row.cumulative_cost for row in signed.rows})


class World:
    """A collector on in-memory ports, with a clock that the test sets."""

    def __init__(self, policy: ClaimPolicy = POLICY) -> None:
        self.now = NOW
        self.store, self.chain = MemoryStore(), MemoryChain(Funds(free=Amount(10**9), known=True))
        self.link: MemoryLink | None = MemoryLink(COORDINATOR.address)
        self.others: dict[Address, Link] = {}
        self.seen: list[tuple[Address, Funds]] = []
        self.alarms: list[tuple[str, Address]] = []
        self.debts: list[DebtAlarm] = []
        self.till = FakeSettlement()
        self.in_doubt: set[Address] = set()
        self.collector = Collector(
            signer=PROVIDER,
            domain=DOMAIN,
            store=self.store,
            chain=self.chain,
            link=self._link,
            policy=policy,
            on_funds=lambda payer, funds: self.seen.append((payer, funds)),
            settlement=self.till,
            alarm=self._alarm,
            in_doubt=lambda payer: payer in self.in_doubt,
            now=lambda: self.now,
        )

    def _alarm(self, event: str, payer: Address, debt: DebtAlarm) -> None:
        self.alarms.append((event, payer))
        self.debts.append(debt)

    async def look(self) -> int:
        """Runs one round; returns what the node settled itself."""
        await self.collector.claim_due()
        return await self.collector.settle_directly()

    def _link(self, coordinator: Address) -> Link | None:
        return self.link if coordinator == COORDINATOR.address else self.others.get(coordinator)

    @property
    def claims(self) -> list[ClaimRequest]:
        """Returns the submitted claims."""
        assert self.link is not None
        return [ClaimRequest.from_json(loads(raw, "claim")) for raw in self.link.payloads(NO_JOB, Kind.CLAIM)]


async def test_a_claim_names_the_tab_and_the_order_behind_it() -> None:
    """A due tab is claimed with the provider's signature, its last seq and total, and the order to claim on."""
    world = World()
    made = await finish(world.store, Client())
    assert await world.collector.claim_due() == 0
    world.now += 60
    assert await world.collector.claim_due() == 1
    (request,) = world.claims
    claim = request.claim.verify(DOMAIN).message
    (row,) = claim.rows
    assert (row.payer, row.seq, row.cumulative_cost) == (PAYER.address, 1, 40)
    assert row.order_hash == request.orders[0].verify(DOMAIN).digest == made.matched.order.digest


async def test_an_unsettled_claim_is_submitted_again() -> None:
    """A claim gets time to be settled, and is submitted again after that."""
    world = World()
    await finish(world.store, Client())
    world.now += 60
    await world.collector.claim_due()
    world.now += 29
    assert await world.collector.claim_due() == 0
    world.now += 1
    assert await world.collector.claim_due() == 1
    assert len(world.claims) == 2


async def test_settled_amounts_are_observed() -> None:
    """A tab that the chain has paid is not claimed again, and the tabs in memory are updated."""
    world = World()
    await finish(world.store, Client())
    world.now += 60
    await world.collector.claim_due()
    paid = Funds(settled=Amount(40), reserved=Amount(9), known=True)
    world.chain.fresh[PAYER.address] = paid
    world.now += 1_000
    assert await world.collector.claim_due(everything=True) == 0
    assert world.seen == [(PAYER.address, paid)]
    assert await world.store.claimable(world.now, 10) == []


async def test_a_partial_payment_leaves_the_rest_claimable() -> None:
    """An amount that a short purse could not pay is claimed again later."""
    world = World()
    await finish(world.store, Client())
    world.now += 60
    await world.collector.claim_due()
    world.chain.fresh[PAYER.address] = Funds(settled=Amount(15), free=Amount(25), known=True)
    world.now += 100
    assert await world.collector.claim_due(everything=True) == 1
    (tab,) = await world.store.claimable(world.now, 10)
    assert tab.due == 25


async def test_without_a_link_claims_wait() -> None:
    """Without a connected coordinator, no claim is recorded; it is submitted once there is a link."""
    world = World()
    world.link = None
    await finish(world.store, Client())
    world.now += 60
    assert await world.collector.claim_due() == 0
    assert not world.store.claims
    world.link = MemoryLink(COORDINATOR.address)
    assert await world.collector.claim_due() == 1


async def test_claims_are_submitted_while_the_chain_is_down() -> None:
    """While the chain does not respond, a claim is submitted on the last known state."""
    world = World()
    world.chain.default = Funds()
    await finish(world.store, Client())
    assert await world.collector.claim_due(everything=True) == 1


async def test_many_tabs_go_in_several_claims() -> None:
    """A claim stays small enough for one transaction; further tabs go into the next claim."""
    world = World()
    for number in range(MAX_ROWS + 1):
        await finish(world.store, Client(signer(f"payer {number}")))
    assert await world.collector.claim_due(everything=True) == MAX_ROWS + 1
    assert [len(request.orders) for request in world.claims] == [MAX_ROWS, 1]


async def test_each_claim_goes_to_the_coordinator_of_its_orders() -> None:
    """Each coordinator gets the tabs whose orders name it; tabs of unconnected coordinators wait."""
    world = World()
    elsewhere = signer("another coordinator").address
    await finish(world.store, Client(signer("near")))
    await finish(world.store, Client(signer("far")), coordinator=elsewhere)
    assert await world.collector.claim_due(everything=True) == 1
    far = MemoryLink(elsewhere)
    world.others[elsewhere] = far
    world.now += 100
    assert await world.collector.claim_due(everything=True) == 2
    (request,) = [ClaimRequest.from_json(loads(raw, "claim")) for raw in far.payloads(NO_JOB, Kind.CLAIM)]
    assert [row.payer for row in request.claim.message.rows] == [signer("far").address]


async def test_a_payer_that_thaws_its_purse() -> None:
    """While a payer with debt thaws its purse, its tab is claimed at once, with one alarm."""
    world = World()
    await finish(world.store, Client())
    assert await world.collector.claim_due() == 0
    world.chain.default = Funds(known=True, thawing=Amount(5))
    assert await world.collector.claim_due() == 1
    await world.collector.claim_due()
    assert world.alarms == [(THAWING, PAYER.address)]
    for funds in (Funds(known=True), Funds(known=True, thawing=Amount(5))):
        world.chain.cached[PAYER.address] = funds
        await world.collector.claim_due()
    assert world.alarms == [(THAWING, PAYER.address)] * 2, "the payer thaws again"


async def test_a_tab_in_doubt_is_watched_and_not_claimed() -> None:
    """Its last receipts may be voided, and a claim could not. The operator hears of a payer that withdraws all the same."""
    world = World()
    await finish(world.store, Client())
    world.chain.default = Funds(known=True, thawing=Amount(5))
    world.in_doubt.add(PAYER.address)
    assert await world.collector.claim_due(everything=True) == 0
    assert (world.alarms, world.claims) == ([(THAWING, PAYER.address)], [])
    world.in_doubt.clear()
    assert await world.collector.claim_due() == 1


async def test_a_payer_that_releases_its_reservation() -> None:
    """While a payer with debt releases its reservation, its tab is claimed at once, with one alarm."""
    world = World()
    await finish(world.store, Client())
    assert await world.collector.claim_due() == 0
    world.chain.default = Funds(known=True, releasing=Amount(5))
    assert await world.collector.claim_due() == 1
    await world.collector.claim_due()
    assert world.alarms == [(RELEASING, PAYER.address)]


async def test_every_payer_is_watched_in_turn() -> None:
    """However many tabs owe more, a payer that starts a thaw is noticed within a few rounds."""
    world = World()
    for number in range(200):
        await finish(world.store, Client(signer(f"payer {number}")))
    hidden = signer("hidden")
    await finish(world.store, Client(hidden), ceiling=Amount(1))
    world.chain.cached[hidden.address] = Funds(known=True, thawing=Amount(5))
    for _ in range(4):
        await world.collector.claim_due()
    assert (THAWING, hidden.address) in world.alarms


# Costs that strangers cause


class CountingChain(MemoryChain):
    """Counts its refreshes."""

    looks = 0

    async def refresh(self, payer: Address) -> Funds:
        """See ports.ChainView."""
        self.looks += 1
        return await super().refresh(payer)


async def debts(world: World, numbers: range, *, due: int = 40, at: int = NOW) -> None:
    """Makes tabs of several payers."""
    for number in numbers:
        await finish(world.store, Client(signer(f"payer {number}")), at=at, ceiling=Amount(due))


async def test_an_empty_purse_is_not_claimed() -> None:
    """The tab of an empty purse is in no claim; it is claimed after the retry delay once the purse holds anything."""
    world = World()
    await debts(world, range(2))
    world.chain.cached[signer("payer 0").address] = Funds(known=True)
    world.now += 60
    assert await world.collector.claim_due() == 1
    assert [row.payer for row in world.claims[0].claim.message.rows] == [signer("payer 1").address]
    world.chain.fresh[signer("payer 0").address] = Funds(known=True, thawing=Amount(1))
    world.now += int(MIN_RETRY_DELAY) - 1
    assert await world.collector.claim_due() == 1, "the other coordinator again"
    world.now += 1
    assert await world.collector.claim_due() == 1
    assert [row.payer for row in world.claims[-1].claim.message.rows] == [signer("payer 0").address]


async def test_empty_purses_are_checked_less_and_less_often() -> None:
    """An empty purse is checked about thirty times in a day, and again before its order expires."""
    world = World()
    chain = world.chain = CountingChain(Funds(known=True))
    world.collector._chain = chain
    made = await finish(world.store, Client(), claim_by=NOW + 7 * 86_400)
    for _ in range(24 * 60):
        world.now += 60
        await world.collector.claim_due()
    assert chain.looks <= 15
    chain.looks = 0
    world.now = made.matched.order.message.claim_by - 600
    for _ in range(10):
        world.now += 59
        await world.collector.claim_due()
    assert chain.looks >= 1
    assert not world.store.claims


async def test_a_check_limits_its_chain_reads() -> None:
    """Each check refreshes at most MAX_REFRESHED due tabs, those that owe most first, and every tab gets its turn."""
    world = World()
    chain = world.chain = CountingChain(Funds(known=True, free=Amount(10**9)))
    world.collector._chain = chain
    await debts(world, range(MAX_REFRESHED), due=40)
    await debts(world, range(MAX_REFRESHED, MAX_REFRESHED + 1), due=30)
    small = signer(f"payer {MAX_REFRESHED}").address
    world.now += 60
    assert await world.collector.claim_due() == MAX_REFRESHED
    assert chain.looks == MAX_REFRESHED
    assert small not in {row.payer for request in world.claims for row in request.claim.message.rows}
    assert await world.collector.claim_due() == 1
    assert chain.looks == 2 * MAX_REFRESHED


async def test_old_debts_do_not_hide_new_ones() -> None:
    """However many older tabs are never paid, the tabs after them come up in the next check."""
    world = World()
    await debts(world, range(MAX_TABS), due=1)
    world.chain.default = Funds(known=True)
    new = Client(signer("new"))
    await finish(world.store, new, at=NOW)
    world.chain.cached[new.payer.address] = Funds(known=True, free=Amount(40))
    world.now += 60
    assert await world.collector.claim_due() == 0
    assert await world.collector.claim_due() == 1
    assert world.claims[0].claim.message.rows[0].payer == new.payer.address
    assert (EXPIRING, signer("payer 1").address) not in world.alarms


async def test_all_tabs_have_their_turn_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third page follows the second, and then the first comes again."""
    monkeypatch.setattr(collector, "MAX_TABS", 2)
    world = World()
    await debts(world, range(5))
    world.now += 60
    assert [await world.collector.claim_due() for _ in range(4)] == [2, 2, 1, 0]
    world.now += 30
    assert await world.collector.claim_due() == 2


async def test_a_thaw_is_seen_in_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one payer that owes most and one other, both are watched in each round."""
    monkeypatch.setattr(collector, "MAX_WATCHED", 1)
    world = World()
    await debts(world, range(1), due=40)
    await debts(world, range(1, 2), due=30)
    for rounds in range(1, 5):
        world.chain.default = Funds(known=True, free=Amount(10**9))
        world.chain.cached.clear()
        await world.collector.claim_due()
        world.chain.cached[signer("payer 1").address] = Funds(known=True, free=Amount(10**9), thawing=Amount(1))
        await world.collector.claim_due()
        assert world.alarms.count((THAWING, signer("payer 1").address)) == rounds


async def test_the_number_of_remembered_empty_purses_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The purses that were found empty last are remembered."""
    monkeypatch.setattr(collector, "MAX_EMPTY_PURSES", 2)
    world = World()
    world.chain.default = Funds(known=True)
    await debts(world, range(3))
    world.now += 60
    await world.collector.claim_due()
    assert len(world.collector._empty_purses) == 2


async def test_a_retry_delay_never_outlasts_an_order() -> None:
    """Shortly before its order expires, an empty purse is checked again after a quarter of the remaining time."""
    world = World()
    chain = world.collector._chain = CountingChain(Funds(known=True))
    await finish(world.store, Client(), claim_by=NOW + 1_000)
    for now, looks in ((900, 1), (924, 1), (925, 2)):
        world.now = NOW + now
        await world.collector.claim_due()
        assert chain.looks == looks


async def test_a_paid_tab_is_claimed_again_as_soon_as_it_owes_again() -> None:
    """A tab that owed nothing gets no retry delay."""
    world = World()
    client = Client()
    await finish(world.store, client)
    world.chain.default = Funds(settled=Amount(40), known=True)
    assert await world.collector.claim_due(everything=True) == 0
    await finish(world.store, client, 1)
    world.chain.default = Funds(settled=Amount(40), known=True, free=Amount(40))
    world.chain.cached.clear()
    assert await world.collector.claim_due(everything=True) == 1


@pytest.mark.parametrize(("dust", "claims"), [(0, 1), (40, 1), (41, 0)])
async def test_dust_is_never_claimed(dust: int, claims: int) -> None:
    """The smallest claimable amount is claimed and anything below it is not: by policy, during a thaw, and for a nearly empty
    purse.
    """
    policy = replace(POLICY, dust=Amount(dust))
    tab = replace(TAB, cumulative=Amount(140))
    assert policy.is_due(tab, tab.order.message.claim_by - 10) is bool(claims)
    for funds in (Funds(known=True, thawing=Amount(40)), Funds(known=True, free=Amount(40))):
        world = World(policy)
        await finish(world.store, Client())
        world.chain.default = funds
        world.now += 0 if funds.thawing else 60
        assert await world.collector.claim_due() == claims
        assert not world.collector._empty_purses


async def test_a_purse_that_holds_less_than_dust_is_empty() -> None:
    """However much is owed, the purse must hold an amount worth a claim."""
    for free, claims in ((19, 0), (20, 1)):
        world = World(replace(POLICY, dust=Amount(20)))
        await finish(world.store, Client())
        world.chain.default = Funds(known=True, free=Amount(free))
        world.now += 60
        assert await world.collector.claim_due() == claims


def test_a_settled_claim_is_not_pending() -> None:
    """A fully settled claim is not pending; with one unit missing it is."""
    for claimed, waits in ((100, False), (101, True)):
        assert POLICY.is_pending(replace(TAB, claimed_at=NOW, claimed=Amount(claimed)), NOW) is waits
    assert not replace(POLICY, dust=Amount(0)).is_due(replace(TAB, settled=Amount(500)), TAB.order.message.claim_by)


async def test_the_check_interval_follows_the_withdrawal_delay() -> None:
    """The interval is a quarter of the withdrawal delay, at least half a second, and never longer than configured."""
    world = World(replace(POLICY, check_interval=15.0))
    for wait, pause in ((float("inf"), 15.0), (8.0, 2.0), (1.0, 0.5)):
        world.chain.withdrawal_delay = wait
        assert world.collector.check_interval == pause


@pytest.mark.parametrize(("own_least", "before", "alarms"), [(40, 0, 1), (41, 0, 0), (0, 0, 1), (40, 1, 0)])
async def test_only_large_and_urgent_debts_raise_an_alarm(own_least: int, before: int, alarms: int) -> None:
    """A debt not worth its gas raises no alarm, nor does one that has time."""
    world = World(replace(POLICY, direct_min_amount=Amount(own_least)))
    made = await finish(world.store, Client())
    world.link = None
    world.now = made.matched.order.message.claim_by - int(POLICY.expiry_margin / 2) - before
    await world.collector.claim_due()
    assert world.alarms.count((EXPIRING, PAYER.address)) == alarms


# Settlement by the node

OWN = replace(POLICY, direct_margin=1_800.0)


async def test_unsettled_claims_are_settled_directly_before_they_expire() -> None:
    """Before claimBy the node settles what its coordinator did not, after the coordinator's time and not sooner."""
    world = World(OWN)
    made = await finish(world.store, Client())
    expires = made.matched.order.message.claim_by
    world.chain.default = Funds(known=True, free=Amount(40))
    world.now = expires - 1_801
    assert await world.look() == 0
    assert len(world.claims) == 1, "the coordinator was asked"
    world.now = expires - 1_800
    assert await world.look() == 0, "the last attempt was a second ago"
    world.now = expires - 1_771
    assert await world.look() == 1
    (claim,) = world.till.claims
    assert [(row.payer, row.seq, row.cumulative_cost) for row in claim.rows] == [(PAYER.address, 1, 40)]
    assert await world.look() == 0, "it is not sent twice in a row"
    world.now += 30
    assert await world.look() == 1, "sent again if the settlement does not appear"


async def test_without_a_coordinator_claims_are_settled_directly() -> None:
    """Without a connected coordinator, or without time for it, a claim that soon expires is settled at once."""
    for link, left in ((None, 1_800), (MemoryLink(COORDINATOR.address), 45)):
        world = World(OWN)
        made = await finish(world.store, Client())
        world.link, world.chain.default = link, Funds(known=True, free=Amount(40))
        world.now = made.matched.order.message.claim_by - left - 1
        assert await world.look() == 0
        world.now += 1
        assert await world.look() == 1


async def test_withdrawn_funds_are_settled_directly_in_time() -> None:
    """Funds that a payer withdraws are claimed by the node itself, within a quarter of the withdrawal delay."""
    world = World(OWN)
    await finish(world.store, Client())
    world.chain.default, world.chain.withdrawal_delay = Funds(known=True, releasing=Amount(40)), 40.0
    assert await world.look() == 0
    world.now += 9
    assert await world.look() == 0
    world.now += 1
    assert await world.look() == 1


@pytest.mark.parametrize(
    ("funds", "settled"),
    [
        (Funds(known=True, free=Amount(20)), 1),
        (Funds(known=True, free=Amount(19)), 0),
        (Funds(known=True, reserved=Amount(10), releasing=Amount(10)), 1),
        (Funds(known=True, thawing=Amount(20)), 1),
        (Funds(), 0),
    ],
)
async def test_direct_settlement_must_bring_its_gas(funds: Funds, settled: int) -> None:
    """The node pays for a transaction only if the purse still holds enough."""
    world = World(OWN)
    made = await finish(world.store, Client())
    world.link, world.chain.default = None, funds
    world.now = made.matched.order.message.claim_by - 100
    assert await world.look() == settled


async def test_a_wallet_without_coins_raises_one_alarm() -> None:
    """The alarm says what to do, and the next attempt waits."""
    world = World(OWN)
    made = await finish(world.store, Client())
    world.link, world.chain.default = None, Funds(known=True, free=Amount(40))
    world.now = made.matched.order.message.claim_by - 100
    world.till.fault = Refusal(Code.INSUFFICIENT_FUNDS, "no coins")
    assert [await world.look(), await world.look()] == [0, 0]
    assert (len(world.till.claims), world.alarms.count((NO_COINS, PAYER.address))) == (1, 1)
    world.till.fault = Refusal(Code.CHAIN_REFUSED, "reverted")
    world.now += 30
    assert await world.look() == 0
    assert world.alarms.count((NO_COINS, PAYER.address)) == 1
    world.till.fault = Unavailable(Code.CHAIN_UNAVAILABLE, "not mined")
    world.now += 30
    await world.collector.claim_due()
    with pytest.raises(Unavailable):
        await world.collector.settle_directly()


async def test_one_transaction_is_never_larger_than_a_claim() -> None:
    """The tabs that expire first go first; the rest follows in the next round."""
    world = World(OWN)
    world.link, world.chain.default = None, Funds(known=True, free=Amount(40))
    for number in range(MAX_ROWS + 1):
        await finish(world.store, Client(signer(f"payer {number}")), claim_by=NOW + 1_000 - number)
    assert [await world.look(), await world.look(), await world.look()] == [MAX_ROWS, 1, 0]
    assert world.till.claims[1].rows[0].payer == signer("payer 0").address


async def test_direct_settlement_can_be_switched_off() -> None:
    """With `direct_margin` 0, or without a wallet, all claims are left to coordinators."""
    world = World(replace(OWN, direct_margin=0.0))
    made = await finish(world.store, Client())
    world.link, world.chain.default = None, Funds(known=True, free=Amount(40), thawing=Amount(1))
    world.now = made.matched.order.message.claim_by - 10
    assert await world.look() == 0


async def test_write_offs_are_recorded_with_one_alarm() -> None:
    """Expired debts are written off, and one alarm covers all new ones."""
    world = World()
    for number in range(3):
        await finish(world.store, Client(signer(f"payer {number}")), claim_by=NOW + 600)
    large = Client(signer("large"))
    await finish(world.store, large, claim_by=NOW + 600)
    await finish(world.store, large, 1, claim_by=NOW + 600)
    await world.collector.claim_due()
    for later, alarm_count in ((599, 0), (600, 1), (1_300, 1), (2_000, 1)):
        world.now = NOW + later
        await world.collector.claim_due()
        assert world.alarms.count((WRITTEN_OFF, large.payer.address)) == alarm_count
    assert world.debts[-1].due == 200


async def test_an_expiring_debt_raises_an_alarm() -> None:
    """A tab whose order soon expires raises an alarm in time, even if it was claimed."""
    world = World()
    made = await finish(world.store, Client())
    world.link = None
    world.now = made.matched.order.message.claim_by - int(POLICY.expiry_margin / 2)
    assert await world.collector.claim_due() == 0
    assert world.alarms == [(EXPIRING, PAYER.address)]


async def test_run_claims_due_tabs() -> None:
    """`run` claims tabs that become due."""
    world = World(replace(POLICY, check_interval=0.01))
    await finish(world.store, Client())
    world.now += 60
    task = asyncio.create_task(world.collector.run())
    assert world.link is not None
    await world.link.until(Kind.CLAIM, NO_JOB)
    task.cancel()


async def test_run_settles_directly() -> None:
    """`run` settles expiring claims, and continues after a chain failure."""
    world = World(replace(OWN, check_interval=0.01, retry_after=0.02))
    made = await finish(world.store, Client())
    world.link, world.chain.default = None, Funds(known=True, free=Amount(40))
    world.now = made.matched.order.message.claim_by - 100
    world.till.fault = Unavailable(Code.CHAIN_UNAVAILABLE, "not mined")
    task = asyncio.create_task(world.collector.run())
    while len(world.till.claims) < 2:
        await asyncio.sleep(0.01)
        world.now += 1
    task.cancel()
    assert await asyncio.gather(task, return_exceptions=True)
