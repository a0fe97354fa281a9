"""Recalling: a node that has not worked on this state with a coordinator before first asks it what it signed there last.

A state that is new, restored from a backup, or made anew with an old key knows less than the node once signed. A receipt with a
number or a total that was given before costs the stake, and a tab is one for all coordinators: what was signed at one of them
binds the node at the others. So nothing is offered anywhere until all that are configured have answered, but for those that the
operator names to go on without. What a coordinator tells needs no trust: the payer signed the order, this very key the receipt.

Nothing is offered either while the chain has paid, or this node has claimed, more on a tab than its record says.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from node.domain.tabs import Tabs
from node.ports import Link, RecallStore
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import BadMessage, PeerError, TallyError
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address
from tallystick.protocol.wire import NO_JOB, Kind, dumps, loads

log = structlog.get_logger()
MAX_PAGE = 1_000
_RETRY_SECONDS = 10.0


class Recall:
    """See the module's docstring. `known`: the coordinators that have answered before, with the addresses at which they did;
    `required`: the addresses at which one must have; `without`: those among them to go on without; `url_of`: the address of a
    link; `finished` is called when one has answered.
    """

    def __init__(
        self,
        store: RecallStore,
        tabs: Tabs,
        *,
        domain: Domain,
        provider: Address,
        known: Iterable[tuple[Address, str]],
        required: Iterable[str],
        without: Iterable[str] = (),
        url_of: Callable[[Link], str],
        finished: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._tabs, self._domain, self._provider = store, tabs, domain, provider
        self._known, self._required = set(known), tuple(dict.fromkeys(required))
        self._without, self._url_of, self.finished, self._now = frozenset(without), url_of, finished, now
        self._tasks: set[asyncio.Task[None]] = set()
        self._after: dict[tuple[Address, str], str] = {}
        """The page that each was asked for, until it comes."""

    @property
    def silent(self) -> tuple[str, ...]:
        """The addresses at which no coordinator has told yet what it remembers, and which the operator does not go on without."""
        answered = {url for _, url in self._known}
        return tuple(url for url in self._required if url not in answered and url not in self._without)

    @property
    def trouble(self) -> str:
        """Why nothing is offered anywhere; empty if nothing is in the way."""
        if self.silent:
            return (
                f"waits for what {', '.join(self.silent)} remembers of this key's receipts: signing one number twice costs the "
                "stake. If it will not come back and this state is complete: tally node run --skip-recovery URL"
            )
        if self._tabs.ahead:
            payer, total = next(iter(self._tabs.ahead.items()))
            record = self._tabs.account(payer).tab.cumulative
            return (
                f"{len(self._tabs.ahead)} tab(s) were paid more than this state knows of (payer {payer}: {total}, the record "
                f"ends at {record} base units): it is older than what this key has signed. Restore the newest state, or remove "
                "it so that all coordinators are asked again"
            )
        return ""

    def done(self, coordinator: Address) -> bool:
        """Whether this coordinator may be offered anything."""
        return not self.trouble and any(coordinator == known for known, _ in self._known)

    def welcomed(self, link: Link) -> None:
        """A link is up: asks, unless it was answered before."""
        if (link.coordinator, self._url_of(link)) not in self._known:
            self._ask(link, "")

    def recalled(self, link: Link, payload: bytes) -> None:
        """One page of the answer. Raises BadMessage where it makes no sense."""
        raw = loads(payload, "recalled")
        listed = raw.get("receipts") if isinstance(raw, dict) else None
        if not isinstance(listed, list) or len(listed) > MAX_PAGE or not isinstance(raw.get("more"), bool):
            raise BadMessage(f"recalled: expected at most {MAX_PAGE} receipts, and whether there are more")
        url = self._url_of(link)
        who = (link.coordinator, url)
        if who in self._known or who not in self._after:
            return  # nobody asked: a page is taken only when the one before was taken in, or pages would pile up
        late = [LateReceipt.from_json(one) for one in listed]
        after = self._after[who]
        if late and late[-1].receipt.message.payer <= after:  # else it could go on for ever
            raise BadMessage(f"recalled: expected receipts of payers after {after}, got {late[-1].receipt.message.payer}")
        del self._after[who]
        task = asyncio.create_task(self._take(link, url, late, more=raw["more"] and bool(late)), name="recalled")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ask(self, link: Link, after: str) -> None:
        self._after[link.coordinator, self._url_of(link)] = after
        link.post(Kind.RECALL, NO_JOB, dumps({"after": after}))

    async def _take(self, link: Link, url: str, listed: list[LateReceipt], *, more: bool) -> None:
        """Writes down what is newer than what is known; then asks for the next page, or is done."""
        try:
            for late in listed:
                await self._adopt(late)
            if not more:
                await self._store.note_recalled(link.coordinator, url, int(self._now()))
        except TallyError as error:
            log.warning("what was signed before is not known yet, so nothing is offered; asking again", reason=str(error))
            await asyncio.sleep(_RETRY_SECONDS)
            self._ask(link, "")
            return
        if more:
            self._ask(link, listed[-1].receipt.message.payer)
            return
        self._known.add((link.coordinator, url))
        if self.trouble:
            log.warning("nothing is offered yet", reason=self.trouble)
        self.finished()

    async def _adopt(self, late: LateReceipt) -> None:
        try:
            receipt, order = late.receipt.verify(self._domain), late.order.verify(self._domain)
            check_receipt(order, late.terms, receipt.message)
        except PeerError as error:  # a coordinator can make up nothing; what is not ours is not our tab
            log.warning("a recalled receipt is none of ours", reason=str(error))
            return
        message, held = receipt.message, self._tabs.account(receipt.message.payer).tab
        if message.provider != self._provider:
            return
        if message.seq == held.seq and message.cumulative_cost != held.cumulative:
            log.error("two receipts of one number: this key has signed on another state", payer=message.payer, seq=message.seq)
        if message.seq <= held.seq:
            return
        await self._store.adopt(receipt, order, late)
        self._tabs.adopt(message, order.message)
        log.warning("a receipt of a former state", payer=message.payer, seq=message.seq, total=int(message.cumulative_cost))
