"""The tables of the payer's ledger, which client/migrations creates. Signed documents are stored as they were received.

What many rows would repeat is a row of its own: the parties of a tab, and the workload of a job. An order and its job are one
small row, which the end of the job changes: the rows of jobs in flight share few pages. Documents, which do not change, are
appended to tables of their own. Rows are found by what grows with time: numbers, ids of jobs, and seqs. No index is ordered by a
digest: each entry of such an index would take a page of its own to write.
"""

from __future__ import annotations

from enum import Enum

import sqlalchemy as sa

from tallystick.protocol.eip712 import Domain
from tallystick.protocol.types import Address


class OrderState(str, Enum):
    """State of an order.

    `open`: signed, and no provider is known to have it yet. `dispatched`: a provider had it, and its job ended here without a
    receipt for it. `recorded`: its receipt ended the job. `released`: its provider's receipt at no cost came. `closed`: its job
    ended, and it was never matched. `disputed`: its receipt was dishonest.
    """

    OPEN = "open"
    DISPATCHED = "dispatched"
    RECORDED = "recorded"
    RELEASED = "released"
    CLOSED = "closed"
    DISPUTED = "disputed"


COLLECTABLE = (OrderState.OPEN, OrderState.DISPATCHED, OrderState.DISPUTED)
"""States in which an order counts against its tab and against budgets until its `claim_by`."""
IS_COLLECTABLE = sa.text("orders.state IN ('open', 'dispatched', 'disputed')")
"""Whether an order is in one of these states. The condition of a partial index, verbatim."""
IS_UNRESOLVED = sa.text("orders.job_state IN ('open', 'lost')")
"""Whether the end of an order's job is unknown. The condition of a partial index, verbatim."""


class JobState(str, Enum):
    """State of a job as this client knows it. `lost`: the stream broke before its end; the coordinator will be asked."""

    OPEN = "open"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"
    DISPUTED = "disputed"


def deployment_id(domain: Domain) -> str:
    """Identifies a deployment by chain and contract; tabs of different deployments are separate."""
    return f"{domain.chain_id}:{domain.contract}"


def domain_of(text: str) -> Domain:
    """The inverse of `deployment_id`."""
    chain, _, contract = text.partition(":")
    return Domain(int(chain), Address(contract))


metadata = sa.MetaData()

tabs = sa.Table(
    "tabs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("deployment_id", sa.String(64)),
    sa.Column("payer", sa.String(42)),
    sa.Column("provider", sa.String(42)),
    sa.Column("accepted", sa.BigInteger),
    sa.Column("total", sa.BigInteger),
    sa.Column("total_order_seq", sa.BigInteger),
    sa.Column("ceiling", sa.BigInteger),
    sa.Column("order_seq", sa.BigInteger),
    sa.Column("blocked_reason", sa.Text),
    sa.Column("undelivered_quarters", sa.Integer),
    sa.Column("settled", sa.BigInteger),
    sa.Column("settled_at_unblock", sa.BigInteger),
    sa.Column("recovered", sa.BigInteger),
    sa.Column("forgotten_seq", sa.BigInteger),
)
"""`forgotten_seq`: the highest seq of an order that retention deleted; 0 if there is none."""
workloads = sa.Table(
    "workloads",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("deployment_id", sa.String(64)),
    sa.Column("payer", sa.String(42)),
    sa.Column("model", sa.Text),
    sa.Column("path", sa.Text),
    sa.Column("label", sa.String(64)),
)
spent = sa.Table(
    "spent",
    metadata,
    sa.Column("payer", sa.String(42), primary_key=True),
    sa.Column("day", sa.BigInteger, primary_key=True),
    sa.Column("label", sa.String(64), primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("requests", sa.BigInteger),
    sa.Column("failed", sa.BigInteger),
    sa.Column("cost", sa.BigInteger),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("cached_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("hits", sa.BigInteger),
    sa.Column("saved", sa.BigInteger),
    sa.Column("hedged", sa.BigInteger),
    sa.Column("hedge_cost", sa.BigInteger),
)
orders = sa.Table(
    "orders",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("job", sa.LargeBinary),
    sa.Column("workload", sa.Integer),
    sa.Column("job_state", sa.String(16)),
    sa.Column("reason", sa.Text),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("duration_ms", sa.BigInteger),
    sa.Column("cancelled", sa.Boolean),
    sa.Column("asked_at", sa.BigInteger),
    sa.Column("reader", sa.String(16)),
    sa.Column("tab", sa.Integer),
    sa.Column("seq", sa.BigInteger),
    sa.Column("cap", sa.BigInteger),
    sa.Column("claim_by", sa.BigInteger),
    sa.Column("state", sa.String(16)),
    sa.Column("digest", sa.LargeBinary),
    sa.Column("receipt", sa.Integer),
    sa.Column("delivered_doc", sa.Text),
    sa.Column("undelivered_quarters", sa.Integer),
    sa.Column("undelivered_at", sa.BigInteger),
)
"""`job` to `reader` are of the order's job, and equal in all of its orders; nearly every job has one. `job`: its id; `workload`,
`tab` and `receipt`: rows of these tables. An order has one receipt at most.
"""
order_docs = sa.Table(
    "order_docs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("commitment_key", sa.LargeBinary),
    sa.Column("order_doc", sa.LargeBinary),
    sa.Column("terms_doc", sa.LargeBinary),
)
"""`id`: that of the order."""
receipts = sa.Table(
    "receipts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tab", sa.Integer),
    sa.Column("seq", sa.BigInteger),
    sa.Column("receipt_doc", sa.LargeBinary),
    sa.Column("whole", sa.Boolean),
    sa.Column("recorded_at", sa.BigInteger),
)
"""`tab`: a row of tabs. The order of a receipt has its number."""
evidence = sa.Table(
    "evidence",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("deployment_id", sa.String(64)),
    sa.Column("payer", sa.String(42)),
    sa.Column("provider", sa.String(42)),
    sa.Column("job", sa.String(32)),
    sa.Column("reason", sa.Text),
    sa.Column("receipt_doc", sa.Text),
    sa.Column("order_doc", sa.Text),
    sa.Column("terms_doc", sa.Text),
    sa.Column("other_doc", sa.Text),
    sa.Column("delivered_doc", sa.Text),
    sa.Column("recorded_at", sa.BigInteger),
)
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("payer", sa.String(42), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64)),
    sa.Column("job", sa.String(32)),
    sa.Column("content_key", sa.LargeBinary),
    sa.Column("header", sa.LargeBinary),
    sa.Column("made_at", sa.BigInteger),
)
asks = sa.Table(
    "asks",
    metadata,
    sa.Column("deployment_id", sa.String(64), primary_key=True),
    sa.Column("provider", sa.String(42), primary_key=True),
    sa.Column("product", sa.String(64), primary_key=True),
    sa.Column("newest_doc", sa.Text),
    sa.Column("seen_at", sa.BigInteger),
)

_OF_JOB: sa.BindParameter[bytes] = sa.bindparam("of_job")
THIS_JOB = orders.c.job == _OF_JOB
"""The orders of the job whose id is the parameter `of_job`."""
THIS_ORDER = THIS_JOB & (orders.c.digest == sa.bindparam("of_order"))
"""The order of that job whose digest is the parameter `of_order`."""
