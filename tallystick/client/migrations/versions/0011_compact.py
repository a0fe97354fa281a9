"""Rows get a third of their size: binary documents and digests, and numbers of tabs and workloads instead of addresses and names.

Revision ID: 0011
"""

import base64
import re
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"

_ZEROS = re.compile(rb"\0{1,255}")
_RUN = re.compile(rb"\0(.)", re.DOTALL)


_TAB = """deployment_id, payer, provider, accepted, total, total_order_seq, ceiling, order_seq, blocked_reason,
    undelivered_quarters, settled, settled_at_unblock, recovered"""
_NEW_TAB = "deployment_id, payer, provider, accepted, total, total_order_seq, ceiling, order_seq, blocked_reason"
UPGRADE = f"""
INSERT INTO tabs ({_TAB}) SELECT {_TAB} FROM old_tabs ORDER BY rowid;
INSERT INTO tabs ({_NEW_TAB})
    SELECT deployment_id, payer, provider, 0, 0, 0, max(ceiling), max(seq), '' FROM old_orders WHERE true GROUP BY 1, 2, 3
    ON CONFLICT DO NOTHING;
INSERT INTO tabs ({_NEW_TAB})
    SELECT DISTINCT deployment_id, payer, provider, 0, 0, 0, 0, 0, '' FROM old_receipts WHERE true ON CONFLICT DO NOTHING;
INSERT INTO workloads (deployment_id, payer, model, path, label)
    SELECT DISTINCT deployment_id, payer, model, path, label FROM old_jobs;
INSERT INTO jobs (job, workload, state, reason, commitment_key, created_at, finished_at, duration_ms, cancelled, asked_at, reader)
    SELECT unhexed(j.job), w.id, j.state, j.reason, j.commitment_key, j.created_at, j.finished_at, j.duration_ms, j.cancelled,
        j.asked_at, j.reader
    FROM old_jobs j CROSS JOIN workloads w ON w.deployment_id = j.deployment_id AND w.payer = j.payer AND w.model = j.model
        AND w.path = j.path AND w.label = j.label
    ORDER BY j.rowid;
INSERT INTO orders (id, job, tab, seq, cap, claim_by, state, digest, order_doc, terms_doc, delivered_doc, undelivered_quarters,
        undelivered_at)
    SELECT o.id, j.id, t.id, o.seq, o.cap, o.claim_by, o.state, unhexed(o.digest), packed(o.order_doc), packed(o.terms_doc),
        o.delivered_doc, o.undelivered_quarters, o.undelivered_at
    FROM old_orders o CROSS JOIN jobs j ON j.job = unhexed(o.job)
        CROSS JOIN tabs t ON t.deployment_id = o.deployment_id AND t.payer = o.payer AND t.provider = o.provider
    ORDER BY o.id;
INSERT INTO receipts (id, order_id, tab, seq, receipt_doc, whole, recorded_at)
    SELECT r.id,
        (SELECT o.id FROM orders o WHERE o.digest = unhexed(r.order_digest)
            AND o.job = (SELECT j.id FROM jobs j WHERE j.job = unhexed(r.job))),
        t.id, r.seq, packed(r.receipt_doc), r.whole, r.recorded_at
    FROM old_receipts r
        CROSS JOIN tabs t ON t.deployment_id = r.deployment_id AND t.payer = r.payer AND t.provider = r.provider
    ORDER BY r.id
"""  # noqa: S608 - columns from above
DOWNGRADE = f"""
INSERT INTO tabs ({_TAB}) SELECT {_TAB} FROM new_tabs ORDER BY id;
INSERT INTO jobs (job, deployment_id, payer, model, path, label, state, reason, commitment_key, created_at, finished_at,
        duration_ms, cancelled, asked_at, reader)
    SELECT hexed(j.job), w.deployment_id, w.payer, w.model, w.path, w.label, j.state, j.reason, j.commitment_key, j.created_at,
        j.finished_at, j.duration_ms, j.cancelled, j.asked_at, j.reader
    FROM new_jobs j CROSS JOIN workloads w ON w.id = j.workload
    ORDER BY j.id;
INSERT INTO orders (id, job, deployment_id, payer, provider, seq, cap, ceiling, claim_by, state, digest, order_doc, terms_doc,
        delivered_doc, undelivered_quarters, undelivered_at)
    SELECT o.id, hexed(j.job), t.deployment_id, t.payer, t.provider, o.seq, o.cap, t.ceiling, o.claim_by, o.state,
        hexed(o.digest), unpacked(o.order_doc), unpacked(o.terms_doc), o.delivered_doc, o.undelivered_quarters, o.undelivered_at
    FROM new_orders o CROSS JOIN new_jobs j ON j.id = o.job CROSS JOIN new_tabs t ON t.id = o.tab
    ORDER BY o.id;
INSERT INTO receipts (id, job, deployment_id, payer, provider, seq, order_digest, digest, receipt_doc, whole, recorded_at)
    SELECT r.id, o.job, t.deployment_id, t.payer, t.provider, r.seq, o.digest,
        digest_of(t.deployment_id, unpacked(r.receipt_doc)), unpacked(r.receipt_doc), r.whole, r.recorded_at
    FROM new_receipts r CROSS JOIN orders o ON o.id = r.order_id CROSS JOIN new_tabs t ON t.id = r.tab
    ORDER BY r.id
"""  # noqa: S608 - columns from above


def _run(statements: str) -> None:
    for statement in statements.split(";"):
        op.execute(statement)


def _packed(document: str) -> bytes | str:
    """A document of base64 as bytes, with each run of zeros as a zero and its length. JSON of release 0.1 stays text."""
    if document.startswith("{"):
        return document
    return _ZEROS.sub(lambda run: bytes((0, len(run[0]))), base64.b64decode(document))


def _unpacked(document: bytes | str) -> str:
    if isinstance(document, str):
        return document
    return base64.b64encode(_RUN.sub(lambda run: bytes(run[1][0]), document)).decode()


def _define(**functions: Callable[[Any], Any]) -> None:
    """Gives SQL functions of one argument to this connection."""
    driver: Any = op.get_bind().connection.dbapi_connection
    for name, function in functions.items():
        driver.create_function(name, 1, function, deterministic=True)


def _integers(*names: str, default: str | None = None) -> list[sa.Column[Any]]:
    return [sa.Column(name, sa.BigInteger, nullable=False, server_default=default) for name in names]


def _renamed(*tables: str) -> None:
    for table in tables:
        op.rename_table(table, f"old_{table}")
    for index in ("orders_job", "orders_seq", "orders_collectable", "orders_counted", "receipts_tab", "receipts_job"):
        op.drop_index(index)
    op.drop_index("jobs_unresolved")


def upgrade() -> None:
    """Makes the tables anew, in the order in which their rows were made."""
    _define(packed=_packed, unhexed=bytes.fromhex)
    _renamed("tabs", "jobs", "orders", "receipts")
    _create_tabs_and_jobs()
    _create_orders()
    _run(UPGRADE)
    for table in ("old_receipts", "old_orders", "old_jobs", "old_tabs"):
        op.drop_table(table)


def _create_tabs_and_jobs() -> None:
    op.create_table(
        "tabs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("deployment_id", sa.String(64), nullable=False),
        sa.Column("payer", sa.String(42), nullable=False),
        sa.Column("provider", sa.String(42), nullable=False),
        *_integers("accepted", "total", "total_order_seq", "ceiling", "order_seq"),
        sa.Column("blocked_reason", sa.Text, nullable=False),
        sa.Column("undelivered_quarters", sa.Integer, nullable=False, server_default="0"),
        *_integers("settled", "settled_at_unblock", "recovered", "forgotten_seq", default="0"),
        sa.UniqueConstraint("deployment_id", "payer", "provider"),
    )
    workload = ("deployment_id", "payer", "model", "path", "label")
    op.create_table(
        "workloads",
        sa.Column("id", sa.Integer, primary_key=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in workload),
        sa.UniqueConstraint(*workload),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("workload", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("commitment_key", sa.LargeBinary, nullable=False),
        *_integers("created_at"),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("duration_ms", sa.BigInteger),
        sa.Column("cancelled", sa.Boolean, nullable=False, server_default=sa.false()),
        *_integers("asked_at", default="0"),
        sa.Column("reader", sa.String(16), nullable=False, server_default=""),
    )
    op.create_index("jobs_unresolved", "jobs", ["created_at"], sqlite_where=sa.text("state IN ('open', 'lost')"))


def _create_orders() -> None:
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("job", sa.Integer, nullable=False),
        sa.Column("tab", sa.Integer, nullable=False),
        *_integers("seq", "cap", "claim_by"),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("order_doc", sa.LargeBinary, nullable=False),
        sa.Column("terms_doc", sa.LargeBinary, nullable=False),
        sa.Column("delivered_doc", sa.Text),
        sa.Column("undelivered_quarters", sa.Integer, nullable=False, server_default="0"),
        *_integers("undelivered_at", default="0"),
    )
    op.create_index("orders_job", "orders", ["job"])
    op.create_index("orders_seq", "orders", ["seq"])
    open_states = "state IN ('open', 'dispatched', 'disputed')"
    op.create_index("orders_collectable", "orders", ["tab", "seq", "cap", "claim_by", "state"], sqlite_where=sa.text(open_states))
    op.create_index("orders_counted", "orders", ["tab", "undelivered_at"], sqlite_where=sa.text("undelivered_at > 0"))
    op.create_table(
        "receipts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("order_id", sa.Integer),
        sa.Column("tab", sa.Integer, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("receipt_doc", sa.LargeBinary, nullable=False),
        sa.Column("whole", sa.Boolean, nullable=False),
        *_integers("recorded_at"),
    )
    op.create_index("receipts_tab", "receipts", ["tab", "seq"], unique=True)
    op.create_index("receipts_order", "receipts", ["order_id"])


def downgrade() -> None:
    """Repeats names and addresses in each row again."""
    _define(unpacked=_unpacked, hexed=bytes.hex)
    op.get_bind().connection.dbapi_connection.create_function("digest_of", 2, _receipt_digest)  # type: ignore[union-attr]
    for index in ("orders_job", "orders_seq", "orders_collectable", "orders_counted", "receipts_tab", "receipts_order"):
        op.drop_index(index)
    op.drop_index("jobs_unresolved")
    for table in ("tabs", "jobs", "orders", "receipts"):
        op.rename_table(table, f"new_{table}")
    _create_wide_tables()
    _run(DOWNGRADE)
    for table in ("new_receipts", "new_orders", "new_jobs", "new_tabs", "workloads"):
        op.drop_table(table)


def _receipt_digest(deployment: str, document: str) -> str:
    from tallystick.protocol.eip712 import Domain  # noqa: PLC0415 - an upgrade needs none of this
    from tallystick.protocol.messages import Receipt  # noqa: PLC0415
    from tallystick.protocol.stored import load_signed  # noqa: PLC0415
    from tallystick.protocol.types import Address  # noqa: PLC0415

    chain, _, contract = deployment.partition(":")
    return load_signed(Receipt, document).message.digest(Domain(int(chain), Address(contract))).hex()


def _create_wide_tables() -> None:
    def texts(*names: str) -> list[sa.Column[Any]]:
        return [sa.Column(name, sa.Text, nullable=False) for name in names]

    party = ("deployment_id", "payer", "provider")
    op.create_table(
        "tabs",
        *texts(*party),
        *_integers("accepted", "total", "total_order_seq", "ceiling", "order_seq"),
        *texts("blocked_reason"),
        *_integers("undelivered_quarters", "settled", "settled_at_unblock", "recovered", default="0"),
        sa.PrimaryKeyConstraint(*party),
    )
    op.create_table(
        "jobs",
        *texts("job", "deployment_id", "payer", "model", "path", "state", "reason"),
        sa.Column("commitment_key", sa.LargeBinary, nullable=False),
        *_integers("created_at"),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("label", sa.String(64), nullable=False, server_default=""),
        sa.Column("duration_ms", sa.BigInteger),
        *_integers("cancelled", "asked_at", default="0"),
        sa.Column("reader", sa.String(16), nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("job"),
    )
    op.create_index("jobs_unresolved", "jobs", ["payer", "created_at"], sqlite_where=sa.text("state IN ('open', 'lost')"))
    op.create_table(
        "orders",
        sa.Column("id", sa.Integer, primary_key=True),
        *texts("digest", "job", *party),
        *_integers("seq", "cap", "ceiling", "claim_by"),
        *texts("state", "order_doc", "terms_doc"),
        sa.Column("delivered_doc", sa.Text),
        *_integers("undelivered_quarters", "undelivered_at", default="0"),
    )
    op.create_index("orders_job", "orders", ["job"])
    op.create_index("orders_seq", "orders", ["provider", "seq"])
    open_states = sa.text("state IN ('open', 'dispatched', 'disputed')")
    op.create_index("orders_collectable", "orders", ["payer", "provider"], sqlite_where=open_states)
    op.create_index("orders_counted", "orders", [*party, "undelivered_at"], sqlite_where=sa.text("undelivered_at > 0"))
    op.create_table(
        "receipts",
        sa.Column("id", sa.Integer, primary_key=True),
        *texts("digest", "job", *party),
        *_integers("seq"),
        *texts("order_digest", "receipt_doc"),
        *_integers("whole", "recorded_at"),
    )
    op.create_index("receipts_tab", "receipts", [*party, "seq"], unique=True)
    op.create_index("receipts_job", "receipts", ["job"])
