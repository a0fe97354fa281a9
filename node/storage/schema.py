"""The tables of the node's store, and the column types for amounts and times.

A job appends one order and one receipt, each with its signed documents in one compressed column. Rows are found by their number:
the few that a query looks for otherwise, open orders and the ceilings that claims rest on, have small tables of their own. So no
index grows with the jobs but the one that refuses a second receipt of a number.
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


class Units(sa.types.TypeDecorator[Amount]):
    """An Amount as an integer that SQL can sum, limited to what the database holds. The exact amount is in the document."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: Amount | None, _dialect: Any) -> int | None:
        """Converts a value for the database."""
        return None if value is None else min(int(value), _MAX_INT64)

    def process_result_value(self, value: Any, _dialect: Any) -> Amount | None:
        """Converts a value from the database."""
        return None if value is None else Amount(value)


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
    sa.Column("digest", sa.LargeBinary),
    sa.Column("job", sa.LargeBinary),
    sa.Column("deadline", Time),
    sa.Column("admitted_at", sa.BigInteger),  # not for an order that was only recovered, whose job this state never had
    sa.Column("document", sa.LargeBinary),
)
receipts = sa.Table(
    "receipts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("order_id", sa.Integer),
    sa.Column("payer", sa.LargeBinary),
    sa.Column("seq", sa.BigInteger),
    sa.Column("model", sa.String),  # not for a receipt that was only recovered
    sa.Column("finished_at", sa.BigInteger),
    sa.Column("outcome", sa.SmallInteger),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("cost", Units),
    sa.Column("document", sa.LargeBinary),
    sa.UniqueConstraint("payer", "seq", name="receipts_seq"),  # signing two receipts with one number costs the stake
)
open_orders = sa.Table(
    "open_orders",
    metadata,
    sa.Column("job", sa.LargeBinary, primary_key=True),
    sa.Column("order_id", sa.Integer, primary_key=True),
    sa.Column("coordinator", sa.String),
    sa.Column("receipt_id", sa.Integer),  # not while the job runs, or ran in a process that was killed
)
"""Orders until their coordinator has confirmed their receipt."""
ceilings = sa.Table(
    "ceilings",
    metadata,
    sa.Column("payer", sa.String, primary_key=True),
    sa.Column("ceiling", Money, primary_key=True),
    sa.Column("claim_by", Time, primary_key=True),
    sa.Column("order_id", sa.Integer),
)
"""The orders that a claim can rest on: none is lower and expires earlier than another one of its payer."""
earned_days = sa.Table(
    "earned_days",
    metadata,
    sa.Column("day", sa.String, primary_key=True),
    sa.Column("model", sa.String, primary_key=True),
    sa.Column("payer", sa.LargeBinary, primary_key=True),
    sa.Column("jobs", sa.BigInteger),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("revenue", Units),
)
"""Sums of receipts that are no longer kept, by UTC day."""
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
