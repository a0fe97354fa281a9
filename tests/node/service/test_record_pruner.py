from __future__ import annotations

from node.service.record_pruner import RecordPruner
from tallystick.protocol.errors import Code, Unavailable


async def test_records_are_removed_by_their_age() -> None:
    """Each round removes what ended longer ago than the setting says; a database that fails stops nothing."""
    rounds: list[tuple[int, int]] = []

    class Store:
        async def prune(self, now: int, keep_seconds: int) -> int:
            rounds.append((now, keep_seconds))
            if len(rounds) == 1:
                raise Unavailable(Code.DATABASE_UNAVAILABLE, "disk full")
            return 3

    pruner = RecordPruner(Store(), 90, now=lambda: 1_000.5)
    await pruner.prune()
    await pruner.prune()
    assert rounds == [(1_000, 90), (1_000, 90)]
