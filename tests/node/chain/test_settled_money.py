"""Where earned money is, against a chain on which payers, coordinators and the provider move it at random."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from node.chain.settled_money import read_settled_money
from node.domain.earned_money import EarnedMoney, TabMoney, locate_money
from node.domain.order_admission import AdmittedJob
from node.ports import FeeTotal, ReceiptRecord
from node.storage.earnings import read_tab_money
from node.storage.store import SqlStore
from tallystick.chain.claims import SettleRow
from tallystick.chain.events import Settled
from tallystick.chain.rpc import Rpc
from tallystick.protocol.types import Address, Amount, JobId, Seconds
from tests.chain.conftest import chain_url
from tests.chain.harness import World, person
from tests.node.harness import OFFER, Client, make_asks

__all__ = ["chain_url"]
NODE, COORDINATOR = person("node"), person("coordinator")
PAYERS = [person(f"payer {number}") for number in range(3)]
FEE_BPS, LEAST = 333, 40
TERMS = Client().order(make_asks().current[0]).terms


@dataclass
class Books:
    """The provider's store and chain, and what a bookkeeper would have written down about them."""

    world: World
    store: SqlStore
    earned: dict[Address, int] = field(default_factory=dict)
    ceilings: dict[Address, int] = field(default_factory=dict)
    paid: int = 0
    fees: int = 0
    cashed_out: int = 0
    jobs: int = 0
    known: FeeTotal | None = None

    async def job(self, payer: int, cost: int, seconds: int) -> None:
        """One job: an order that stays claimable for `seconds`, and its receipt."""
        key, now = PAYERS[payer], await self.world.rpc.now()
        self.jobs += 1
        ceiling = self.ceilings[key.address] = self.ceilings.get(key.address, 0) + cost
        changes = {"coordinator": COORDINATOR.address, "max_fee_bps": 500, "claim_by": Seconds(now + seconds)}
        order = self.world.order(key, NODE.address, ceiling, **changes).verify(self.world.domain)
        job = JobId(self.jobs.to_bytes(16, "big"))
        total = self.earned[key.address] = self.earned.get(key.address, 0) + cost
        seq = sum(1 for row in await self.store.tabs(0) if row.payer == key.address for _ in range(row.seq)) + 1
        members = {"order_hash": order.digest, "cost": Amount(cost), "finished_at": Seconds(now)}
        receipt = self.world.receipt(NODE, key.address, seq, total, **members).verify(self.world.domain)
        matched = AdmittedJob(job, order, TERMS, OFFER)
        await self.store.begin(matched, now)
        await self.store.record_receipt(ReceiptRecord(matched, receipt))

    async def settle(self, payer: int | None = None) -> int:
        """Sends a claim on one tab, or on all, as a coordinator or the node itself would. Returns what was paid."""
        now = await self.world.rpc.now()
        tabs = [tab for tab in await self.store.claimable(now, 10) if payer is None or tab.payer == PAYERS[payer].address]
        if not tabs:
            return 0
        sender = await self.world.sender(NODE)
        result = await self.world.settle(sender, *(SettleRow(tab.order, tab.seq, tab.cumulative) for tab in tabs))
        paid = sum(event.paid for event in result.of(Settled))
        self.paid, self.fees = self.paid + paid, self.fees + sum(event.fee for event in result.of(Settled))
        return paid

    async def cash_out(self) -> None:
        """Pays the credit out, if there is any."""
        credit = (await self.world.escrow.provider(NODE.address)).credit
        if credit:
            await self.world.escrow.cash_out(await self.world.sender(NODE), NODE.address)
            self.cashed_out += credit

    async def thaw(self, payer: int, *, withdraw: bool) -> None:
        """A payer announces that everything leaves, and perhaps waits and takes it."""
        owner, key = await self.world.sender(PAYERS[payer]), PAYERS[payer].address
        purse = await self.world.escrow.purse(key)
        if purse.free:
            await self.world.escrow.thaw(owner, key, purse.free)
            if withdraw:
                await self.world.advance(200)
                await self.world.escrow.withdraw(owner, key)

    async def observe(self, payer: int) -> None:
        """The node's own check records what the chain says of a tab."""
        key = PAYERS[payer].address
        if key in self.earned:
            _, tabs = await self.locate()
            now = await self.world.rpc.now()
            for tab in tabs:
                if tab.payer == key:
                    await self.store.record_funds(key, tab.funds, now)

    async def locate(self) -> tuple[EarnedMoney, list[TabMoney]]:
        """Reads where the money is."""
        now = await self.world.rpc.now()
        tabs = await self.store.read(lambda connection: read_tab_money(connection, now))
        settled = await read_settled_money(self.world.escrow, NODE.address, tabs, self.known)
        self.known = settled.final
        money = locate_money(settled.tabs, least=LEAST, fees=settled.fees, credit=settled.account.credit)
        return money, list(settled.tabs)

    async def check(self) -> EarnedMoney:
        """Checks each column that the bookkeeper knows, and that all units are there once."""
        money, _ = await self.locate()
        assert sum(getattr(money, column.name) for column in fields(money)) == money.earned == sum(self.earned.values())
        assert money.coordinator_fees == self.fees
        assert money.cashed_out == self.cashed_out
        assert money.credited == self.paid - self.fees - self.cashed_out
        assert money.accrued + money.claimable + money.owed_on_trust + money.lost == money.earned - self.paid
        return money


@pytest.fixture
async def books(chain_url: str, tmp_path: Path) -> AsyncIterator[Books]:
    """A market of three payers, one node, and a coordinator that takes a fee."""
    rpc = Rpc(chain_url)
    world = await World.make(rpc)
    await world.escrow.set_fee(await world.sender(COORDINATOR), FEE_BPS)
    for payer in PAYERS:
        await world.purse(payer, payer, 300)
    store = SqlStore(f"sqlite:///{tmp_path / 'node.db'}", NODE.address, world.domain)
    await store.start()
    yield Books(world, store)
    await store.close()
    await rpc.close()


async def act(books: Books, chance: random.Random) -> None:
    """One random event of a market."""
    payer, world = chance.randrange(len(PAYERS)), books.world
    match chance.choices(("job", "settle", "cash out", "thaw", "deposit", "wait", "observe"), (8, 3, 1, 1, 1, 2, 2))[0]:
        case "job":
            await books.job(payer, chance.choice((0, 1, 7, 60, 150)), chance.choice((30, 10_000)))
        case "settle":
            await books.settle(chance.choice((payer, None)))
        case "cash out":
            await books.cash_out()
        case "thaw":
            await books.thaw(payer, withdraw=chance.random() < 0.7)
        case "deposit":
            await world.top_up(PAYERS[payer], PAYERS[payer], chance.choice((5, 100)))
        case "wait":
            await world.advance(chance.choice((5, 40)))
        case _:
            await books.observe(payer)


@pytest.mark.parametrize("seed", range(6))
async def test_every_unit_is_counted_once(books: Books, seed: int) -> None:
    """After every random event, the columns agree with the bookkeeper. In the end, what is called collectable is paid at once,
    what is owed on trust is paid once the payers have money, and what is lost is never paid.
    """
    chance = random.Random(seed)
    for _ in range(25):
        await act(books, chance)
        await books.check()
    money = await books.check()
    assert await books.settle() == money.accrued + money.claimable
    assert (await books.check()).owed_on_trust == money.owed_on_trust
    for payer in PAYERS:
        await books.world.top_up(payer, payer, 10_000)
    assert await books.settle() == money.owed_on_trust
    await books.cash_out()
    end = await books.check()
    assert (end.lost, end.credited, end.cashed_out) == (money.lost, 0, books.paid - books.fees)


async def test_stored_fees_are_continued_and_survive_a_reorganisation(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fees of final blocks are read once; if those blocks are gone, all are read again."""
    monkeypatch.setattr("node.chain.settled_money.FINAL_BLOCKS", 1)
    await books.job(0, 100, 10_000)
    await books.settle()
    await books.world.advance(1)
    await books.world.advance(1)
    await books.check()
    stored = books.known
    assert stored is not None
    assert stored.fees == books.fees == 3
    await books.store.record_fee_total(stored)
    assert await books.store.fee_total() == stored
    await books.job(0, 100, 10_000)
    await books.settle()
    await books.check()
    books.known = FeeTotal(stored.block, "0x" + "11" * 32, Amount(99))
    await books.check()
