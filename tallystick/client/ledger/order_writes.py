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

from tallystick.client.ledger.schema import THIS_JOB, JobState, OrderState, deployment_id, jobs, orders, tabs, workloads
from tallystick.client.ledger.tabs import INSERT_TAB, read_stored_tabs
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


_OPEN_TAB = SqliteStatement(
    INSERT_TAB, "deployment_id payer provider accepted total total_order_seq ceiling order_seq blocked_reason"
)
_RAISE_TAB = SqliteStatement(
    sa.update(tabs)
    .where(tabs.c.id == bindparam("of_tab"))
    .values(ceiling=sa.func.max(tabs.c.ceiling, bindparam("to_ceiling")), order_seq=bindparam("to_order_seq"))
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
        state=OrderState.OPEN.value,
        **{
            name: bindparam(f"to_{name}") for name in ("job", "tab", "seq", "cap", "claim_by", "digest", "order_doc", "terms_doc")
        },
    )
)
_OPEN_JOB = sa.select(jobs.c.id).where(THIS_JOB, jobs.c.state == JobState.OPEN.value)


def sign_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, reader: str = ""
) -> list[PlacedOrder]:
    """Signs an order for each draft whose provider is not excluded (see `Tab.exclusion_reason`), and stores the orders as open.

    `reader` names the process that will read the answer; see process_locks.py.
    """
    signed = _sign(c, job, drafts, sign)
    if signed:
        row = _job_row(job, reader)
        number = _INSERT_JOB.insert(c, row)
        if not number:
            _ADD_WORKLOAD.run(c, row)
            number = _INSERT_JOB.insert(c, row)
        _store_orders(c, job, number, signed)
    return [placed for placed, _ in signed]


def sign_further_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder
) -> list[PlacedOrder]:
    """Like `sign_orders`, for a job that is stored. Signs nothing for a job that is not open any more."""
    number = c.execute(_OPEN_JOB, {"of_job": bytes(job.job)}).scalar()
    if number is None:
        return []
    signed = _sign(c, job, drafts, sign)
    _store_orders(c, job, number, signed)
    return [placed for placed, _ in signed]


def _sign(c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder) -> list[tuple[PlacedOrder, int]]:
    """Signs orders. Returns each with the row of its tab, which is 0 for a new tab."""
    stored_tabs = read_stored_tabs(c, job.domain, job.payer, [provider for provider, _ in drafts], job.created_at)
    signed: list[tuple[PlacedOrder, int]] = []
    for provider, terms in drafts:
        row, tab = stored_tabs[provider]
        if not tab.exclusion_reason:
            signed.append((sign(tab, provider, terms), row))
    return signed


def _store_orders(c: Connection, job: NewJob, number: int, signed: Sequence[tuple[PlacedOrder, int]]) -> None:
    """Stores the signed orders of a job, whose row has this number, and raises their tabs."""
    opened: dict[Address, int] = {}
    for placed, stored_row in signed:
        order = placed.order.message
        row = stored_row or opened.get(order.provider, 0)
        if row:
            _RAISE_TAB.run(c, {"of_tab": row, "to_ceiling": int(order.ceiling), "to_order_seq": order.seq})
        else:
            row = opened[order.provider] = _OPEN_TAB.insert(c, _tab_row(deployment_id(job.domain), placed))
        _INSERT_ORDER.run(c, _order_row(number, row, placed))


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


def _order_row(job: int, tab: int, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return {
        "to_job": job,
        "to_tab": tab,
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
