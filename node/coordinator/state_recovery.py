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
from node.ports import Link, RecoveryStore
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import BadMessage, PeerError, TallyError
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.protocol.wire import NO_JOB, Kind, dumps, loads

log = structlog.get_logger()
MAX_PAGE = 1_000
_RETRY_SECONDS = 10.0


class StateRecovery:
    """See the module's docstring. `known`: the coordinators that have answered before, with the addresses at which they did;
    `required`: the addresses at which one must have; `without`: those among them to go on without; `url_of`: the address of a
    link; `finished` is called when one has answered.
    """

    def __init__(
        self,
        store: RecoveryStore,
        tabs: Tabs,
        *,
        domain: Domain,
        provider: Address,
        completed: Iterable[tuple[Address, str]],
        required: Iterable[str],
        skipped: Iterable[str] = (),
        url_of: Callable[[Link], str],
        on_complete: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._tabs, self._domain, self._provider = store, tabs, domain, provider
        self._completed, self._required = set(completed), tuple(dict.fromkeys(required))
        self._skipped, self._url_of, self.on_complete, self._now = frozenset(skipped), url_of, on_complete, now
        self._tasks: set[asyncio.Task[None]] = set()
        self._requested_after: dict[tuple[Address, str], str] = {}
        """The page that each was asked for, until it comes."""

    @property
    def unanswered(self) -> tuple[str, ...]:
        """The addresses at which no coordinator has told yet what it remembers, and which the operator does not go on without."""
        answered = {url for _, url in self._completed}
        return tuple(url for url in self._required if url not in answered and url not in self._skipped)

    @property
    def problem(self) -> str:
        """Why nothing is offered anywhere; empty if nothing is in the way."""
        if self.unanswered:
            return (
                f"this node offers nothing until it knows which receipts it signed before: no answer yet from "
                f"{', '.join(self.unanswered)}. Signing one receipt number twice costs the stake. If a coordinator will not come "
                "back and this state is complete, run: tally node run --skip-recovery URL"
            )
        if self._tabs.chain_ahead:
            payer, total = next(iter(self._tabs.chain_ahead.items()))
            record = self._tabs.account(payer).tab.cumulative
            return (
                f"{len(self._tabs.chain_ahead)} tab(s) were paid or claimed beyond what this state records (payer {payer}: "
                f"{format_amount(Amount(total))}, recorded {format_amount(record)}): the state is older than what this key has "
                "signed. Restore the newest state, or remove the state to ask all coordinators again"
            )
        return ""

    def is_complete(self, coordinator: Address) -> bool:
        """Whether this coordinator may be offered anything."""
        return not self.problem and any(coordinator == known for known, _ in self._completed)

    def connected(self, link: Link) -> None:
        """A link is up: asks, unless it was answered before."""
        if (link.coordinator, self._url_of(link)) not in self._completed:
            self._request_page(link, "")

    def page_received(self, link: Link, payload: bytes) -> None:
        """One page of the answer. Raises BadMessage where it makes no sense."""
        raw = loads(payload, "recalled")
        listed = raw.get("receipts") if isinstance(raw, dict) else None
        if not isinstance(listed, list) or len(listed) > MAX_PAGE or not isinstance(raw.get("more"), bool):
            raise BadMessage(f"recalled: expected at most {MAX_PAGE} receipts, and whether there are more")
        url = self._url_of(link)
        who = (link.coordinator, url)
        if who in self._completed or who not in self._requested_after:
            return  # nobody asked: a page is taken only when the one before was taken in, or pages would pile up
        late = [LateReceipt.from_json(one) for one in listed]
        after = self._requested_after[who]
        if late and late[-1].receipt.message.payer <= after:  # else it could go on for ever
            raise BadMessage(f"recalled: expected receipts of payers after {after}, got {late[-1].receipt.message.payer}")
        del self._requested_after[who]
        task = asyncio.create_task(self._record_page(link, url, late, more=raw["more"] and bool(late)), name="recalled")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _request_page(self, link: Link, after: str) -> None:
        self._requested_after[link.coordinator, self._url_of(link)] = after
        link.post(Kind.RECALL, NO_JOB, dumps({"after": after}))

    async def _record_page(self, link: Link, url: str, listed: list[LateReceipt], *, more: bool) -> None:
        """Writes down what is newer than what is known; then asks for the next page, or is done."""
        try:
            for late in listed:
                await self._record(late)
            if not more:
                await self._store.record_recovery_complete(link.coordinator, url, int(self._now()))
        except TallyError as error:
            log.warning("what was signed before is not known yet, so nothing is offered; asking again", reason=str(error))
            await asyncio.sleep(_RETRY_SECONDS)
            self._request_page(link, "")
            return
        if more:
            self._request_page(link, listed[-1].receipt.message.payer)
            return
        self._completed.add((link.coordinator, url))
        if self.problem:
            log.warning("nothing is offered yet", reason=self.problem)
        self.on_complete()

    async def _record(self, late: LateReceipt) -> None:
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
        await self._store.record_recovered(receipt, order, late)
        self._tabs.merge_recovered(message, order.message)
        log.warning("a receipt of a former state", payer=message.payer, seq=message.seq, total=int(message.cumulative_cost))
