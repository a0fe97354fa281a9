"""The receipt sender: makes sure that every receipt reaches its coordinator.

A receipt leaves once with its job. Until the coordinator confirms that it is stored, or refuses it for good, it is sent again
after every reconnection and at intervals. It then carries its order, because a killed coordinator may not have stored the job.
Any replica of the coordinator takes it: if the one that gave the job is lost, the receipt goes to another one at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

import structlog

from node.ports import Link, LinkLost, ReceiptStore
from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind, dumps

log = structlog.get_logger()
PAGE_SIZE = 256
MAX_PAGES = 16
"""Pages that one round sends to one coordinator, so that a coordinator that confirms nothing does not get all receipts every
time.
"""
_BATCH_SECONDS = 1.0
RETRY_SECONDS, RETRY_GROWTH = 0.2, 1.25
"""The first pause between two rounds to a coordinator that will decide soon. Each further one is longer by a quarter.

The other replicas take a lost one's receipts as soon as the payer cancels the job there, or once they know that it is gone, which
takes some seconds. So does the wait for the rest of an answer whose node was killed.
"""
MAX_UNSAVED = 8_192
"""Acknowledgements of one coordinator that wait to be saved. The receipts of further ones are sent once more."""


class ReceiptSender:
    """See the module's docstring. `resend_seconds`: how long to wait for an acknowledgement before sending again."""

    def __init__(self, store: ReceiptStore, resend_seconds: float = 60.0, now: Callable[[], float] = time.time) -> None:
        self._store, self._resend_seconds, self._now = store, resend_seconds, now
        self._links: dict[Address, list[Link]] = {}
        """The open links to each coordinator, one for each replica, oldest first."""
        self._fresh: set[Address] = set()
        self._pauses: dict[Address, float] = {}
        """The next pause, for each coordinator that will decide soon, until it has confirmed all receipts."""
        self._next_page: dict[Address, int] = {}
        self._unsaved: dict[Address, set[JobId]] = {}
        self._has_fresh, self._has_unsaved = asyncio.Event(), asyncio.Event()

    def connected(self, link: Link) -> None:
        """Sends the unconfirmed receipts of a coordinator, if this is its first link."""
        links = self._links.setdefault(link.coordinator, [])
        links.append(link)
        if len(links) == 1:
            self._resend(link.coordinator)

    def resend_soon(self, coordinator: Address) -> None:
        """Sends a coordinator's unconfirmed receipts again within moments, for as long as it leaves any without an answer."""
        self._pauses[coordinator] = RETRY_SECONDS
        self._resend(coordinator)

    def resend_now(self) -> None:
        """Sends all unconfirmed receipts to every coordinator, because some were never sent."""
        for coordinator in self._links:
            self.resend_soon(coordinator)

    def _resend(self, coordinator: Address) -> None:
        self._fresh.add(coordinator)
        self._has_fresh.set()

    def disconnected(self, link: Link) -> None:
        """Forgets a link that ended. What was on its way goes to another replica."""
        links = self._links.get(link.coordinator, [])
        if link in links:
            links.remove(link)
        if links:
            self.resend_soon(link.coordinator)
        else:
            self._links.pop(link.coordinator, None)
            self._pauses.pop(link.coordinator, None)

    def acknowledged(self, link: Link, job: JobId) -> None:
        """Notes that the coordinator stored this job's receipt. The note is saved soon; if it is lost, the receipt is sent once
        more.
        """
        unsaved = self._unsaved.setdefault(link.coordinator, set())
        if len(unsaved) < MAX_UNSAVED:
            unsaved.add(job)
            self._has_unsaved.set()

    def refused(self, link: Link, job: JobId, error: TallyError) -> None:
        """Notes that the coordinator will never accept this job's receipt. The receipt stays on disk and is collected as any
        other.
        """
        log.warning("the coordinator refused a receipt; it is kept and collected on chain", job=job.hex(), reason=str(error))
        self.acknowledged(link, job)

    async def run(self) -> None:
        """Sends receipts and saves acknowledgements until cancelled."""
        await asyncio.gather(self._send_forever(), self._save_forever())

    async def save_acknowledgements(self) -> None:
        """Saves the acknowledgements that came since the last call."""
        unsaved, self._unsaved = self._unsaved, {}
        for coordinator, jobs in unsaved.items():
            try:
                await self._store.acknowledge(coordinator, jobs)
            except TallyError as error:
                log.warning("acknowledgements not saved", count=len(jobs), error=str(error))

    async def _send_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(self._pauses.values(), default=self._resend_seconds)):
                    await self._has_fresh.wait()
            self._has_fresh.clear()
            fresh, self._fresh = self._fresh | self._pauses.keys(), set()
            for coordinator, links in list(self._links.items()):
                before = int(self._now()) + 1 if coordinator in fresh else int(self._now() - self._resend_seconds)
                if links:
                    with suppress(LinkLost):
                        count = await self._send(links[0], before)
                        self._lengthen_pause(coordinator, done=not count)

    def _lengthen_pause(self, coordinator: Address, *, done: bool) -> None:
        pause = RETRY_GROWTH * self._pauses.pop(coordinator, self._resend_seconds)
        if pause < self._resend_seconds and not done:
            self._pauses[coordinator] = pause

    async def _send(self, link: Link, before: int) -> int:
        """Sends receipts made before `before`. Returns how many were not confirmed."""
        await self.save_acknowledgements()
        count = 0
        first = self._next_page.pop(link.coordinator, 0)
        for page in range(first, first + MAX_PAGES):
            entries = await self._store.unacknowledged(link.coordinator, before, page, PAGE_SIZE)
            for entry in entries:
                link.post(Kind.LATE_RECEIPT, entry.job, dumps(entry.late_receipt.to_json()))
            count += len(entries)
            if entries:
                log.info("receipts resent", count=len(entries))
                await link.drain()
            if len(entries) < PAGE_SIZE:
                return count
        self._next_page[link.coordinator] = first + MAX_PAGES
        return count

    async def _save_forever(self) -> None:
        while True:
            await self._has_unsaved.wait()
            await asyncio.sleep(_BATCH_SECONDS)
            self._has_unsaved.clear()
            await self.save_acknowledgements()
