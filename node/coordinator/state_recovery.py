"""State recovery: before a node offers anything, it asks its coordinators for the receipts that its key signed there before.

A state that is new, restored from a backup, or recreated with an old key may miss receipts that the key signed. Signing a receipt
number or total twice costs the stake. One tab spans all coordinators, so a receipt signed at one coordinator binds the node at
the others. Therefore nothing is offered until all configured coordinators have answered, except those that the operator chose to
skip. The answers need no trust: the payer signed the order, and this key signed the receipt.

Nothing is offered either while the chain paid, or this node claimed, more on a tab than its record says.
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
    """See the module's docstring.

    `completed`: accounts and URLs of coordinators whose recovery is complete; `required`: URLs that must be complete; `skipped`:
    URLs that the operator skips; `url_of` returns the configured URL of a link's coordinator; `on_complete` is called when a
    coordinator's recovery is complete.
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
        """The requested page of each coordinator, until it arrives."""
        self._links: dict[tuple[Address, str], list[Link]] = {}
        """The open links to each coordinator whose recovery is not complete, one for each replica. The first one is asked."""

    @property
    def unanswered(self) -> tuple[str, ...]:
        """URLs of the required coordinators whose recovery is not complete and not skipped."""
        answered = {url for _, url in self._completed}
        return tuple(url for url in self._required if url not in answered and url not in self._skipped)

    @property
    def problem(self) -> str:
        """Why nothing is offered to any coordinator; empty if there is no reason."""
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
                f"tabs paid or claimed beyond what this state records: {len(self._tabs.chain_ahead)} (the first with payer "
                f"{payer}: {format_amount(Amount(total))} dollars, recorded {format_amount(record)} dollars): the state is older "
                "than what this key has signed. Restore the newest state, or remove the state to ask all coordinators again"
            )
        return ""

    def is_complete(self, coordinator: Address) -> bool:
        """Whether this coordinator may be offered anything."""
        return not self.problem and any(coordinator == known for known, _ in self._completed)

    def connected(self, link: Link) -> None:
        """Asks the coordinator of a new link for receipts, unless its recovery is complete, or another replica is being asked."""
        source = link.coordinator, self._url_of(link)
        if source not in self._completed:
            links = self._links.setdefault(source, [])
            links.append(link)
            if links[0] is link:
                self._request_page(link, source, "")

    def disconnected(self, link: Link) -> None:
        """Asks another replica, if the link that ended was the one that was asked."""
        for source, links in list(self._links.items()):
            if link not in links:
                continue
            asked = links[0] is link
            links.remove(link)
            if not links:
                del self._links[source]
            elif asked and source not in self._completed:
                self._request_page(links[0], source, "")

    def page_received(self, link: Link, payload: bytes) -> None:
        """Handles one page of the answer. Raises BadMessage if the page is malformed."""
        raw = loads(payload, "recalled")
        listed = raw.get("receipts") if isinstance(raw, dict) else None
        if not isinstance(listed, list) or len(listed) > MAX_PAGE or not isinstance(raw.get("more"), bool):
            raise BadMessage(f"recalled: expected at most {MAX_PAGE} receipts and a boolean `more`")
        url = self._url_of(link)
        source = (link.coordinator, url)
        if source in self._completed or source not in self._requested_after or not self._is_asked(link, source):
            return  # not requested: the next page is requested once the previous one is stored, or pages would pile up
        late = [LateReceipt.from_json(raw_receipt) for raw_receipt in listed]
        after = self._requested_after[source]
        if late and late[-1].receipt.message.payer <= after:  # otherwise the pages might never end
            raise BadMessage(f"recalled: expected receipts of payers after {after}, got {late[-1].receipt.message.payer}")
        del self._requested_after[source]
        task = asyncio.create_task(self._record_page(link, source, late, more=raw["more"] and bool(late)), name="recalled")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _is_asked(self, link: Link, source: tuple[Address, str]) -> bool:
        return link in self._links.get(source, ())[:1]

    def _request_page(self, link: Link, source: tuple[Address, str], after: str) -> None:
        if self._is_asked(link, source):
            self._requested_after[source] = after
            link.post(Kind.RECALL, NO_JOB, dumps({"after": after}))

    async def _record_page(self, link: Link, source: tuple[Address, str], listed: list[LateReceipt], *, more: bool) -> None:
        """Stores receipts that are newer than the record. Then requests the next page, or completes the recovery."""
        try:
            for late in listed:
                await self._record(late)
            if not more:
                await self._store.record_recovery_complete(*source, int(self._now()))
        except TallyError as error:
            log.warning("state recovery failed, so nothing is offered; asking again", reason=str(error))
            await asyncio.sleep(_RETRY_SECONDS)
            self._request_page(link, source, "")
            return
        if more:
            self._request_page(link, source, listed[-1].receipt.message.payer)
            return
        self._completed.add(source)
        self._links.pop(source, None)
        if self.problem:
            log.warning("nothing is offered yet", reason=self.problem)
        self.on_complete()

    async def _record(self, late: LateReceipt) -> None:
        try:
            receipt, order = late.receipt.verify(self._domain), late.order.verify(self._domain)
            check_receipt(order, late.terms, receipt.message)
        except PeerError as error:  # a coordinator cannot forge receipts; a foreign one is not for our tab
            log.warning("the coordinator returned a receipt that is not of this node", reason=str(error))
            return
        message, held = receipt.message, self._tabs.account(receipt.message.payer).tab
        if message.provider != self._provider:
            return
        if message.seq == held.seq and message.cumulative_cost != held.cumulative:
            log.error("two receipts with one number: this key also signed on another state", payer=message.payer, seq=message.seq)
        if message.seq <= held.seq:
            return
        await self._store.record_recovered(receipt, order, late)
        self._tabs.merge_recovered(message, order.message)
        log.warning(
            "receipt of an earlier state recovered",
            payer=message.payer,
            seq=message.seq,
            total=format_amount(message.cumulative_cost),
        )
