"""A job as the API shows it to its payer, and to the providers of its attempts."""

from __future__ import annotations

from typing import Any

from coordinator.domain.refusal_log import RefusedJob
from coordinator.jobs.accounts import AccountTab
from coordinator.jobs.live_job import LiveJob
from coordinator.ports import ClaimStore, KnownJob
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Address


def job_view(known: KnownJob, only: Address | None = None) -> dict[str, Any]:
    """Returns the JSON of a job. `only`: the provider whose attempt is shown; None shows all."""
    record = known.record
    attempts = []
    for number, attempt in enumerate(record.attempts):
        if only not in {None, attempt.provider}:
            continue
        receipt = known.receipts.get(attempt.provider)
        entry = {"attempt": number, "provider": attempt.provider, "state": attempt.state.value, "reason": attempt.reason}
        flags = {"hedged": attempt.hedged, "outrun": attempt.outrun}
        attempts.append(entry | flags | {"receipt": receipt.to_json() if receipt else None})
    shown = known.receipts.get(only or record.last.provider)
    return {
        "job": record.job.hex(),
        "state": record.state.value,
        "model": record.last.terms.model,
        "payer": record.payer,
        "createdAt": record.created_at,
        "finishedAt": record.finished_at,
        "attempts": attempts,
        "receipt": shown.to_json() if shown else None,
    }


def queued_view(known: KnownJob | None, job: LiveJob, place: QueuePlace | None) -> dict[str, Any]:
    """Returns the JSON of a job that no provider has now. `known`: the job as it is stored, if a provider had it before."""
    view: dict[str, Any] = {
        "job": job.id.hex(),
        "model": job.model,
        "payer": job.payer,
        "createdAt": job.created_at,
        "finishedAt": None,
        "attempts": [] if known is None else job_view(known)["attempts"],
    }
    queue = None if place is None else place.to_json()
    return view | {"state": State.QUEUED.value, "receipt": None, "settlement": None, "queue": queue}


async def settlement_view(claims: ClaimStore, receipt: Signed[Receipt] | None) -> dict[str, Any] | None:
    """Returns the settlement on chain that paid a receipt, or None."""
    if receipt is None:
        return None
    settled = await claims.settlement(receipt.message.payer, receipt.message.provider)
    if settled is None or settled.settled < receipt.message.cumulative_cost:
        return None
    return {"tx": settled.tx, "settled": str(int(settled.settled)), "block": settled.block}


def live_view(job: LiveJob) -> dict[str, Any]:
    """Returns the JSON of a job that has not ended, for the list of its payer's jobs."""
    provider = None if job.attempt is None else job.provider
    entry = {"job": job.id.hex(), "model": job.model, "state": job.state.value, "createdAt": job.created_at}
    return entry | {"attempts": len(job.attempts), "provider": provider}


def tab_view(tab: AccountTab) -> dict[str, Any]:
    """Returns the JSON of a tab; `unsettled` is what the chain has not paid yet."""
    amounts = {"total": tab.total, "settled": tab.settled, "unsettled": max(0, tab.total - tab.settled)}
    shown = {name: str(int(amount)) for name, amount in amounts.items()}
    return {"payer": tab.payer, "provider": tab.provider} | shown | {"tx": tab.tx or None, "block": tab.block}


def refusal_view(refused: RefusedJob) -> dict[str, Any]:
    """Returns the JSON of a job that came to nothing."""
    return {"at": refused.at, "job": refused.job.hex(), "model": refused.model, "code": refused.code, "reason": refused.text}
