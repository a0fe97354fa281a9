"""Finding out how jobs ended whose stream this client did not read to its end: asks the coordinator and settles the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from tallystick.client.books import Arrival, KnownJob
from tallystick.client.ledger import Ledger
from tallystick.client.payer import Delivered, Placed
from tallystick.client.tables import JobState
from tallystick.client.transport import Coordinator, RemoteJob
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, PeerError, TallyError
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import JobId

log = structlog.get_logger()
POLLS = (0.1, 0.3, 1.0, 3.0, 5.0)
"""Seconds between questions about a job that is still running."""

_ENDED = {State.COMPLETED: JobState.FAILED, State.CANCELLED: JobState.CANCELLED}
"""How a job is kept that ended at the coordinator without a receipt; otherwise it failed."""


class Resolver:
    """Settles jobs in the background. At most `limit` at a time: one that finds no room stays open until the next start."""

    def __init__(self, ledger: Ledger, coordinator: Coordinator, now: Callable[[], int], *, limit: int) -> None:
        self._ledger, self._coordinator, self._now, self._limit = ledger, coordinator, now, limit
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping: asyncio.Task[None] | None = None

    async def resolve(self, job: JobId, delivered: Delivered | None = None) -> tuple[RemoteJob, Verified[Receipt] | None]:
        """Asks once. Books the receipt that the coordinator has, or closes the job's orders if it ended without one.

        Raises Unavailable if the coordinator does not answer, BadReceipt for a dishonest receipt, Refusal for an unknown job.
        """
        known = await self._ledger.find(job)
        try:
            remote = await self._coordinator.job(job)
        except TallyError as error:
            if error.code is Code.UNKNOWN_JOB:
                await self._ledger.end(job, JobState.FAILED, "the coordinator never admitted it", self._now())
            raise
        if remote.receipt is not None and known is not None:
            return remote, await self._book(known, remote.receipt, delivered)
        if remote.state in TERMINAL:
            await self._ledger.end(job, _ENDED.get(remote.state, JobState.FAILED), _reason(remote), self._now())
        return remote, None

    async def _book(self, known: KnownJob, receipt: Signed[Receipt], delivered: Delivered | None) -> Verified[Receipt]:
        verified = receipt.verify(known.domain)
        ordered = next((o for o in known.orders if o.digest == verified.message.order_hash), None)
        if ordered is None:
            raise BadReceipt("receipt: of an order that this job does not have", fault=Fault.COORDINATOR)
        placed = Placed(ordered.order.verify(known.domain), ordered.terms)
        complaint = await self._ledger.book(Arrival(known.domain, known.job, placed, verified, delivered, self._now()))
        if complaint is not None:
            raise complaint
        return verified

    def abandon(self, job: JobId) -> None:
        """Cancels a job whose stream nobody reads any more, and settles it once it has ended."""
        self._spawn(self._cancel_and_settle(job))

    async def _cancel_and_settle(self, job: JobId) -> None:
        try:
            await self._coordinator.cancel(job)
            for pause in POLLS:
                remote, receipt = await self.resolve(job)
                if receipt is not None or remote.state in TERMINAL:
                    return
                await asyncio.sleep(pause)
        except PeerError as error:
            log.warning("a job's receipt was refused", job=job.hex(), reason=str(error))
            return
        except TallyError as error:
            log.info("a job's end is not known yet", job=job.hex(), reason=str(error))
        known = await self._ledger.find(job)
        if known is not None and known.state is JobState.OPEN:
            await self._ledger.end(job, JobState.LOST, "its end is not known", self._now())

    def sweep(self, before: int) -> None:
        """Settles what earlier runs left open: jobs made before that Unix time. One sweep at a time."""
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = self._spawn(self._settle_all(before))

    async def _settle_all(self, before: int) -> None:
        for job in await self._ledger.unresolved(before):
            try:
                await self.resolve(job)
            except TallyError as error:
                log.info("an earlier job's end is not known", job=job.hex(), reason=str(error))
                if error.code is Code.COORDINATOR_UNAVAILABLE:
                    return

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        if len(self._tasks) >= self._limit:
            work.close()
            return None
        task = asyncio.create_task(work, name="resolver")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self, seconds: float) -> None:
        """Gives what is under way this long to end, then drops it: the next start finds it in the ledger."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        for task in set(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _reason(remote: RemoteJob) -> str:
    attempts = remote.raw.get("attempts")
    last = attempts[-1] if isinstance(attempts, list) and attempts else {}
    reason = last.get("reason") if isinstance(last, dict) else None
    return str(reason or f"ended as {remote.state.value}, without a receipt")[:500]
