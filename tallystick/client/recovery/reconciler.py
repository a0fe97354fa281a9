"""Finding out how jobs ended whose stream this client did not read to its end: asks the coordinator and settles the ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any

import structlog

from tallystick.client.coordinator.http_client import CoordinatorClient, RemoteJob
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.schema import JobState
from tallystick.client.ledger.writes import IncomingReceipt
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.token_audit import AuditFinding
from tallystick.client.recovery.lost_state import TabRecovery
from tallystick.protocol.eip712 import Signed, Verified, read_signed
from tallystick.protocol.errors import BadReceipt, Code, Fault, PeerError, Refusal, TallyError
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import MAX_CANDIDATES

log = structlog.get_logger()
POLLS = (0.1, 0.3, 1.0, 3.0, 5.0)
"""Seconds between questions about a job that is still running."""

WATCH_SECONDS = 600.0
"""How often the chain is asked what it paid to the providers that this wallet used lately."""

Audit = Callable[[Receipt], Awaitable[AuditFinding | None]]
"""What a recount has against a receipt."""

PASSED_OVER_SECONDS = 60.0
"""How long a provider that another one stood in for is not asked about again."""

_ENDED = {State.COMPLETED: JobState.FAILED, State.CANCELLED: JobState.CANCELLED}
"""How a job is kept that ended at the coordinator without a receipt; otherwise it failed."""


class Reconciler:
    """Settles jobs in the background: those that this process abandoned, at most `limit` at a time, and every `every` seconds
    whatever the ledger has open that is not `live` here (of earlier runs, and of times when the coordinator was away).
    """

    def __init__(
        self,
        ledger: Ledger,
        coordinator: CoordinatorClient,
        *,
        now: Callable[[], int],
        live: Callable[[], Collection[JobId]],
        limit: int,
        every: int,
        recovery: TabRecovery,
    ) -> None:
        self._ledger, self._coordinator, self.recovery = ledger, coordinator, recovery
        self._now, self._live, self._limit, self._every = now, live, limit, every
        self._tasks: set[asyncio.Task[Any]] = set()
        self._awake = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._watched = float("-inf")

    async def resolve(
        self, job: JobId, arrived: Deliveries = NO_DELIVERIES, judge: Audit | None = None
    ) -> tuple[RemoteJob, Verified[Receipt] | None]:
        """Asks once. Books the receipts that the coordinator has; the orders of a job that ended without one count on if a
        provider had them. Returns the receipt that ended the job, if one did.

        `arrived`: what a reader saw of it; otherwise what the ledger kept counts. Raises Unavailable if the coordinator does not
        answer, BadReceipt for a receipt that is not booked, Refusal for an unknown job.
        """
        remote = await self._coordinator.job(job)
        known = await self._ledger.find_job(job)
        if known is None:
            return remote, None
        attempts = _attempts(remote)
        ended: Verified[Receipt] | None = None
        for receipt in _receipts(remote, attempts):
            final = receipt == remote.receipt and remote.state in TERMINAL
            try:
                verified = await self._book(known, receipt, arrived, judge, final=final)
            except PeerError as error:
                if final:
                    raise
                log.warning("a receipt of an attempt was refused", job=job.hex(), reason=str(error))
                continue
            if final:
                ended = verified
        if ended is None and remote.state in TERMINAL:
            await self._end(known, remote, attempts)
        return remote, ended

    async def _end(self, known: KnownJob, remote: RemoteJob, attempts: Sequence[dict[str, Any]]) -> None:
        """A job ended without a receipt that tells so. The orders of providers that had it count on."""
        tried = {attempt.get("provider") for attempt in attempts}
        matched = [one.digest for one in known.orders if one.order.message.provider in tried]
        unclear = not matched and remote.state is State.COMPLETED
        state = _ENDED.get(remote.state, JobState.FAILED)
        await self._ledger.end_job(known.job, state, _reason(remote), self._now(), matched=matched, keep_orders_open=unclear)

    async def _book(
        self, known: KnownJob, receipt: Signed[Receipt], arrived: Deliveries, judge: Audit | None, *, final: bool
    ) -> Verified[Receipt]:
        verified = receipt.verify(known.domain)
        ordered = next((o for o in known.orders if o.digest == verified.message.order_hash), None)
        if ordered is None:
            raise BadReceipt("receipt: of an order that this job does not have", fault=Fault.COORDINATOR)
        placed = PlacedOrder(ordered.order.verify(known.domain), ordered.terms)
        seen = arrived.get(ordered.digest)
        doubt = None if judge is None or not final else await judge(verified.message)
        rest = {order: delivered for order, delivered in arrived.items() if order != ordered.digest}
        arrival = IncomingReceipt(
            known.domain, known.job, placed, verified, seen, self._now(), audit_finding=doubt, final=final, other_deliveries=rest
        )
        complaint = await self._ledger.record_receipt(arrival)
        if complaint is not None:
            raise complaint
        return verified

    # Jobs that this process abandoned

    def abandon(self, job: JobId) -> None:
        """Cancels a job whose stream nobody reads any more, and settles it once it has ended."""
        self._begin(self._cancel_and_settle(job), "abandoned-job")

    def fetch(self, job: JobId) -> None:
        """Asks for the outstanding receipt of a job whose whole answer came."""
        self._begin(self._fetch(job), "outstanding-receipt")

    async def _fetch(self, job: JobId) -> None:
        with contextlib.suppress(TallyError):
            for pause in POLLS:
                if (await self.resolve(job))[1] is not None:
                    return
                await asyncio.sleep(pause)

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
        await self._ledger.end_job(job, JobState.LOST, reason, self._now())

    async def _settled(self, job: JobId, *, give_up: bool = False) -> bool:
        """Whether the job's end is now in the ledger. Raises Unavailable.

        A job that the coordinator does not know may still be on its way there: it is given up past its start deadline, or at
        the caller's word. Its orders count until their `claim_by`: that nobody got them is the coordinator's word alone.
        """
        try:
            remote, receipt = await self.resolve(job)
        except PeerError as error:
            log.warning("a job's receipt was refused", job=job.hex(), reason=str(error))
            return True
        except Refusal as error:
            if error.code is not Code.UNKNOWN_JOB:
                raise
            known = await self._ledger.find_job(job)
            given_up = give_up or (known is not None and all(o.order.message.deadline <= self._now() for o in known.orders))
            if given_up:
                text = "the coordinator says that it never admitted it"
                await self._ledger.end_job(job, JobState.FAILED, text, self._now(), keep_orders_open=True)
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
            for work in (self._settle_open, self._ask_outstanding, self._watch):
                try:
                    await work()
                except TallyError as error:
                    log.info("earlier jobs can't be settled yet", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._awake.wait()

    async def _settle_open(self) -> None:
        for job in await self._ledger.unresolved_jobs(self._now()):
            if job not in self._live():
                await self._settled(job)

    async def _ask_outstanding(self) -> None:
        """Jobs that ended here, while a provider that had their orders still owes a receipt."""
        for job in await self._ledger.jobs_awaiting_receipts(self._now(), self._every):
            if job in self._live():
                continue
            await self._ledger.record_inquiry(job, self._now())
            try:
                await self.resolve(job)
            except (PeerError, Refusal) as error:
                log.info("an outstanding receipt did not come", job=job.hex(), reason=str(error))

    async def _watch(self) -> None:
        """What the chain paid, against the books."""
        if asyncio.get_running_loop().time() >= self._watched + WATCH_SECONDS:
            self._watched = asyncio.get_running_loop().time()
            await self.recovery.watch(WATCH_SECONDS)

    async def close(self, seconds: float) -> None:
        """Gives abandoned jobs this long to be settled, then lets go: the next start finds them in the ledger."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        running = [*self._tasks, self._keeper] if self._keeper is not None else [*self._tasks]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _attempts(remote: RemoteJob) -> list[dict[str, Any]]:
    """A job's attempts, as far as the coordinator tells them in a form that makes sense."""
    listed = remote.raw.get("attempts")
    return [one for one in listed[:MAX_CANDIDATES] if isinstance(one, dict)] if isinstance(listed, list) else []


def _receipts(remote: RemoteJob, attempts: Sequence[dict[str, Any]]) -> list[Signed[Receipt]]:
    """The receipts of a job's attempts, each once, the one that ended it last. Raises BadMessage."""
    told = [read_signed(Receipt, one["receipt"], "attempt.receipt") for one in attempts if one.get("receipt") is not None]
    found = [one for one in told if one != remote.receipt]
    return found if remote.receipt is None else [*found, remote.receipt]


def _reason(remote: RemoteJob) -> str:
    last = attempts[-1] if (attempts := _attempts(remote)) else {}
    return str(last.get("reason") or f"ended as {remote.state.value}, without a receipt")[:500]
