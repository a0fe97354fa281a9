from __future__ import annotations

import json
import subprocess
import sys


def test_a_quick_run_has_every_figure() -> None:
    """The benchmark runs completely on real processes, and every request of a burst is answered."""
    command = [sys.executable, "-m", "scripts.bench_queue", "--burst", "12", "--loop-seconds", "0.5", "--json"]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=600).stdout)
    loops = {f"closed_loop_ratio_{clients}" for clients in (1, 2, 4, 8)}
    assert figures.keys() == {"burst_answered_share", "sdk_default_answered_share", "flood_other_wait_ratio"} | loops
    assert (figures["burst_answered_share"], figures["sdk_default_answered_share"]) == (1, 1)
