"""Retention: removes old orders and receipts in pages, and keeps the sums that the earnings reports need.

Kept are: receipts that their coordinator has not confirmed, orders that a claim can rest on or that could be sent again, the last
receipt of each tab, and orders of a killed process until they expire.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
import sqlalchemy.dialects.sqlite
from sqlalchemy import Connection

from node.storage.rows import pack_address, read_order
from node.storage.schema import ceilings, earned_days, open_orders, orders, receipts, tabs
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address
from tallystick.runtime.prepared import Prepared

PAGE_SIZE = 500


class Page(NamedTuple):
    """How far a page came: the number of its last receipt, how many it removed, and whether it was the last one."""

    after: int
    removed: int = 0
    is_last: bool = False


def prune(connection: Connection, *, after: int, before: int, now: int) -> Page:
    """Removes what is no longer needed of the next receipts after number `after`, as far as they were made before `before`.

    Times are Unix seconds.
    """
    query = sa.select(receipts, orders.c.deadline).join(orders, orders.c.id == receipts.c.order_id)
    query = query.where(receipts.c.id > after).order_by(receipts.c.id).limit(PAGE_SIZE)
    page = connection.execute(query).mappings().all()
    old = [row for row in page if row["finished_at"] < before]
    needed = _needed_orders(connection, now) if old else set()
    ends = _tab_ends(connection) if old else set()
    removed = [
        row for row in old if row["order_id"] not in needed and row["deadline"] <= now and (row["payer"], row["seq"]) not in ends
    ]
    _add_to_days(connection, removed)
    _FORGET_RECEIPT.run(connection, *({"number": row["id"]} for row in removed))
    _FORGET_ORDER.run(connection, *({"number": row["order_id"]} for row in removed))
    is_last = len(page) < PAGE_SIZE or not old
    if is_last:
        expired = [{"number": number} for number in _expired_orders(connection, before, now)]
        _FORGET_OPEN_ORDER.run(connection, *expired)
        _FORGET_ORDER.run(connection, *expired)
        connection.execute(_FORGET_CEILINGS, {"now": now})
    return Page(page[-1]["id"] if page else after, len(removed), is_last)


def _needed_orders(connection: Connection, now: int) -> set[int]:
    """Numbers of orders whose receipt is not confirmed, and of those that a claim can rest on."""
    live = sa.select(ceilings.c.order_id).where(ceilings.c.claim_by > now)
    return set(connection.execute(sa.union(sa.select(open_orders.c.order_id), live)).scalars())


def _tab_ends(connection: Connection) -> set[tuple[bytes, int]]:
    """Payer and number of the last receipt of each tab."""
    rows = connection.execute(sa.select(tabs.c.payer, tabs.c.seq)).all()
    return {(pack_address(Address(payer)), seq) for payer, seq in rows}


def _expired_orders(connection: Connection, before: int, now: int) -> list[int]:
    """Numbers of orders of a killed process that are old, not claimable any more, and never got a receipt."""
    query = sa.select(orders.c.id, orders.c.digest, orders.c.document, orders.c.deadline)
    query = query.join(open_orders, open_orders.c.order_id == orders.c.id)
    query = query.where(open_orders.c.receipt_id.is_(None), orders.c.admitted_at < before, orders.c.deadline <= now)
    rows = connection.execute(query.limit(PAGE_SIZE)).all()
    return [row.id for row in rows if read_order(row.digest, row.document)[0].message.claim_by <= now]


def _add_to_days(connection: Connection, removed: Sequence[Any]) -> None:
    """Adds receipts to the sums of their days."""
    days: dict[tuple[str, str, bytes], dict[str, int]] = {}
    for row in removed:
        if row["model"] is None or row["outcome"] == Outcome.REFUSED:
            continue
        day = datetime.fromtimestamp(row["finished_at"], UTC).strftime("%Y-%m-%d")
        sums = days.setdefault((day, row["model"], row["payer"]), dict.fromkeys(_SUMS, 0))
        for member, value in zip(_SUMS, (1, row["input_tokens"], row["output_tokens"], row["cost"]), strict=True):
            sums[member] += int(value)
    keys = ("day", "model", "payer")
    _ADD_TO_DAY.run(connection, *({**dict(zip(keys, key, strict=True)), **sums} for key, sums in days.items()))


_SUMS = ("jobs", "input_tokens", "output_tokens", "revenue")


def _add_to_day(_dialect: str) -> sa.Insert:
    query = sa.dialects.sqlite.insert(earned_days)
    sums = {name: earned_days.c[name] + query.excluded[name] for name in _SUMS}
    return query.on_conflict_do_update(index_elements=["day", "model", "payer"], set_=sums)


_ADD_TO_DAY = Prepared(_add_to_day, [column.key for column in earned_days.columns])
_FORGET_RECEIPT = Prepared(sa.delete(receipts).where(receipts.c.id == sa.bindparam("number")))
_FORGET_ORDER = Prepared(sa.delete(orders).where(orders.c.id == sa.bindparam("number")))
_FORGET_CEILINGS = sa.delete(ceilings).where(
    ceilings.c.claim_by <= sa.bindparam("now"), ceilings.c.order_id.not_in(sa.select(orders.c.id))
)
_FORGET_OPEN_ORDER = Prepared(sa.delete(open_orders).where(open_orders.c.order_id == sa.bindparam("number")))
