"""The benchmarks on real engines run completely. Their figures are those of a tiny load, and only what must hold is compared."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def _figures(name: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"scripts.bench_{name}", "--json", *options]
    figures: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=3_600).stdout)
    return figures


def test_conversations_find_their_cache() -> None:
    """Turns that go through two gateways in turns find more in the engines' caches than turns that go round."""
    figures = _figures("affinity", "--conversations", "3", "--turns", "3", "--nodes", "2")
    assert figures["cached_share_affinity"] > 0.8 * figures["cached_share_possible"]
    assert figures["cached_share_affinity"] > figures["cached_share_round_robin"]


def test_nothing_is_refused() -> None:
    """Requests beyond the slots wait, as they do at the engine."""
    figures = _figures("queue", "--burst", "8", "--answers", "1", "--rounds", "1")
    assert (figures["burst_answered_share"], figures["sdk_default_answered_share"]) == (1, 1)
    assert figures["closed_loop_refused"] == 0
