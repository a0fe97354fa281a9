from __future__ import annotations

from scripts.bench_match import CASES
from tests.scripts.measurement import run_measurement


def test_a_quick_run_has_every_figure() -> None:
    """The benchmark measures every case that the number of asks allows, and the memory."""
    figures = run_measurement("bench_match", "--sizes", "2000", "--rounds", "10", "--json")
    expected = {f"match_us_{part}_2000_{case.name}" for part in ("p50", "p99") for case in CASES}
    assert figures.keys() == expected | {"update_us_2000", "bytes_per_ask"}
    assert all(value > 0 for value in figures.values())
