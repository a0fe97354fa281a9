"""Doubtful receipts: those that a killed process signed, and that no coordinator has confirmed.

A receipt is on disk before the last chunk of its answer leaves, and that chunk is in memory alone. If the process is killed in
between, the coordinator gets the receipt from the next process, and refuses it as undelivered. Such a receipt is voided: nobody
pays for an answer whose end is lost. The next receipt of the tab has the next number and a total without it, and its order gets a
receipt at no cost, as the orders do that the killed process left open.

That is possible only for the last receipts of a tab, on which neither a receipt nor a claim rests. So until the coordinator has
decided, at most for some seconds, its jobs are refused, no other order of the killed process is closed, and the tabs in question
are not claimed. A coordinator that refuses what it got takes work for nothing, which counts as unpaid
(`node.jobs.coordinator_credit`). A receipt that this process signed is not voided: it sends the end of its answer again
(`node.jobs.resumable_answers`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import structlog

from node.domain.order_admission import MatchedOrder
from node.domain.tabs import Tabs
from node.ports import DoubtfulReceipt, Link, VoidStore
from tallystick.protocol.errors import Code, TallyError
from tallystick.protocol.types import Address, Amount, JobId

log = structlog.get_logger()
DECISION_SECONDS = 10.0
"""How long a connected coordinator may take to decide. It waits some seconds for what is missing of an answer."""
CONNECT_SECONDS = 60.0
"""How long after the start the tabs in question are not claimed, if their coordinator is not connected."""


class _Refused(NamedTuple):
    receipt: DoubtfulReceipt
    link: Link
    error: TallyError


class DoubtfulReceipts:
    """See the module's docstring. `receipts`: what the store has of them when the process starts; `tick`: a monotonic clock.

    `on_decided` is called once a coordinator has decided, or took too long. `on_voided` takes the orders whose receipts were
    voided, and `on_unpaid` the endpoint of their coordinator and their cost in base units. `on_kept` takes a refused receipt that
    could not be voided, as `refused` does.
    """

    def __init__(
        self, store: VoidStore, tabs: Tabs, receipts: Iterable[DoubtfulReceipt], tick: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._tabs, self._tick = store, tabs, tick
        self._open: dict[Address, dict[JobId, DoubtfulReceipt]] = {}
        self._refused: dict[Address, list[_Refused]] = {}
        for receipt in receipts:
            self._open.setdefault(receipt.coordinator, {})[receipt.job] = receipt
        self._until = dict.fromkeys(self._open, tick() + CONNECT_SECONDS)
        """Until when each coordinator can decide. It is set anew once, when it first connects."""
        self._unconnected = set(self._open)
        self._handled: set[JobId] = set()
        """Jobs whose receipts were refused as undelivered. One may be refused several times, since it is sent several times."""
        self._voiding: set[asyncio.Task[None]] = set()
        self.on_decided: Callable[[], None] = lambda: None
        self.on_voided: Callable[[Sequence[MatchedOrder]], None] = lambda _orders: None
        self.on_unpaid: Callable[[str, Amount], None] = lambda _endpoint, _cost: None
        self.on_kept: Callable[[Link, JobId, TallyError], None] = lambda _link, _job, _error: None

    def start(self) -> None:
        """Has `on_decided` called when the time to connect is over."""
        if self._open:
            asyncio.get_running_loop().call_later(CONNECT_SECONDS + 0.1, self.on_decided)

    @property
    def pending(self) -> bool:
        """Whether any coordinator has yet to decide, and time to."""
        return any(self._undecided(coordinator) for coordinator in self._until)

    def concern(self, payer: Address) -> bool:
        """Whether a payer's tab may still lose its last receipts."""
        return any(payer == receipt.payer for coordinator in self._until for receipt in self._undecided(coordinator))

    def is_decided(self, coordinator: Address) -> bool:
        """Whether a coordinator has decided about all its receipts, or took too long."""
        return not self._undecided(coordinator)

    def _undecided(self, coordinator: Address) -> Sequence[DoubtfulReceipt]:
        """The receipts of a coordinator that may still be voided."""
        if coordinator not in self._until or self._tick() >= self._until[coordinator]:
            return ()
        refused = (refused.receipt for refused in self._refused.get(coordinator, ()))
        return (*self._open.get(coordinator, {}).values(), *refused)

    def connected(self, link: Link) -> bool:
        """Notes that a coordinator can decide now. Returns whether there is something to decide."""
        coordinator = link.coordinator
        if coordinator in self._unconnected and self._undecided(coordinator):
            self._until[coordinator] = self._tick() + DECISION_SECONDS
            asyncio.get_running_loop().call_later(DECISION_SECONDS + 0.1, self.on_decided)
        self._unconnected.discard(coordinator)
        return not self.is_decided(coordinator)

    def acknowledged(self, link: Link, job: JobId) -> None:
        """Notes that a coordinator has a receipt, whatever it said before."""
        refused = self._refused.get(link.coordinator, [])
        refused[:] = (each for each in refused if each.receipt.job != job)
        if self._take(link, job) is not None:
            self._decide(link.coordinator)

    def refused(self, link: Link, job: JobId, error: TallyError) -> bool:
        """Notes that a coordinator refuses a receipt for good. Returns whether that is dealt with here: it may be voided."""
        in_time = not self.is_decided(link.coordinator)
        receipt = self._take(link, job)
        if receipt is None:
            return job in self._handled
        undelivered = error.code is Code.UNDELIVERED and in_time
        if undelivered:
            self._handled.add(job)
            self._refused.setdefault(link.coordinator, []).append(_Refused(receipt, link, error))
        self._decide(link.coordinator)
        return undelivered

    def _take(self, link: Link, job: JobId) -> DoubtfulReceipt | None:
        return self._open.get(link.coordinator, {}).pop(job, None)

    def _decide(self, coordinator: Address) -> None:
        """Voids what a coordinator refused, once it has decided about all."""
        if self._open[coordinator]:
            return
        del self._open[coordinator]
        task = asyncio.create_task(self._void_all(coordinator), name="void receipts")
        self._voiding.add(task)
        task.add_done_callback(self._voiding.discard)

    async def _void_all(self, coordinator: Address) -> None:
        refused = sorted(self._refused.get(coordinator, ()), key=lambda refused: refused.receipt.seq)
        try:
            for payer in dict.fromkeys(each.receipt.payer for each in refused):
                await self._void(payer, [each for each in refused if each.receipt.payer == payer])
        finally:
            self._refused.pop(coordinator, None)
            del self._until[coordinator]
            self.on_decided()

    async def _void(self, payer: Address, refused: Sequence[_Refused]) -> None:
        tab = self._tabs.account(payer).tab
        last = _last_in_a_row(refused, tab.seq)
        orders: list[MatchedOrder] = []
        try:
            orders = await self._store.void(payer, [each.receipt for each in last]) if last else []
        except TallyError as error:
            log.warning("receipts not voided", payer=payer, reason=str(error))
        if orders:
            before = last[0].receipt.before
            self._tabs.roll_back(payer, before)
            log.warning("receipts voided: a killed process lost the ends of their answers", payer=payer, count=len(orders))
            self.on_unpaid(last[0].link.endpoint, Amount(tab.cumulative - before))
            self.on_voided(orders)
        for each in refused[: len(refused) - len(orders)]:
            self.on_kept(each.link, each.receipt.job, each.error)


def _last_in_a_row(refused: Sequence[_Refused], seq: int) -> Sequence[_Refused]:
    """Those of a tab whose last receipt is number `seq` that end with that number and leave none out, lowest number first."""
    count = 0
    while count < len(refused) and refused[-1 - count].receipt.seq == seq - count:
        count += 1
    return refused[len(refused) - count :]
