"""Read-only queries of the ledger: jobs, receipts, evidence, excluded providers, and what is still open.

Functions of one connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam

from tallystick.client.ledger.schema import (
    IS_COLLECTABLE,
    IS_UNRESOLVED,
    THIS_JOB,
    JobState,
    OrderState,
    deployment_id,
    domain_of,
    evidence,
    order_docs,
    orders,
    receipts,
    tabs,
    workloads,
)
from tallystick.client.ledger.tabs import TAB_ID, tab_key
from tallystick.client.orders.tab import MAX_AWAITING_RECEIPTS, awaiting_receipts_reason
from tallystick.client.receipts.evidence import Evidence
from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, load_struct
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import loads


@dataclass(frozen=True, slots=True)
class KnownOrder:
    """An order in the ledger."""

    order: Signed[Order]
    terms: Terms
    digest: Hash
    state: OrderState


@dataclass(frozen=True, slots=True)
class KnownJob:
    """A job in the ledger, with its orders in the order of the shortlist, and the receipt that ended it, if it came.

    `cost`: of all its receipts, in base units, since a provider whose attempt failed may have charged too; `receipt` is then one
    that charges. Times are Unix seconds.
    """

    job: JobId
    domain: Domain
    model: str
    path: str
    state: JobState
    reason: str
    created_at: int
    finished_at: int | None
    orders: tuple[KnownOrder, ...]
    receipt: Signed[Receipt] | None
    cost: Amount


_OWN_JOBS = (
    sa.select(orders.c.job).join(workloads, workloads.c.id == orders.c.workload).where(workloads.c.payer == bindparam("of_payer"))
)
_earlier = orders.alias("earlier")
_IS_FIRST = ~sa.exists().where(_earlier.c.job == orders.c.job, _earlier.c.id < orders.c.id)
"""Whether an order is the first one of its job."""
_JOB = (
    sa.select(orders, order_docs.c.order_doc, order_docs.c.terms_doc)
    .add_columns(workloads.c.deployment_id, workloads.c.model, workloads.c.path)
    .join(order_docs, order_docs.c.id == orders.c.id)
    .join(workloads, workloads.c.id == orders.c.workload)
    .where(THIS_JOB, workloads.c.payer == bindparam("of_payer"))
    .order_by(orders.c.id)
)


def blocked(c: Connection, payer: Address, domain: Domain | None = None) -> dict[Address, str]:
    """Returns the providers that get no orders until a person unblocks them, with the reason; in one deployment or in all."""
    query = sa.select(tabs.c.provider, tabs.c.blocked_reason).where(tabs.c.payer == payer, tabs.c.blocked_reason != "")
    rows = c.execute(query if domain is None else query.where(tabs.c.deployment_id == deployment_id(domain)))
    return {Address(row.provider): row.blocked_reason for row in rows}


def excluded(c: Connection, domain: Domain, payer: Address, now: int) -> dict[Address, str]:
    """Returns the providers that get no orders now, with the reason: blocked ones, and those that owe too many receipts."""
    count = sa.func.count()
    awaiting = (
        sa.select(tabs.c.provider, count)
        .join(orders, orders.c.tab == tabs.c.id)
        .where(tabs.c.deployment_id == deployment_id(domain), tabs.c.payer == payer, orders.c.claim_by > now)
        .where(IS_COLLECTABLE, orders.c.state == OrderState.DISPATCHED.value)
        .group_by(tabs.c.provider)
        .having(count >= MAX_AWAITING_RECEIPTS)
    )
    return {Address(provider): awaiting_receipts_reason(number) for provider, number in c.execute(awaiting)} | blocked(
        c, payer, domain
    )


def jobs_awaiting_receipts(c: Connection, payer: Address, now: int, every: int, limit: int) -> list[JobId]:
    """Returns ended jobs for which the coordinator should be asked now, those that wait longest first.

    Receipts for their orders are missing, or nobody knows which providers had the orders. Each job is due `every` seconds after
    its end, then each time after an interval as long as its age. `now` is Unix seconds.
    """
    undecided = orders.c.state.in_([OrderState.DISPATCHED.value, OrderState.OPEN.value])
    due = orders.c.asked_at + sa.func.max(every, orders.c.asked_at - orders.c.created_at) <= now
    ended = orders.c.job_state.not_in([JobState.OPEN.value, JobState.LOST.value])
    waiting = _OWN_JOBS.where(IS_COLLECTABLE, undecided, orders.c.claim_by > now, ended, due).distinct()
    rows = c.execute(waiting.add_columns(orders.c.asked_at).order_by(orders.c.asked_at).limit(limit), {"of_payer": payer})
    return [JobId(row.job) for row in rows]


def record_inquiry(c: Connection, job: JobId, now: int) -> None:
    """Stores when the coordinator was last asked about a job, in Unix seconds."""
    c.execute(sa.update(orders).where(THIS_JOB).values(asked_at=now), {"of_job": bytes(job)})


_KNOWN_ORDERS = sa.select(orders.c.digest, orders.c.job).where(
    orders.c.seq.in_(bindparam("of_seqs", expanding=True)),
    orders.c.digest.in_(bindparam("of_orders", expanding=True)),
)


def known_orders(c: Connection, signed: Sequence[Verified[Order]]) -> dict[Hash, JobId]:
    """Returns the job of each of these orders, by digest; orders that the ledger lacks are left out."""
    seqs, digests = [order.message.seq for order in signed], [bytes(order.digest) for order in signed]
    rows = c.execute(_KNOWN_ORDERS, {"of_seqs": seqs, "of_orders": digests})
    return {Hash(row.digest): JobId(row.job) for row in rows}


def providers_with_tab(c: Connection, domain: Domain, payer: Address, providers: Sequence[Address]) -> set[Address]:
    """Returns those of the providers with which the payer has a tab."""
    own_tabs = (tabs.c.deployment_id == deployment_id(domain), tabs.c.payer == payer, tabs.c.provider.in_(providers))
    return {Address(row) for row in c.execute(sa.select(tabs.c.provider).where(*own_tabs)).scalars()}


def unresolved_jobs(c: Connection, payer: Address, limit: int) -> list[tuple[JobId, str]]:
    """Returns the jobs whose end is unknown, with their readers, oldest first. The clock may have been ahead for some."""
    query = _OWN_JOBS.add_columns(orders.c.reader, orders.c.created_at).where(IS_UNRESOLVED).distinct()
    rows = c.execute(query.order_by(orders.c.created_at).limit(limit), {"of_payer": payer})
    return [(JobId(row.job), row.reader) for row in rows]


def signed_receipts(c: Connection, domain: Domain, payer: Address, provider: Address) -> list[Signed[Receipt]]:
    """Returns every recorded receipt of a tab, by seq."""
    on_tab = sa.select(receipts.c.receipt_doc).where(receipts.c.tab == TAB_ID).order_by(receipts.c.seq)
    rows = c.execute(on_tab, tab_key(domain, payer, provider)).scalars()
    return [load_signed(Receipt, doc) for doc in rows]


def read_evidence(c: Connection, payer: Address, job: JobId | None = None) -> list[Evidence]:
    """Returns the evidence against providers, oldest first; of one job or of all."""
    query = sa.select(evidence).where(evidence.c.payer == payer).order_by(evidence.c.id)
    rows = c.execute(query if job is None else query.where(evidence.c.job == job.hex()))
    return [
        Evidence(
            provider=Address(row.provider),
            job=JobId(bytes.fromhex(row.job)),
            reason=row.reason,
            receipt=load_signed(Receipt, row.receipt_doc),
            order=load_signed(Order, row.order_doc),
            terms=load_struct(Terms, row.terms_doc),
            recorded_at=row.recorded_at,
            domain=domain_of(row.deployment_id),
            others=_others(row.other_doc),
        )
        for row in rows
    ]


def _others(doc: str | None) -> tuple[Signed[Receipt], ...]:
    listed = loads(doc, "others") if doc else None
    return tuple(read_signed(Receipt, item) for item in listed) if isinstance(listed, list) else ()


def latest_jobs(c: Connection, payer: Address, limit: int) -> list[KnownJob]:
    """Returns the last jobs, newest first."""
    rows = c.execute(_OWN_JOBS.where(_IS_FIRST).order_by(orders.c.id.desc()).limit(limit), {"of_payer": payer}).scalars()
    known_jobs = (find_job(c, payer, JobId(job)) for job in rows.all())
    return [known for known in known_jobs if known is not None]


def find_job(c: Connection, payer: Address, job: JobId) -> KnownJob | None:
    """Returns a job with its orders and receipt; None if the ledger does not have it."""
    listed = c.execute(_JOB, {"of_job": bytes(job), "of_payer": payer}).all()
    if not listed:
        return None
    row = listed[0]
    recorded = [entry.receipt for entry in listed if entry.state == OrderState.RECORDED.value]
    docs = c.execute(sa.select(receipts.c.receipt_doc).where(receipts.c.id.in_(recorded)).order_by(receipts.c.id)).scalars()
    signed = [load_signed(Receipt, doc) for doc in docs]
    return KnownJob(
        job=job,
        domain=domain_of(row.deployment_id),
        model=row.model,
        path=row.path,
        state=JobState(row.job_state),
        reason=row.reason,
        created_at=row.created_at,
        finished_at=row.finished_at,
        orders=tuple(_known_order(entry) for entry in listed),
        receipt=next((each for each in signed if each.message.cost), signed[-1] if signed else None),
        cost=Amount(sum(each.message.cost for each in signed)),
    )


def _known_order(row: sa.Row[tuple[object, ...]]) -> KnownOrder:
    return KnownOrder(
        load_signed(Order, row.order_doc),
        load_struct(Terms, row.terms_doc),
        Hash(row.digest),
        OrderState(row.state),
    )
