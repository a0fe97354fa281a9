"""Simulates a day of the market: the coordinator's own book, matcher and queue under a virtual clock, for several policies.

Nodes come and go and fail, payers send bursts of conversations, and one of them floods a model. Prints the figures of each policy
side by side; docs/explanation/market-simulation.md explains them. --sweep varies the defaults one at a time instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from scripts.simulation.policies import BY_NAME
from scripts.simulation.scenario import Scenario
from scripts.simulation.tables import write_tables
from scripts.simulation.variants import SWEEPS, Variant, check_constants, run_variant, sweep_variants

DEFAULT_POLICIES = ("as_shipped", "cheapest", "least_loaded")
_PROGRESS: Any = None
"""The shares that are done, in the processes that run variants."""


def _share_progress(shares: Any) -> None:
    global _PROGRESS  # noqa: PLW0603 - the processes of a pool inherit shared memory only through their initializer
    _PROGRESS = shares


def _run(scenario: Scenario, variant: Variant, number: int) -> dict[str, Any]:
    def progress(share: float) -> None:
        _PROGRESS[number] = share

    return run_variant(scenario, variant, progress)


@contextlib.contextmanager
def _bars(variants: list[Variant]) -> Iterator[Progress]:
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        for variant in variants:
            bars.add_task(variant.name, total=1.0)
        yield bars


def simulate(scenario: Scenario, variants: list[Variant], processes: int) -> dict[str, Any]:
    """Runs variants in this number of processes and returns their reports by name. Draws progress bars on a terminal."""
    shares = multiprocessing.Array("d", len(variants))
    with ProcessPoolExecutor(processes, initializer=_share_progress, initargs=(shares,)) as pool, _bars(variants) as bars:
        futures = [pool.submit(_run, scenario, variant, number) for number, variant in enumerate(variants)]
        while wait(futures, timeout=0.5).not_done:
            for number in bars.task_ids:
                bars.update(number, completed=shares[number])
        return {variant.name: future.result() for variant, future in zip(variants, futures, strict=True)}


def _table(runs: dict[str, Any]) -> Iterator[str]:
    yield f"{'':<28}" + "".join(f"{name.removeprefix('as_shipped ')[:20]:>22}" for name in runs)
    for key in next(iter(runs.values()))["figures"]:
        yield f"{key:<28}" + "".join(f"{run['figures'][key]:>22,.4g}" for run in runs.values())


def _options() -> argparse.Namespace:
    scenario = Scenario()
    parser = argparse.ArgumentParser(prog="scripts/simulate market", description=__doc__)
    parser.add_argument("--nodes", type=int, default=scenario.nodes, metavar="N", help="nodes, default %(default)s")
    parser.add_argument("--models", type=int, default=scenario.models, metavar="N", help="models, default %(default)s")
    parser.add_argument("--payers", type=int, default=scenario.payers, metavar="N", help="payers, default %(default)s")
    parser.add_argument("--hours", type=float, default=scenario.hours, metavar="H", help="hours of the day's pattern")
    parser.add_argument("--speedup", type=float, default=scenario.speedup, metavar="X", help="how fast that pattern runs")
    parser.add_argument("--load", type=float, default=scenario.load, metavar="SHARE", help="traffic as a share of all slots")
    parser.add_argument("--seed", type=int, default=scenario.seed, metavar="N", help="the same seed gives the same figures")
    parser.add_argument("--replicas", type=int, default=scenario.replicas, metavar="N", help="processes of the coordinator")
    parser.add_argument("--policy", nargs="+", default=DEFAULT_POLICIES, choices=sorted(BY_NAME), metavar="NAME")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="another value of a default, for each policy")
    parser.add_argument(
        "--sweep",
        nargs="*",
        choices=sorted(SWEEPS),
        metavar="NAME",
        help="vary these defaults in turn, without names all of them",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="runs at the same time")
    parser.add_argument("--json", metavar="FILE", help="write the report to a file; -: print it instead of a table")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots as SVG and tables as Markdown")
    options = parser.parse_args()
    try:
        options.constants = {name: float(value) for name, _, value in (text.partition("=") for text in options.set)}
        check_constants(options.constants)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> int:
    """Runs the command."""
    options = _options()
    sizes = {
        name: getattr(options, name) for name in ("nodes", "models", "payers", "hours", "speedup", "load", "seed", "replicas")
    }
    scenario = Scenario(**sizes)
    variants = [Variant(name, options.constants) for name in options.policy]
    if options.sweep is not None:
        variants = sweep_variants(options.sweep or SWEEPS)
    report: dict[str, Any] = {"scenario": asdict(scenario), "runs": simulate(scenario, variants, options.processes)}
    if options.sweep is not None:
        report["sweep"] = True
        for run in report["runs"].values():
            for name in [name for name in run if name not in ("figures", "errors", "cpu_seconds")]:
                del run[name]
    if options.json == "-":
        print(json.dumps(report))
        return 0
    if options.json:
        Path(options.json).write_text(json.dumps(report, separators=(",", ":")) + "\n")
    for line in _table(report["runs"]):
        print(line)
    if options.plots:
        from scripts.simulation.plots import write_plots  # noqa: PLC0415 - a second to import, and only for this

        for path in [*write_plots(report, options.plots), *write_tables(report, options.plots)]:
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
