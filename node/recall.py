"""Recalling: a node that has not worked on this state with a coordinator before first asks it what it signed there last.

A state that is new, restored from a backup, or made anew with an old key knows less than the node once signed. A receipt with a
number or a total that was given before costs the stake, so until the coordinator has answered nothing is offered there. What it
tells counts for itself: the payer signed the order, this very key the receipt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from node.ports import Link, RecallStore
from node.tabs import Tabs
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import BadMessage, PeerError, TallyError
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address
from tallystick.protocol.wire import NO_JOB, Kind, dumps, loads

log = structlog.get_logger()
MAX_PAGE = 1_000


class Recall:
    """See the module's docstring. `known`: the coordinators that have answered before; `finished` is called when one has."""

    def __init__(
        self,
        store: RecallStore,
        tabs: Tabs,
        *,
        domain: Domain,
        provider: Address,
        known: Iterable[Address],
        finished: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._tabs, self._domain, self._provider = store, tabs, domain, provider
        self._known, self.finished, self._now = set(known), finished, now
        self._tasks: set[asyncio.Task[None]] = set()

    def done(self, coordinator: Address) -> bool:
        """Whether this coordinator may be offered anything."""
        return coordinator in self._known

    def welcomed(self, link: Link) -> None:
        """A link is up: asks, unless it was answered before."""
        if not self.done(link.coordinator):
            link.post(Kind.RECALL, NO_JOB, dumps({"after": ""}))

    def recalled(self, link: Link, payload: bytes) -> None:
        """One page of the answer. Raises BadMessage where it makes no sense."""
        raw = loads(payload, "recalled")
        listed = raw.get("receipts") if isinstance(raw, dict) else None
        if not isinstance(listed, list) or len(listed) > MAX_PAGE or not isinstance(raw.get("more"), bool):
            raise BadMessage(f"recalled: expected at most {MAX_PAGE} receipts, and whether there are more")
        if self.done(link.coordinator):
            return
        late = [LateReceipt.from_json(one) for one in listed]
        task = asyncio.create_task(self._take(link, late, more=raw["more"] and bool(late)), name="recalled")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, link: Link, listed: list[LateReceipt], *, more: bool) -> None:
        """Writes down what is newer than what is known; then asks for the next page, or is done."""
        try:
            for late in listed:
                await self._adopt(late)
            if not more:
                await self._store.note_recalled(link.coordinator, int(self._now()))
        except TallyError as error:
            log.warning("what was signed before is not known yet, so nothing is offered there", reason=str(error))
            return
        if more:
            link.post(Kind.RECALL, NO_JOB, dumps({"after": listed[-1].receipt.message.payer}))
            return
        self._known.add(link.coordinator)
        self.finished()

    async def _adopt(self, late: LateReceipt) -> None:
        try:
            receipt, order = late.receipt.verify(self._domain), late.order.verify(self._domain)
            check_receipt(order, late.terms, receipt.message)
        except PeerError as error:  # a coordinator can make up nothing; what is not ours is not our tab
            log.warning("a recalled receipt is none of ours", reason=str(error))
            return
        message = receipt.message
        if message.provider != self._provider or message.seq <= self._tabs.account(message.payer).tab.seq:
            return
        await self._store.adopt(receipt, order, late)
        self._tabs.adopt(message, order.message)
        log.warning("a receipt of a former state", payer=message.payer, seq=message.seq, total=int(message.cumulative_cost))
