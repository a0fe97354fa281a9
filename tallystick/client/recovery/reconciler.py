"""Reconciles the ledger with the coordinator: finds out how the jobs ended whose streams this client did not read to the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any

import structlog

from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.info import RemoteJob
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.open_orders import NO_DELIVERIES, Deliveries
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import COLLECTABLE, JobState, OrderState
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.token_audit import AuditFinding
from tallystick.client.recovery.lost_state import TabRecovery
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.eip712 import Signed, Verified, read_signed
from tallystick.protocol.errors import BadReceipt, Code, Fault, PeerError, Refusal, TallyError
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Address, JobId

log = structlog.get_logger()
POLLS = (0.1, 0.3, 1.0, 3.0, 5.0)
"""Seconds between queries about a job that is still running."""

REPLICA_POLLS = (0.05, 0.1, *[0.2] * 10, *[0.4] * 40)
"""Seconds between queries about a job whose replica was lost: until another one ended it, and knows what its nodes did."""
BRIEF_POLLS = 12
"""The first of them, which take two seconds."""

MAX_BATCHES = 200
"""Batches of old jobs that one round deletes: more than a gateway adds meanwhile."""
CHECK_PAYMENTS_SECONDS = 600.0
"""Seconds between queries to the chain about payments to recently used providers."""

FAILED_PROVIDER_SECONDS = 60.0
"""Shortest time between two queries about a provider that did not take a job."""

MAX_REASON = 500
"""Characters of the coordinator's reason that are stored."""

Audit = Callable[[Receipt], Awaitable[AuditFinding | None]]
"""Returns the token audit's objection to a receipt, if any."""

_STATE_WITHOUT_RECEIPT = {State.COMPLETED: JobState.FAILED, State.CANCELLED: JobState.CANCELLED}
"""The ledger's state of a job that ended at the coordinator without a receipt; FAILED if it is not listed."""


class Reconciler:
    """Settles jobs in the background.

    It settles jobs that this process abandoned, at most `limit` at a time. Every `every` seconds it also settles all open jobs of
    the ledger that are not `live` in this process: jobs of earlier runs, or from a time when the coordinator was unreachable.
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
        keep: int,
        recovery: TabRecovery,
    ) -> None:
        """`keep`: seconds for which the ledger keeps ended jobs."""
        self._ledger, self._coordinator, self.recovery = ledger, coordinator, recovery
        self._now, self._live, self._limit, self._every, self._keep = now, live, limit, every, keep
        self._tasks: set[asyncio.Task[Any]] = set()
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._payments_checked_at = float("-inf")

    async def reconcile(
        self, job: JobId, deliveries: Deliveries = NO_DELIVERIES, audit: Audit | None = None
    ) -> tuple[RemoteJob, Verified[Receipt] | None]:
        """Queries a job once and records the receipts that the coordinator has.

        If the job ended without a receipt, its orders count on if a provider had them. Returns the coordinator's view of the job
        and the receipt that ended it, if one did. `deliveries`: what a reader saw of the job; otherwise what the ledger stored
        counts. Raises Unavailable if the coordinator does not answer, BadReceipt for a receipt that is not recorded, and Refusal
        for an unknown job.
        """
        remote = await self._coordinator.job(job)
        known = await self._ledger.find_job(job)
        if known is None:
            return remote, None
        attempts = _attempts(remote)
        final_receipt: Verified[Receipt] | None = None
        for receipt in _receipts(remote, attempts):
            final = receipt == remote.receipt and remote.state in TERMINAL
            try:
                verified = await self._record(known, receipt, deliveries, audit, final=final)
            except PeerError as error:
                if final:
                    raise
                log.warning("refused the receipt of an attempt", job=job.hex(), reason=str(error))
                continue
            if final:
                final_receipt = verified
        if final_receipt is None and remote.state in TERMINAL:
            await self._end_without_receipt(known, remote, attempts)
        return remote, final_receipt

    async def _end_without_receipt(self, known: KnownJob, remote: RemoteJob, attempts: Sequence[dict[str, Any]]) -> None:
        """Ends a job that has no final receipt. The orders of providers that had the job count on."""
        tried = {attempt.get("provider") for attempt in attempts}
        matched = [order.digest for order in known.orders if order.order.message.provider in tried]
        provider_unknown = not matched and remote.state is State.COMPLETED
        state = _STATE_WITHOUT_RECEIPT.get(remote.state, JobState.FAILED)
        await self._ledger.end_job(
            known.job, state, _reason(remote), self._now(), matched=matched, keep_orders_open=provider_unknown
        )

    async def _record(
        self, known: KnownJob, receipt: Signed[Receipt], deliveries: Deliveries, audit: Audit | None, *, final: bool
    ) -> Verified[Receipt]:
        verified = receipt.verify(known.domain)
        order = next((order for order in known.orders if order.digest == verified.message.order_hash), None)
        if order is None:
            raise BadReceipt(
                f"receipt.orderHash: expected an order of job {known.job.hex()}, got 0x{verified.message.order_hash.hex()}",
                fault=Fault.COORDINATOR,
            )
        placed = PlacedOrder(order.order.verify(known.domain), order.terms)
        finding = None if audit is None or not final else await audit(verified.message)
        incoming = IncomingReceipt(
            known.domain,
            known.job,
            placed,
            verified,
            deliveries.get(order.digest),
            self._now(),
            audit_finding=finding,
            final=final,
            other_deliveries={digest: delivery for digest, delivery in deliveries.items() if digest != order.digest},
        )
        error = await self._ledger.record_receipt(incoming)
        if error is not None:
            raise error
        return verified

    async def end_lost(self, job: JobId) -> None:
        """Cancels a job whose replica was lost: another replica ends it at once if the former one is gone."""
        with contextlib.suppress(TallyError):
            await self._coordinator.cancel(job)

    async def await_free_end(self, job: JobId, remote: RemoteJob | None, *, brief: bool = False, cancels: bool = True) -> bool:
        """Waits for the end of a job whose replica was lost, after which the request may be submitted anew.

        `remote`: what `reconcile` has just returned; None if it raised. Returns whether the job ended and can cost nothing any
        more: the ledger has receipts at no cost for all orders that a provider had. Returns False if that does not become known
        in time. `brief`: the caller waits for nothing but the word whether it may send the request again. `cancels`: a job that
        goes on may be cancelled, which ends it sooner.
        """
        for pause in REPLICA_POLLS[:BRIEF_POLLS] if brief else REPLICA_POLLS:
            is_over = remote is not None and remote.state in TERMINAL
            if remote is not None and is_over and await self._is_free(job, remote):
                return True
            if remote is not None and remote.receipt is not None and remote.receipt.message.cost:
                return False  # it is charged, or its receipt is disputed
            await asyncio.sleep(pause)
            if not is_over and cancels:  # the database may not have noticed yet that the replica is gone
                await self.end_lost(job)
            with contextlib.suppress(TallyError):
                remote, _ = await self.reconcile(job)
        return False

    async def costs_nothing(self, job: JobId) -> bool:
        """Whether no order of a job can be collected any more, nor was."""
        known = await self._ledger.find_job(job)
        return known is not None and not known.cost and all(order.state not in COLLECTABLE for order in known.orders)

    async def _is_free(self, job: JobId, remote: RemoteJob) -> bool:
        """Whether no order that a provider had may cost anything, after `reconcile` of a job that has ended."""
        tried, known = {attempt.get("provider") for attempt in _attempts(remote)}, await self._ledger.find_job(job)
        if known is None or known.cost:
            return False
        free = {OrderState.RELEASED, OrderState.CLOSED, OrderState.RECORDED}
        return all(order.state in free for order in known.orders if order.order.message.provider in tried)

    # Jobs that this process abandoned

    def abandon(self, job: JobId) -> None:
        """Cancels a job whose stream is no longer read, and settles it once it has ended."""
        self._begin(self._cancel_and_settle(job), "abandoned-job")

    def fetch_receipt(self, job: JobId) -> None:
        """Fetches the missing receipt of a job whose whole answer arrived."""
        self._begin(self._fetch_receipt(job), "missing-receipt")

    async def _fetch_receipt(self, job: JobId) -> None:
        with contextlib.suppress(TallyError):
            for pause in POLLS:
                if (await self.reconcile(job))[1] is not None:
                    return
                await asyncio.sleep(pause)

    def fetch_void(self, job: JobId) -> None:
        """Fetches the receipt at no cost of an attempt that another one outran, whose order counts until then."""
        self._begin(self._fetch_void(job), "void-receipt")

    async def _fetch_void(self, job: JobId) -> None:
        with contextlib.suppress(TallyError):
            for pause in POLLS:
                await asyncio.sleep(pause)
                remote, _ = await self.reconcile(job)
                if all(attempt.get("receipt") for attempt in _attempts(remote)):
                    return

    def _begin(self, work: Coroutine[Any, Any, object], name: str) -> None:
        if len(self._tasks) >= self._limit:
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def recover_tabs(self, providers: Sequence[Address]) -> None:
        """Recovers the tabs of providers that did not take a job, perhaps because the ledger lacks a part of their tabs."""
        self._begin(self.recovery.recover(providers, chain=True, interval=FAILED_PROVIDER_SECONDS), "recover-tabs")

    async def _cancel_and_settle(self, job: JobId) -> None:
        reason = "its end is unknown"
        try:
            await self._coordinator.cancel(job)
            for pause in POLLS:
                if await self._settle(job):
                    return
                await asyncio.sleep(pause)
            if await self._settle(job, give_up=True):
                return
        except TallyError as error:
            reason = str(error)
        await self._ledger.end_job(job, JobState.LOST, reason, self._now())

    async def _settle(self, job: JobId, *, give_up: bool = False) -> bool:
        """Reconciles a job. Returns whether its end is in the ledger now. Raises Unavailable.

        A job that the coordinator does not know may still be on its way there. It is given up after its start deadline, or if
        `give_up` is set. Its orders count until their `claim_by`, because only the coordinator says that no provider got them.
        """
        try:
            remote, receipt = await self.reconcile(job)
        except PeerError as error:
            log.warning("refused the receipt of a job", job=job.hex(), reason=str(error))
            return True
        except Refusal as error:
            if error.code is not Code.UNKNOWN_JOB:
                raise
            known = await self._ledger.find_job(job)
            given_up = give_up or (
                known is not None and all(order.order.message.deadline <= self._now() for order in known.orders)
            )
            if given_up:
                text = "the coordinator says that it never admitted the job"
                await self._ledger.end_job(job, JobState.FAILED, text, self._now(), keep_orders_open=True)
            return given_up
        return receipt is not None or remote.state in TERMINAL

    # All open jobs of the ledger

    def start(self) -> None:
        """Starts settling the ledger's open jobs in the background, unless that has started."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._run(), name="reconciler")

    def wake(self) -> None:
        """Starts the next round now."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            for work in (self._settle_open, self._query_missing_receipts, self._check_payments, self._forget_old):
                try:
                    await work()
                except TallyError as error:
                    log.info("earlier jobs not settled for now", reason=str(error))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._wake.wait()

    async def _settle_open(self) -> None:
        for job in await self._ledger.unresolved_jobs():
            if job not in self._live():
                await self._settle(job)

    async def _query_missing_receipts(self) -> None:
        """Queries jobs that ended here while a provider with one of their orders still owes a receipt."""
        for job in await self._ledger.jobs_awaiting_receipts(self._now(), self._every):
            if job in self._live():
                continue
            await self._ledger.record_inquiry(job, self._now())
            try:
                await self.reconcile(job)
            except (PeerError, Refusal) as error:
                log.info("a missing receipt did not come", job=job.hex(), reason=str(error))

    async def _check_payments(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._payments_checked_at + CHECK_PAYMENTS_SECONDS:
            self._payments_checked_at = now
            await self.recovery.check_payments(CHECK_PAYMENTS_SECONDS)
            if (escrow := self.recovery.escrow) is not None:
                domain = (await self.recovery.info()).domain
                await escrow.warn_leaving(await self._ledger.accounts(domain, self._now()))

    async def _forget_old(self) -> None:
        """Deletes old jobs from the ledger, with a transaction for each batch, so that running jobs need not wait."""
        for _ in range(MAX_BATCHES):
            if not await self._ledger.forget_jobs(self._now(), self._keep):
                return

    async def close(self, seconds: float) -> None:
        """Waits up to `seconds` for abandoned jobs, then stops. The next start finds the remaining jobs in the ledger."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=seconds)
        running = [*self._tasks, self._loop_task] if self._loop_task is not None else [*self._tasks]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _attempts(remote: RemoteJob) -> list[dict[str, Any]]:
    """The well-formed attempts of a job as the coordinator lists them."""
    listed = remote.raw.get("attempts")
    return [attempt for attempt in listed[:MAX_CANDIDATES] if isinstance(attempt, dict)] if isinstance(listed, list) else []


def _receipts(remote: RemoteJob, attempts: Sequence[dict[str, Any]]) -> list[Signed[Receipt]]:
    """The receipts of a job's attempts, each once; the one that ended the job comes last. Raises BadMessage."""
    receipts = [
        read_signed(Receipt, attempt["receipt"], "attempt.receipt") for attempt in attempts if attempt.get("receipt") is not None
    ]
    others = [receipt for receipt in receipts if receipt != remote.receipt]
    return others if remote.receipt is None else [*others, remote.receipt]


def _reason(remote: RemoteJob) -> str:
    attempts = _attempts(remote)
    last = attempts[-1] if attempts else {}
    return str(last.get("reason") or f"ended as {remote.state.value}, without a receipt")[:MAX_REASON]
