"""Writes of the orders of a job: `sign_orders` when it is placed, `sign_further_orders` while it waits.

Functions of one connection, inside one transaction that holds the file's write lock. Statements of jobs are built once at import,
because building a statement costs more than running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import JOB_ID, THIS_JOB, JobState, OrderState, deployment_id, jobs, orders, tabs, workloads
from tallystick.client.ledger.tabs import INSERT_TAB, TAB_ID, read_tabs, tab_key
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.messages import Terms
from tallystick.protocol.stored import pack_signed, pack_struct
from tallystick.protocol.types import Address, JobId
from tallystick.runtime.sqlite_statement import SqliteStatement

SignOrder = Callable[[Tab, Address, Terms], PlacedOrder]


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job about to be submitted.

    `commitment_key` opens the job's commitments, `created_at` is Unix seconds, and `label` names the job's workload.
    """

    domain: Domain
    payer: Address
    job: JobId
    model: str
    path: str
    commitment_key: bytes = field(repr=False)
    created_at: int
    label: str = ""


_RAISE_TAB = SqliteStatement(
    INSERT_TAB.on_conflict_do_update(
        index_elements=[tabs.c.deployment_id, tabs.c.payer, tabs.c.provider],
        set_={"ceiling": sa.func.max(tabs.c.ceiling, INSERT_TAB.excluded.ceiling), "order_seq": INSERT_TAB.excluded.order_seq},
    ),
    "deployment_id payer provider accepted total total_order_seq ceiling order_seq blocked_reason",
)
_WORKLOAD = ("deployment_id", "payer", "model", "path", "label")
_ADD_WORKLOAD = SqliteStatement(insert(workloads).on_conflict_do_nothing(), " ".join(_WORKLOAD))
_INSERT_JOB = SqliteStatement(
    sa.insert(jobs).from_select(
        ["job", "workload", "state", "reason", "commitment_key", "created_at", "reader"],
        sa.select(
            bindparam("to_job", type_=sa.LargeBinary),
            workloads.c.id,
            sa.literal(JobState.OPEN.value),
            sa.literal(""),
            bindparam("to_commitment_key", type_=sa.LargeBinary),
            bindparam("to_created_at", type_=sa.BigInteger),
            bindparam("to_reader", type_=sa.String),
        ).where(*(workloads.c[name] == bindparam(name) for name in _WORKLOAD)),
    )
)
_INSERT_ORDER = SqliteStatement(
    sa.insert(orders).values(
        job=JOB_ID,
        tab=TAB_ID,
        state=OrderState.OPEN.value,
        **{name: bindparam(f"to_{name}") for name in ("seq", "cap", "claim_by", "digest", "order_doc", "terms_doc")},
    )
)
_IS_OPEN = sa.select(jobs.c.job).where(THIS_JOB, jobs.c.state == JobState.OPEN.value)


def sign_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, reader: str = ""
) -> list[PlacedOrder]:
    """Signs an order for each draft whose provider is not excluded (see `Tab.exclusion_reason`), and stores the orders as open.

    `reader` names the process that will read the answer; see process_locks.py.
    """
    placed_orders = _sign(c, job, drafts, sign)
    if placed_orders:
        row = _job_row(job, reader)
        if not _INSERT_JOB.run(c, row):
            _ADD_WORKLOAD.run(c, row)
            _INSERT_JOB.run(c, row)
        _store_orders(c, job, placed_orders)
    return placed_orders


def sign_further_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder
) -> list[PlacedOrder]:
    """Like `sign_orders`, for a job that is stored. Signs nothing for a job that is not open any more."""
    if c.execute(_IS_OPEN, {"of_job": bytes(job.job)}).first() is None:
        return []
    placed_orders = _sign(c, job, drafts, sign)
    if placed_orders:
        _store_orders(c, job, placed_orders)
    return placed_orders


def _sign(c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder) -> list[PlacedOrder]:
    payer_tabs = read_tabs(c, job.domain, job.payer, [provider for provider, _ in drafts], job.created_at)
    return [
        sign(payer_tabs[provider], provider, terms) for provider, terms in drafts if not payer_tabs[provider].exclusion_reason
    ]


def _store_orders(c: Connection, job: NewJob, placed_orders: Sequence[PlacedOrder]) -> None:
    deployment = deployment_id(job.domain)
    _RAISE_TAB.run_many(c, [_tab_row(deployment, placed) for placed in placed_orders])
    _INSERT_ORDER.run_many(c, [_order_row(job, placed) for placed in placed_orders])


def _job_row(job: NewJob, reader: str) -> dict[str, object]:
    return {
        "deployment_id": deployment_id(job.domain),
        "payer": job.payer,
        "model": job.model,
        "path": job.path,
        "label": job.label,
        "to_job": bytes(job.job),
        "to_commitment_key": job.commitment_key,
        "to_created_at": job.created_at,
        "to_reader": reader,
    }


def _order_row(job: NewJob, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return tab_key(job.domain, order.payer, order.provider) | {
        "of_job": bytes(job.job),
        "to_seq": order.seq,
        "to_cap": int(placed.terms.max_cost),
        "to_claim_by": order.claim_by,
        "to_digest": bytes(placed.order.digest),
        "to_order_doc": pack_signed(placed.order),
        "to_terms_doc": pack_struct(placed.terms),
    }


def _tab_row(deployment: str, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return {
        "deployment_id": deployment,
        "payer": order.payer,
        "provider": order.provider,
        "accepted": 0,
        "total": 0,
        "total_order_seq": 0,
        "ceiling": int(order.ceiling),
        "order_seq": order.seq,
        "blocked_reason": "",
    }
