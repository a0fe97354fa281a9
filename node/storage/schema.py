"""The tables of the node's store, and the column types for amounts and times.

A job's rows are found by its id, which grows with time if its client is ours, and receipts by payer and seq. No index is ordered
by a digest: each entry of such an index would take a page of its own to write.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tallystick.protocol.types import Amount

_MONEY_DIGITS = 29
_MAX_INT64 = (1 << 63) - 1

metadata = sa.MetaData()


class Money(sa.types.TypeDecorator[Amount]):
    """An Amount as fixed-width decimal text, which sorts as the number does and holds 96 bits."""

    impl = sa.String(_MONEY_DIGITS)
    cache_ok = True

    def process_bind_param(self, value: Amount | None, _dialect: Any) -> str | None:
        """Converts a value for the database."""
        return None if value is None else f"{int(value):0{_MONEY_DIGITS}d}"

    def process_result_value(self, value: Any, _dialect: Any) -> Amount | None:
        """Converts a value from the database."""
        return None if value is None else Amount(int(value))


class Time(sa.types.TypeDecorator[int]):
    """Unix seconds from an order, limited to what the database holds, because a payer may set any value."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: int | None, _dialect: Any) -> int | None:
        """Converts a value for the database."""
        return None if value is None else min(value, _MAX_INT64)


identity = sa.Table(
    "identity",
    metadata,
    sa.Column("provider", sa.String, primary_key=True),
    sa.Column("chain_id", sa.BigInteger),
    sa.Column("contract", sa.String),
)
orders = sa.Table(
    "orders",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String),
    sa.Column("job", sa.String),
    sa.Column("payer", sa.String),
    sa.Column("coordinator", sa.String),
    sa.Column("model", sa.String),
    sa.Column("ceiling", Money),
    sa.Column("deadline", Time),
    sa.Column("claim_by", Time),
    sa.Column("admitted_at", sa.BigInteger),  # not for an order that was only recovered, whose job this state never had
    sa.Column("ended_at", sa.BigInteger),
    sa.Column("outcome", sa.SmallInteger),
    sa.Column("order_doc", sa.Text),
    sa.Column("terms_doc", sa.Text),
)
IS_UNFINISHED = sa.text("orders.admitted_at IS NOT NULL AND orders.ended_at IS NULL")
"""Whether the job of an order runs, or ran in a process that was killed. The condition of a partial index, verbatim."""
receipts = sa.Table(
    "receipts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("order_digest", sa.String),
    sa.Column("job", sa.String),
    sa.Column("payer", sa.String),
    sa.Column("coordinator", sa.String),
    sa.Column("seq", sa.BigInteger),
    sa.Column("cumulative", Money),
    sa.Column("cost", Money),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("cached_input_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("acknowledged", sa.Boolean),
    sa.Column("receipt_doc", sa.Text),
    sa.UniqueConstraint("payer", "seq", name="receipts_seq"),  # signing two receipts with one number costs the stake
)
IS_UNACKNOWLEDGED = sa.text("NOT receipts.acknowledged")
"""Whether a receipt must still reach its coordinator. The condition of a partial index, verbatim."""
tabs = sa.Table(
    "tabs",
    metadata,
    sa.Column("payer", sa.String, primary_key=True),
    sa.Column("seq", sa.BigInteger),
    sa.Column("cumulative", Money),
    sa.Column("settled", Money),
    sa.Column("reserved", Money),
    sa.Column("since", sa.BigInteger),
    sa.Column("claimed_at", sa.BigInteger),
    sa.Column("claimed", Money),
    sa.Column("written_off", Money),
)
completed_recoveries = sa.Table(
    "completed_recoveries",
    metadata,
    sa.Column("coordinator", sa.String, primary_key=True),
    sa.Column("url", sa.String, primary_key=True),
    sa.Column("at", sa.BigInteger),
)
gas = sa.Table(
    "gas",
    metadata,
    sa.Column("tx", sa.String, primary_key=True),
    sa.Column("at", sa.BigInteger),
    sa.Column("gas_used", sa.BigInteger),
    sa.Column("fee", Money),
)
fee_cursor = sa.Table(
    "fee_cursor",
    metadata,
    sa.Column("block", sa.BigInteger, primary_key=True),
    sa.Column("tip", sa.String),
    sa.Column("fees", Money),
)
payouts = sa.Table(
    "payouts",
    metadata,
    sa.Column("tx", sa.String, primary_key=True),
    sa.Column("at", sa.BigInteger),
    sa.Column("amount", Money),
    sa.Column("address", sa.String),
)
coordinator_hours = sa.Table(
    "coordinator_hours",
    metadata,
    sa.Column("endpoint", sa.String, primary_key=True),
    sa.Column("hour", sa.BigInteger, primary_key=True),
    sa.Column("earned", Money),
    sa.Column("written_off", Money),
)
