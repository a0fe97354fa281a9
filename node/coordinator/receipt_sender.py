"""The courier: sees to it that every receipt reaches its coordinator. A receipt leaves once with its job; from then on it is sent
again after every reconnection, and now and then, until the coordinator says that it is stored or will never be. It then goes
with its order, for a coordinator that was killed before it had written the job down.
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
BATCH = 256
PAGES = 16
"""Of receipts that one round sends to one coordinator: one that confirms nothing is not sent all of them every time."""
_GATHER_SECONDS = 0.1


class ReceiptSender:
    """See the module's docstring. `resend_seconds`: how long to wait for an acknowledgement before sending again."""

    def __init__(self, store: ReceiptStore, resend_seconds: float = 60.0, now: Callable[[], float] = time.time) -> None:
        self._store, self._resend, self._now = store, resend_seconds, now
        self._links: dict[Address, Link] = {}
        self._fresh: set[Address] = set()
        self._next_page: dict[Address, int] = {}
        self._unsaved: dict[Address, set[JobId]] = {}
        self._has_fresh, self._has_unsaved = asyncio.Event(), asyncio.Event()

    def connected(self, link: Link) -> None:
        """A link is up: what it has not confirmed is sent again."""
        self._links[link.coordinator] = link
        self._fresh.add(link.coordinator)
        self._has_fresh.set()

    def resend_now(self) -> None:
        """There are receipts that were never sent: what is not confirmed is sent now, on every link."""
        self._fresh |= self._links.keys()
        self._has_fresh.set()

    def disconnected(self, link: Link) -> None:
        """A link ended."""
        if self._links.get(link.coordinator) is link:
            del self._links[link.coordinator]

    def acknowledged(self, link: Link, job: JobId) -> None:
        """The coordinator has stored this job's receipt. Written down soon; if that is lost, it is sent once more."""
        self._unsaved.setdefault(link.coordinator, set()).add(job)
        self._has_unsaved.set()

    def refused(self, link: Link, job: JobId, why: TallyError) -> None:
        """The coordinator will never take this job's receipt. It stays on disk, and is collected like any other."""
        log.warning("receipt refused; it is kept, and collected on chain", job=job.hex(), reason=str(why))
        self.acknowledged(link, job)

    async def run(self) -> None:
        """Sends and writes down until cancelled."""
        await asyncio.gather(self._send_forever(), self._save_forever())

    async def save_acknowledgements(self) -> None:
        """Writes down what was acknowledged."""
        noted, self._unsaved = self._unsaved, {}
        for coordinator, jobs in noted.items():
            try:
                await self._store.acknowledge(coordinator, jobs)
            except TallyError as error:
                log.warning("acknowledgements not written down", count=len(jobs), error=str(error))

    async def _send_forever(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._resend):
                    await self._has_fresh.wait()
            self._has_fresh.clear()
            fresh, self._fresh = self._fresh, set()
            for coordinator, link in list(self._links.items()):
                before = int(self._now()) + 1 if coordinator in fresh else int(self._now() - self._resend)
                with suppress(LinkLost):
                    await self._send(link, before)

    async def _send(self, link: Link, before: int) -> None:
        await self.save_acknowledgements()
        first = self._next_page.pop(link.coordinator, 0)
        for page in range(first, first + PAGES):
            entries = await self._store.unacknowledged(link.coordinator, before, page, BATCH)
            for entry in entries:
                link.post(Kind.LATE_RECEIPT, entry.job, dumps(entry.late_receipt.to_json()))
            if entries:
                log.info("receipts sent again", count=len(entries))
                await link.drain()
            if len(entries) < BATCH:
                return
        self._next_page[link.coordinator] = first + PAGES

    async def _save_forever(self) -> None:
        while True:
            await self._has_unsaved.wait()
            await asyncio.sleep(_GATHER_SECONDS)
            self._has_unsaved.clear()
            await self.save_acknowledgements()
