"""The benchmark of signed frames runs and reports its figures. Their values depend on the machine."""

from __future__ import annotations

import pytest

from scripts import bench_wire


def test_every_figure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times, ratios to a bare recovery, and sizes."""
    monkeypatch.setattr(bench_wire, "ROUNDS", 1)
    figures = bench_wire.measure()
    assert {"recovery_us", "submission_1_ratio", "submission_8_ratio", "receipt_ratio"} <= figures.keys()
    assert all(value > 0 for value in figures.values())
    assert figures["receipt_bytes"] == 13 * 32 + 65
