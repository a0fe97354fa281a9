from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from node.coordinator.router import LinkRouter


@pytest.mark.parametrize(("problem", "pending", "closes"), [("", False, 1), ("no answer yet", False, 0), ("", True, 0)])
def test_unfinished_orders_wait_for_what_was_signed_before(problem: str, pending: bool, closes: int) -> None:
    """A receipt for one of them could have a number that this key used: that would cost the stake. Whoever asks for it."""
    closed: list[Any] = []
    runner: Any = SimpleNamespace(close_unfinished=closed.append, reopen=lambda _orders: None)
    sender: Any = SimpleNamespace(resend_now=lambda: None)
    recovery: Any = SimpleNamespace(problem=problem)
    doubtful: Any = SimpleNamespace(pending=pending)
    watch: Any = SimpleNamespace()
    router = LinkRouter(runner, sender, doubtful, recovery, watch)
    router.close_unfinished()
    assert len(closed) == closes
    router.close_voided([])
    assert len(closed) == 2 * closes
