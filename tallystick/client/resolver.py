"""Finding out how jobs ended whose stream this client did not read to its end: asks the coordinator and settles the ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

import structlog

from tallystick.client.books import Arrival
from tallystick.client.ledger import Ledger
from tallystick.client.lookups import KnownJob
from tallystick.client.payer import Delivered, Placed
from tallystick.client.recover import Recovery
from tallystick.client.tables import JobState
from tallystick.client.transport import Coordinator, RemoteJob
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, PeerError, Refusal, TallyError
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, JobId

log = structlog.get_logger()
POLLS = (0.1, 0.3, 1.0, 3.0, 5.0)
"""Seconds between questions about a job that is still running."""

PASSED_OVER_SECONDS = 60.0
"""How long a provider that another one stood in for is not asked about again."""

_ENDED = {State.COMPLETED: JobState.FAILED, State.CANCELLED: JobState.CANCELLED}
"""How a job is kept that ended at the coordinator without a receipt; otherwise it failed."""


class Resolver:
    """Settles jobs in the background: those that this process abandoned, at most `limit` at a time, and every `every` seconds
    whatever the ledger has open that is not `live` here (of earlier runs, and of times when the coordinator was away).
    """

    def __init__(
        self,
        ledger: Ledger,
        coordinator: Coordinator,
        *,
        now: Callable[[], int],
        live: Callable[[], Collection[JobId]],
        limit: int,
        every: int,
        recovery: Recovery,
    ) -> None:
        self._ledger, self._coordinator, self.recovery = ledger, coordinator, recovery
        self._now, self._live, self._limit, self._every = now, live, limit, every
        self._tasks: set[asyncio.Task[Any]] = set()
        self._awake = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def resolve(self, job: JobId, delivered: Delivered | None = None) -> tuple[RemoteJob, Verified[Receipt] | None]:
        """Asks once. Books the receipt that the coordinator has, or closes the job's orders if it ended without one.

        Raises Unavailable if the coordinator does not answer, BadReceipt for a dishonest receipt, Refusal for an unknown job.
        """
        remote = await self._coordinator.job(job)
        known = await self._ledger.find(job)
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

    # Jobs that this process abandoned

    def abandon(self, job: JobId) -> None:
        """Cancels a job whose stream nobody reads any more, and settles it once it has ended."""
        self._begin(self._cancel_and_settle(job), "abandoned-job")

    def _begin(self, work: Coroutine[Any, Any, object], name: str) -> None:
        if len(self._tasks) >= self._limit:
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def look_into(self, providers: Sequence[Address]) -> None:
        """Finds out, once in a while, whether providers did not take a job because these books lack a part of their tabs."""
        self._begin(self.recovery.look(providers, chain=True, again=PASSED_OVER_SECONDS), "look-into")

    async def _cancel_and_settle(self, job: JobId) -> None:
        reason = "its end is not known"
        try:
            await self._coordinator.cancel(job)
            for pause in POLLS:
                if await self._settled(job):
                    return
                await asyncio.sleep(pause)
            if await self._settled(job, give_up=True):
                return
        except TallyError as error:
            reason = str(error)
        await self._ledger.end(job, JobState.LOST, reason, self._now())

    async def _settled(self, job: JobId, *, give_up: bool = False) -> bool:
        """Whether the job's end is now in the ledger. Raises Unavailable.

        A job that the coordinator does not know may still be on its way there: it is given up past its start deadline, or at
        the caller's word.
        """
        try:
            remote, receipt = await self.resolve(job)
        except PeerError as error:
            log.warning("a job's receipt was refused", job=job.hex(), reason=str(error))
            return True
        except Refusal as error:
            if error.code is not Code.UNKNOWN_JOB:
                raise
            known = await self._ledger.find(job)
            given_up = give_up or (known is not None and all(o.order.message.deadline <= self._now() for o in known.orders))
            if given_up:
                await self._ledger.end(job, JobState.FAILED, "the coordinator never admitted it", self._now())
            return given_up
        return receipt is not None or remote.state in TERMINAL

    # Whatever is open

    def keep(self) -> None:
        """Begins to look after what the ledger has open, if it has not begun."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name="resolver")

    def wake(self) -> None:
        """Looks now."""
        self._awake.set()

    async def _keep(self) -> None:
        while True:
            self._awake.clear()
            try:
                await self._settle_open()
            except TallyError as error:
                log.info("earlier jobs can't be settled yet", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._awake.wait()

    async def _settle_open(self) -> None:
        for job in await self._ledger.unresolved(self._now()):
            if job not in self._live():
                await self._settled(job)

    async def close(self, seconds: float) -> None:
        """Gives abandoned jobs this long to be settled, then lets go: the next start finds them in the ledger."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        running = [*self._tasks, self._keeper] if self._keeper is not None else [*self._tasks]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _reason(remote: RemoteJob) -> str:
    attempts = remote.raw.get("attempts")
    last = attempts[-1] if isinstance(attempts, list) and attempts else {}
    reason = last.get("reason") if isinstance(last, dict) else None
    return str(reason or f"ended as {remote.state.value}, without a receipt")[:500]
