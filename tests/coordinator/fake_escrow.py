"""An in-memory escrow: settles like the contract, mines one block per transaction, and can be down or refuse claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.chain.settler import Settler
from coordinator.domain.exposure import Exposure
from coordinator.storage.memory import MemoryStore
from tallystick.chain.claims import ClaimBatch, pack_batches
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow, ProviderAccount, Purse, TabState, TxResult
from tallystick.chain.event_reader import DeepReorg, EventPage
from tallystick.chain.events import Event, LogPosition, Settled
from tallystick.chain.rpc import Rpc, Sender
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.types import Address, Amount, Seconds
from tests.coordinator.harness import COORDINATOR, DOMAIN, Clock

DEPLOYMENT = Deployment(DOMAIN.chain_id, DOMAIN.contract, Address("0x" + "cd" * 20), 6, block=3, rpc="http://127.0.0.1:1")


class FakeEscrow(Escrow):
    """`free` and `thawing`: purses; `settled`, `reserved` and `release_at`: tabs. `sent`: the transactions so far, as lists of
    claims. `refuses`: providers with whose claims a transaction fails, and how. `reads`: of purses and stakes; `tab_reads`.
    """

    def __init__(self) -> None:
        super().__init__(Rpc("http://127.0.0.1:1"), DEPLOYMENT)
        self.free: dict[Address, int] = {}
        self.settled: dict[tuple[Address, Address], int] = {}
        self.reserved: dict[tuple[Address, Address], int] = {}
        self.thawing: dict[Address, int] = {}
        self.release_at: dict[tuple[Address, Address], int] = {}
        self.stakes: dict[Address, int] = {}
        self.fees: dict[Address, int] = {}
        self.refuses: dict[Address, TallyError] = {}
        self.sent: list[list[ClaimBatch]] = []
        self.events: list[Event] = []
        self.block = DEPLOYMENT.block
        self.down = False
        self.reads, self.tab_reads, self.forks = 0, 0, 0

    def _check_up(self) -> None:
        if self.down:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, "the chain does not answer")

    async def settle_all(self, sender: Sender, claims: Sequence[ClaimBatch]) -> list[TxResult]:
        return [await self.settle(sender, batch) for batch in pack_batches(claims)]

    async def settle(self, sender: Sender, claims: Sequence[ClaimBatch]) -> TxResult:
        assert sender.address == COORDINATOR.address
        self._check_up()
        for claim in claims:
            if claim.provider in self.refuses:
                raise self.refuses[claim.provider]
        self.sent.append(list(claims))
        self.block += 1
        tx = f"0x{self.block:064x}"
        settled = [event for claim in claims for row in claim.rows if (event := self._pay(claim.provider, row, tx))]
        self.events += settled
        return TxResult(tx, self.block, 50_000, 0, tuple(settled))

    def _pay(self, provider: Address, row: Any, tx: str) -> Settled | None:
        order = row.order.message
        tab = (order.payer, provider)
        due = min(row.cumulative_cost, order.ceiling) - self.settled.get(tab, 0)
        paid = min(due, self.free.get(order.payer, 0))
        if paid <= 0:
            return None
        self.free[order.payer] -= paid
        self.settled[tab] = self.settled.get(tab, 0) + paid
        at = LogPosition(self.block, len(self.events), "0x" + "00" * 32, tx)
        total = Amount(self.settled[tab])
        return Settled(at=at, payer=order.payer, provider=provider, paid=Amount(paid), fee=Amount(0), settled=total)

    async def read_events(
        self, _rpc: Rpc, _deployment: Deployment, cursor: int, *, after: str = "", confirmations: int = 0
    ) -> EventPage:
        """Stands in for chain.events.read_events, two blocks a page."""
        self._check_up()
        if after and after != self._tip(cursor - 1):
            raise DeepReorg(cursor - 1, after, self._tip(cursor - 1))
        last = min(self.block - confirmations, cursor + 1)
        if last < cursor:
            return EventPage((), cursor, after)
        return EventPage(tuple(event for event in self.events if cursor <= event.at.block <= last), last + 1, self._tip(last))

    def take_back(self) -> None:
        """Reorganises the chain to one on which nothing was settled yet."""
        for event in self.events:
            if isinstance(event, Settled):
                self.free[event.payer] += event.paid
        self.events, self.settled, self.forks = [], {}, self.forks + 1

    def _tip(self, block: int) -> str:
        return f"0x{self.forks:08x}{block:056x}"

    async def purse(self, key: Address, *, block: str = "latest") -> Purse:
        self.reads += 1
        self._check_up()
        owner = key if key in self.free else None
        thawing = Amount(self.thawing.get(key, 0))
        return Purse(owner, Amount(self.free.get(key, 0)), thawing, Seconds(1 if thawing else 0))

    async def provider(self, address: Address, *, block: str = "latest") -> ProviderAccount:
        self.reads += 1
        self._check_up()
        nothing = Amount(0)
        return ProviderAccount(nothing, address, Amount(self.stakes.get(address, 0)), nothing, Seconds(0), 0)

    async def fee_bps(self, coordinator: Address) -> int:
        self._check_up()
        return self.fees.get(coordinator, 0)

    async def tab(self, payer: Address, provider: Address, *, block: str = "latest") -> TabState:
        self.tab_reads += 1
        self._check_up()
        tab = (payer, provider)
        release = Seconds(self.release_at.get(tab, 0))
        return TabState(Amount(self.settled.get(tab, 0)), Amount(self.reserved.get(tab, 0)), release)


def make_settler(
    escrow: Escrow,
    store: MemoryStore,
    clock: Clock | None = None,
    exposure: Exposure | None = None,
    *,
    confirmations: int = 0,
    min_claim: int = 1,
    min_claim_row: int = 1,
) -> Settler:
    """Returns a settler of that escrow; its `run` works every hundredth of a second."""
    clock = clock or Clock()
    return Settler(
        escrow=escrow,
        sender=Sender(escrow.rpc, COORDINATOR),
        store=store,
        exposure=exposure or Exposure(),
        interval=0.01,
        min_claim=Amount(min_claim),
        min_claim_row=Amount(min_claim_row),
        confirmations=confirmations,
        now=clock.now,
        tick=clock.tick,
    )
