"""The rows that jobs write: orders that begin and receipts that end them, many in one transaction.

A receipt is written only if it follows the last one of its tab. What builds on a receipt that is not written does not follow
either, so it is not written as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
import sqlalchemy.dialects.sqlite
from sqlalchemy import Connection

from node.domain.order_admission import MatchedOrder
from node.ports import ReceiptRecord, TabConflict
from node.storage.rows import to_order_row, to_receipt_row
from node.storage.schema import ceilings, open_orders, orders, receipts, tabs
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.prepared import Prepared, Row

NO_CEILING = Amount(0)
"""Of an order on which no claim rests, because its terms, such as the fee, may be unacceptable."""


class Beginning(NamedTuple):
    """The rows of an order that begins, and the ceiling that its payer signed."""

    order: Row
    open_order: Row
    payer: Address
    ceiling: Amount
    claim_by: int


class Ending(NamedTuple):
    """The rows of a receipt, and the tab before and after it."""

    receipt: Row
    ended: Row
    payer: Address
    before: tuple[int, Amount]
    after: tuple[int, Amount]
    finished_at: int


@dataclass(frozen=True, slots=True)
class JobWrite:
    """What one write of a job adds: an order that begins, a receipt that ends one, or both."""

    beginning: Beginning | None = None
    ending: Ending | None = None


def to_beginning(number: int, matched: MatchedOrder, at: int, ceiling: Amount) -> Beginning:
    """Returns the rows of an order with this number. `ceiling`: what it authorises claims for, in base units."""
    message = matched.order.message
    order = to_order_row(number, matched.order, matched.terms, at)
    row = {"job": matched.job, "order_id": number, "coordinator": message.coordinator, "receipt_id": None}
    return Beginning(order, row, matched.payer, ceiling, message.claim_by)


def to_ending(number: int, order_id: int, record: ReceiptRecord) -> Ending:
    """Returns the rows of a receipt with this number."""
    message = record.receipt.message
    return Ending(
        to_receipt_row(number, record.receipt, order_id, record.matched.terms.model),
        {"of_job": record.matched.job, "of_order": order_id, "to_receipt": number},
        message.payer,
        (message.seq - 1, Amount(message.cumulative_cost - message.cost)),
        (message.seq, message.cumulative_cost),
        message.finished_at,
    )


def write_jobs(connection: Connection, writes: Sequence[JobWrite]) -> list[TabConflict | None]:
    """Adds the rows of many jobs, in order. Returns for each write why nothing of it was written; None if all was."""
    ends, conflicts, written = _TabEnds(connection), list[TabConflict | None](), list[JobWrite]()
    for write in writes:
        conflict = None if write.ending is None else ends.advance(write.ending)
        conflicts.append(conflict)
        if conflict is None:
            written.append(write)
    beginnings = [write.beginning for write in written if write.beginning is not None]
    endings = [write.ending for write in written if write.ending is not None]
    _NEW_ORDER.run(connection, *(beginning.order for beginning in beginnings))
    _OPEN_ORDER.run(connection, *(beginning.open_order for beginning in beginnings))
    _NEW_RECEIPT.run(connection, *(ending.receipt for ending in endings))
    _END_ORDER.run(connection, *(ending.ended for ending in endings))
    put_tabs(connection, ends.changed())
    for beginning in _highest(beginnings):
        add_ceiling(connection, beginning.payer, beginning.ceiling, beginning.claim_by, beginning.order["id"])
    return conflicts


class _TabEnds:
    """The last receipt of each tab that a transaction touches."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ends: dict[Address, tuple[int, Amount]] = {}
        self._finished_at: dict[Address, int] = {}

    def advance(self, ending: Ending) -> TabConflict | None:
        """Moves a tab to a receipt; returns why it cannot."""
        end = self._ends.get(ending.payer)
        if end is None:
            end = self._ends[ending.payer] = tab_end(self._connection, ending.payer)
        if end != ending.before:
            return TabConflict(*end)
        self._ends[ending.payer] = ending.after
        self._finished_at.setdefault(ending.payer, ending.finished_at)
        return None

    def changed(self) -> list[Row]:
        """Returns the rows of the tabs that moved. `since`: when the first of their new receipts was made."""
        return [tab_row(payer, *self._ends[payer], at) for payer, at in self._finished_at.items()]


def tab_end(connection: Connection, payer: Address) -> tuple[int, Amount]:
    """Returns number and total of the last receipt of a tab; zeros without one."""
    row = connection.exec_driver_sql("SELECT seq, cumulative FROM tabs WHERE payer = ?", (payer,)).first()
    return (0, Amount(0)) if row is None else (row[0], Amount(int(row[1])))


def tab_row(payer: Address, seq: int, cumulative: Amount, since: int) -> dict[str, Any]:
    """Returns the row of a tab that is new; of one that is known, `put_tabs` keeps what the chain and the collector know."""
    zero = Amount(0)
    known = {"settled": zero, "reserved": zero, "claimed_at": 0, "claimed": zero, "written_off": zero}
    return {"payer": payer, "seq": seq, "cumulative": cumulative, "since": since} | known


def put_tabs(connection: Connection, rows: Iterable[Row]) -> None:
    """Moves tabs to their last receipt, never back. `since`, the time of the first unsettled receipt, stays while anything is
    unsettled.
    """
    _PUT_TAB.run(connection, *rows)


def _put_tab(_dialect: str) -> sa.Insert:
    query = sa.dialects.sqlite.insert(tabs)
    new = query.excluded
    since = sa.case((tabs.c.cumulative > tabs.c.settled, tabs.c.since), else_=new.since)
    changed = {"seq": new.seq, "cumulative": new.cumulative, "since": since}
    return query.on_conflict_do_update(index_elements=["payer"], set_=changed, where=new.seq > tabs.c.seq)


def _highest(beginnings: Sequence[Beginning]) -> list[Beginning]:
    """Returns the orders whose ceiling no other one of the same payer covers."""
    kept = dict[Address, list[Beginning]]()
    for new in sorted(beginnings, key=lambda beginning: (beginning.ceiling, beginning.claim_by), reverse=True):
        higher = kept.setdefault(new.payer, [])
        if new.ceiling and all(other.claim_by < new.claim_by for other in higher):
            higher.append(new)
    return [beginning for higher in kept.values() for beginning in higher]


def add_ceiling(connection: Connection, payer: Address, ceiling: Amount, claim_by: int, order_id: int) -> None:
    """Adds an order that claims can rest on, unless another one covers it; drops those that it covers."""
    row = {"payer": payer, "ceiling": ceiling, "claim_by": claim_by, "order_id": order_id}
    values = {"payer": payer, "ceiling": f"{int(ceiling):029d}", "claim_by": min(claim_by, (1 << 63) - 1)}
    text = "payer = :payer AND ceiling {0} :ceiling AND claim_by {0} :claim_by"
    if connection.exec_driver_sql(f"SELECT 1 FROM ceilings WHERE {text.format('>=')}", values).first() is None:  # noqa: S608
        connection.exec_driver_sql(f"DELETE FROM ceilings WHERE {text.format('<=')}", values)  # noqa: S608 - constants
        _NEW_CEILING.run(connection, row)


_NEW_ORDER = Prepared(sa.insert(orders), [column.key for column in orders.columns])
_OPEN_ORDER = Prepared(sa.insert(open_orders))
_NEW_RECEIPT = Prepared(sa.insert(receipts), [column.key for column in receipts.columns])
_END_ORDER = Prepared(
    sa.update(open_orders)
    .where(open_orders.c.job == sa.bindparam("of_job"), open_orders.c.order_id == sa.bindparam("of_order"))
    .values(receipt_id=sa.bindparam("to_receipt"))
)
_PUT_TAB = Prepared(_put_tab, [column.key for column in tabs.columns])
_NEW_CEILING = Prepared(sa.insert(ceilings), [column.key for column in ceilings.columns])
