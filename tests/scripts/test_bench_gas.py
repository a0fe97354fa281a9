"""The gas snapshot check: it reports growth, and accepts improvement and noise."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_gas.py"
KNOWN = {"settle_row_100": 20_000, "max_rows": 800}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("bench_gas", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("figures", [KNOWN, KNOWN | {"settle_row_100": 20_200}, {"settle_row_100": 1, "max_rows": 9_000}])
def test_small_growth_and_improvement_pass(bench: ModuleType, figures: dict[str, int]) -> None:
    """Growth of at most 1 % is no problem."""
    assert bench.regressions(figures, KNOWN) == []


@pytest.mark.parametrize(
    "figures",
    [KNOWN | {"settle_row_100": 20_201}, KNOWN | {"max_rows": 790}, KNOWN | {"new_call": 1}, {"max_rows": 800}],
)
def test_growth_and_missing_figures_are_reported(bench: ModuleType, figures: dict[str, int]) -> None:
    """More gas, fewer rows a batch, or a figure that one side lacks is one problem that names the figure."""
    assert len(bench.regressions(figures, KNOWN)) == 1


def test_snapshot_has_the_promised_figures() -> None:
    """The committed snapshot has the figures that other documents use."""
    known = json.loads((SCRIPT.parent.parent / "contracts" / "gas.json").read_text())
    promised = {"settle_row_1", "settle_row_10", "settle_row_100", "settle_row_dense", "erc20_transfer", "max_rows"}
    assert promised <= known.keys()
