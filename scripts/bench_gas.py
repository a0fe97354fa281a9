"""Prints the gas of every call of the escrow, with its targets, a plain transfer per job, and x402 for comparison. --json: one
object. --check: fails if a figure is over 1 % above contracts/gas.json. --write: updates that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tallystick.cli.progress import activity
from tests.contracts import gas

SNAPSHOT = Path(__file__).parent.parent / "contracts" / "gas.json"
TOLERANCE_PERCENT = 1


def regressions(figures: dict[str, int], known: dict[str, int]) -> list[str]:
    """Figures that exceed the snapshot by more than 1 %, or that only one side has. A larger `max_rows` is better."""
    problems = [f"{name}: only on one side" for name in figures.keys() ^ known.keys()]
    for name in figures.keys() & known.keys():
        now, then = (known[name], figures[name]) if name == "max_rows" else (figures[name], known[name])
        if now * 100 > then * (100 + TOLERANCE_PERCENT):
            problems.append(f"{name}: {figures[name]:,}, the snapshot says {known[name]:,}")
    return sorted(problems)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/bench gas", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--check", action="store_true", help="fail if a figure exceeds the snapshot by more than 1 %%")
    parser.add_argument("--write", action="store_true", help="update the snapshot")
    parser.add_argument("--floor", action="store_true", help="only show what makes up the gas of a row in a dense batch")
    options = parser.parse_args()
    if options.floor:
        with activity("measuring the gas of a row"):
            floor = gas.floor()
        _table("gas of a row, 20 payers x 20 providers", floor)
        return 0
    with activity("measuring the gas of each call"):
        figures = gas.settling() | {"max_rows": gas.largest_batch()} | gas.calls()
    if options.json:
        print(json.dumps(figures | gas.QUOTED, indent=2))
    else:
        _print(figures)
    if options.write:
        SNAPSHOT.write_text(json.dumps(figures, indent=2) + "\n")
    problems = regressions(figures, json.loads(SNAPSHOT.read_text())) if options.check else []
    for problem in problems:
        print(f"gas grew: {problem}; if the change is intended, run scripts/bench gas --write", file=sys.stderr)
    return 1 if problems else 0


def _print(figures: dict[str, int]) -> None:
    settling = {name: value for name, value in figures.items() if name.startswith("settle_row")}
    goals = {name: f"target {target:,}, {_met(figures[name], target)}" for name, target in gas.TARGETS.items()}
    _table("settle, gas per row", settling, goals)
    _table("for comparison", {"erc20_transfer": figures["erc20_transfer"]} | gas.QUOTED, dict.fromkeys(gas.QUOTED, "quoted"))
    _table("largest batch under 2^24 gas, rows", {"max_rows": figures["max_rows"]})
    rest = settling.keys() | {"erc20_transfer", "max_rows"}
    _table("other calls, gas per transaction", {name: value for name, value in figures.items() if name not in rest})


def _met(value: int, target: int) -> str:
    return "met" if value <= target else "missed"


def _table(title: str, values: dict[str, int], notes: dict[str, str] | None = None) -> None:
    print(title)
    for name, value in values.items():
        print(f"  {name:<34}{value:>10,}  {(notes or {}).get(name, '')}".rstrip())
    print()


if __name__ == "__main__":
    sys.exit(main())
