"""Rows of the match log: every kind of leaf, and what cannot be read."""

from __future__ import annotations

from coordinator.pages.log_view import rows_of
from tallystick.protocol.log_leaves import RestartLeaf


def test_leaves_that_are_gone_or_unknown() -> None:
    """A deleted leaf and one of a later release have a row all the same; the newest comes first."""
    entries = [
        {"index": 0, "hash": "", "leaf": RestartLeaf(100).dumps().hex()},
        {"index": 1, "hash": "", "leaf": None},
        {"index": 2, "hash": "", "leaf": "ff" * 40},
    ]
    rows = rows_of(entries, 160.0)
    assert [(row.index, row.kind) for row in rows] == [(2, "unknown"), (1, "deleted"), (0, "restart")]
    assert (rows[-1].age, rows[1].age) == (60.0, None)
    assert all(row.text for row in rows)
