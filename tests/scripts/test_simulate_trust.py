"""The simulation of cheaters: cheating must not pay, by the product's own verdicts and integrity."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.simulation.trust import TrustScenario, TrustSimulation
from tests.scripts.measurement import run_measurement

SMALL = {"providers": 30, "rounds": 120, "payers": 4}


def report(**changes: float) -> dict[str, float]:
    """The figures of a small market."""
    simulation = TrustSimulation(TrustScenario(**(SMALL | changes)))  # type: ignore[arg-type]
    simulation.run()
    return simulation.report()


@pytest.mark.parametrize("cheat_rate", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("captured", [0.0, 0.3])
def test_cheating_does_not_pay(cheat_rate: float, captured: float) -> None:
    """On the mean over owners, new keys included; no honest provider is confirmed."""
    figures = report(cheaters=0.2, cheat_rate=cheat_rate, captured=captured)
    assert figures["cheater_income_mean"] < figures["honest_income_mean"]
    assert figures["honest_confirmed"] == 0


def test_no_cheater_earns_as_much_as_honest_work() -> None:
    """Not even the most successful one, in the worst case of the published range. That takes the coordinator's probes."""
    worst = {"providers": 100, "rounds": 400, "payers": 10, "cheaters": 0.3, "cheat_rate": 0.2, "captured": 0.3}
    figures = report(**worst)
    assert figures["cheater_income_max"] < figures["honest_income_mean"]
    assert figures["honest_confirmed"] == 0
    unprobed = report(**worst, probes=0)
    assert unprobed["cheater_income_max"] > figures["cheater_income_max"]
    assert unprobed["audit_cost_share"] < figures["audit_cost_share"]


def test_it_would_pay_without_audits_that_see_it() -> None:
    """The simulation can tell: where audits see nothing, cheaters earn more."""
    figures = report(cheaters=0.2, power=0.001)
    assert figures["cheater_income_mean"] > figures["honest_income_mean"]


def test_the_same_seed_gives_the_same_figures() -> None:
    """Another seed gives others."""
    assert report(seed=3) == report(seed=3)
    assert report(seed=3) != report(seed=4)


def test_the_command_reports_every_scenario(tmp_path: Path) -> None:
    """As JSON and as a plot."""
    plot = str(tmp_path / "trust.svg")
    report = run_measurement("simulate_trust", "--rounds", "5", "--providers", "20", "--json", "--plot", plot)
    assert len(report["runs"]) == 27
    assert (tmp_path / "trust.svg").read_text().startswith("<?xml")
