"""Simulates a market with cheaters whose answers are audited: what cheating earns against honest work.

Varies the share of cheaters, the share of their jobs on which they cheat, and the share of providers that collude as referees.
Incomes are of one owner, in prices of a job, under all keys that it used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from scripts.simulation.trust import TrustScenario, TrustSimulation

CHEATERS, CHEAT_RATES, CAPTURED = (0.1, 0.2, 0.3), (0.2, 0.5, 1.0), (0.0, 0.1, 0.3)


def run(scenario: TrustScenario) -> dict[str, float]:
    """Runs one scenario; returns its report."""
    simulation = TrustSimulation(scenario)
    simulation.run()
    return simulation.report()


def main() -> int:
    """Runs the command."""
    default = TrustScenario()
    parser = argparse.ArgumentParser(prog="scripts/simulate trust", description=__doc__)
    parser.add_argument("--rounds", type=int, default=default.rounds, metavar="N", help="rounds, default %(default)s")
    parser.add_argument("--providers", type=int, default=default.providers, metavar="N", help="providers, default %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="the same seed gives the same figures")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at the same time")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot of the incomes as SVG")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("rounds", "providers", "seed")}
    scenarios = [
        TrustScenario(cheaters=cheaters, cheat_rate=rate, captured=captured, **sizes)
        for cheaters, rate, captured in itertools.product(CHEATERS, CHEAT_RATES, CAPTURED)
    ]
    console = Console(stderr=True)
    with ProcessPoolExecutor(options.processes) as pool:
        reports = list(
            track(
                pool.map(run, scenarios), total=len(scenarios), console=console, disable=not console.is_terminal, transient=True
            )
        )
    rows: list[dict[str, Any]] = [
        {"cheaters": scenario.cheaters, "cheat_rate": scenario.cheat_rate, "captured": scenario.captured, **report}
        for scenario, report in zip(scenarios, reports, strict=True)
    ]
    if options.plot:
        _plot(rows, options.plot)
    if options.json:
        print(json.dumps({"scenario": sizes, "runs": rows}))
    else:
        _show(rows)
    return 0


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="trust", title_justify="left", title_style="bold")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.3g}" for value in row.values()))
    Console().print(table)


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and only for this

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, plots = plt.subplots(1, len(CAPTURED), sharey=True, figsize=(11, 4), layout="constrained")
    for axes, captured in zip(plots, CAPTURED, strict=True):
        shown = [row for row in rows if row["captured"] == captured]
        positions = range(len(shown))
        series = (("honest_income_mean", "o", "honest, mean"), ("cheater_income_mean", "s", "cheaters, mean"))
        for key, marker, label in (*series, ("cheater_income_max", "x", "most successful cheater")):
            axes.plot(positions, [row[key] for row in shown], marker, label=label)
        labels = [f"{row['cheaters']:.0%} cheat\non {row['cheat_rate']:.0%}" for row in shown]
        axes.set_xticks(positions, labels, fontsize=6)
        axes.set_title(f"{captured:.0%} of the referees collude", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
    plots[0].set_ylabel("income of an owner, in prices of a job")
    plots[0].legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
