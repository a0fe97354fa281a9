"""Writes of the orders of a job: `sign_orders` when it is placed, `sign_further_orders` while it waits.

Functions of one connection, inside one transaction that holds the file's write lock. Statements of jobs are built once at import,
because building a statement costs more than running it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy import Connection, bindparam
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.ledger.schema import THIS_JOB, JobState, OrderState, deployment_id, order_docs, orders, tabs, workloads
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
_OF_ORDER = ("job", "created_at", "cancelled", "reader", "tab", "seq", "cap", "claim_by", "digest")
_INSERT_ORDER = SqliteStatement(
    sa.insert(orders).from_select(
        ["workload", "job_state", "reason", "state", *_OF_ORDER],
        sa.select(
            workloads.c.id,
            sa.literal(JobState.OPEN.value),
            sa.literal(""),
            sa.literal(OrderState.OPEN.value),
            *(bindparam(f"to_{name}", type_=orders.c[name].type) for name in _OF_ORDER),
        ).where(*(workloads.c[name] == bindparam(name) for name in _WORKLOAD)),
    )
)
_INSERT_DOCS = SqliteStatement(sa.insert(order_docs), "id commitment_key order_doc terms_doc")
_OPEN_JOB = SqliteStatement(
    sa.select(orders.c.created_at, orders.c.reader, orders.c.cancelled)
    .where(THIS_JOB, orders.c.job_state == JobState.OPEN.value)
    .limit(1)
)


def sign_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder, reader: str = ""
) -> list[PlacedOrder]:
    """Signs an order for each draft whose provider is not excluded (see `Tab.exclusion_reason`), and stores the orders as open.

    `reader` names the process that will read the answer; see process_locks.py.
    """
    signed = _sign(c, job, drafts, sign)
    _store_orders(c, job, signed, reader)
    return [placed for placed, _ in signed]


def sign_further_orders(
    c: Connection, job: NewJob, drafts: Sequence[tuple[Address, Terms]], sign: SignOrder
) -> list[PlacedOrder]:
    """Like `sign_orders`, for a job that is stored. Signs nothing for a job that is not open any more.

    `job.created_at` is the time of these orders: the job itself began before.
    """
    stored = _OPEN_JOB.first(c, {"of_job": bytes(job.job)})
    if stored is None:
        return []
    signed = _sign(c, job, drafts, sign)
    _store_orders(c, replace(job, created_at=stored.created_at), signed, stored.reader, cancelled=bool(stored.cancelled))
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


def _store_orders(
    c: Connection, job: NewJob, signed: Sequence[tuple[PlacedOrder, int]], reader: str, *, cancelled: bool = False
) -> None:
    """Stores the signed orders of a job and raises their tabs."""
    of_job = _job_columns(job, reader, cancelled=cancelled)
    opened: dict[Address, int] = {}
    for placed, stored_row in signed:
        order = placed.order.message
        tab = stored_row or opened.get(order.provider, 0)
        if tab:
            _RAISE_TAB.run(c, {"of_tab": tab, "to_ceiling": int(order.ceiling), "to_order_seq": order.seq})
        else:
            tab = opened[order.provider] = _OPEN_TAB.insert(c, _tab_row(deployment_id(job.domain), placed))
        row = of_job | _order_columns(tab, placed)
        number = _INSERT_ORDER.insert(c, row)
        if not number:
            _ADD_WORKLOAD.run(c, row)
            number = _INSERT_ORDER.insert(c, row)
        docs = {"order_doc": pack_signed(placed.order), "terms_doc": pack_struct(placed.terms)}
        _INSERT_DOCS.run(c, docs | {"id": number, "commitment_key": job.commitment_key})


def _job_columns(job: NewJob, reader: str, *, cancelled: bool) -> dict[str, object]:
    return {
        "deployment_id": deployment_id(job.domain),
        "payer": job.payer,
        "model": job.model,
        "path": job.path,
        "label": job.label,
        "to_job": bytes(job.job),
        "to_created_at": job.created_at,
        "to_reader": reader,
        "to_cancelled": cancelled,
    }


def _order_columns(tab: int, placed: PlacedOrder) -> dict[str, object]:
    order = placed.order.message
    return {
        "to_tab": tab,
        "to_seq": order.seq,
        "to_cap": int(placed.terms.max_cost),
        "to_claim_by": order.claim_by,
        "to_digest": bytes(placed.order.digest),
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
