from __future__ import annotations

import json
import subprocess
import sys

from scripts.bench_match import CASES


def test_a_quick_run_has_every_figure() -> None:
    """The benchmark measures every case that the number of asks allows, and the memory."""
    command = [sys.executable, "-m", "scripts.bench_match", "--sizes", "2000", "--rounds", "10", "--json"]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=1_000).stdout)
    expected = {f"match_us_{part}_2000_{case.name}" for part in ("p50", "p99") for case in CASES}
    assert figures.keys() == expected | {"update_us_2000", "bytes_per_ask"}
    assert all(value > 0 for value in figures.values())
