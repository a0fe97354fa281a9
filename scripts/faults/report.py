"""The report of a run: kills and other faults by phase and process, violations, and the longest outages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.faults.schedule import Fault, Phase, Process
from scripts.faults.strikes import Struck


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that did not hold. `repeat`: the command that runs its schedule again."""

    seed: int
    database: str
    text: str
    repeat: str

    def to_json(self) -> dict[str, Any]:
        """As in the report."""
        return {"seed": self.seed, "database": self.database, "text": self.text, "repeat": self.repeat}


@dataclass(slots=True)
class Report:
    """What happened so far. `skipped`: what this machine does not allow, with the reason. `exits`: how often a process ended
    without a kill, such as a coordinator whose database was lost. `not_kept`, `unreleased`: see `Findings`.
    """

    struck: list[Struck] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    answers: int = 0
    not_kept: int = 0
    unreleased: dict[str, int] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    exits: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON. Outages are seconds."""
        struck = self.struck
        faults = {fault.value: _counts([each for each in struck if each.entry.fault is fault]) for fault in Fault}
        return {
            "kills": faults.pop(Fault.KILL.value),
            "kills_total": sum(each.entry.fault is Fault.KILL for each in struck),
            "other_faults": {name: counts for name, counts in faults.items() if counts},
            "violations": [violation.to_json() for violation in self.violations],
            "longest_outage_s": {
                "all": round(max((each.outage for each in struck), default=0.0), 1),
                "by_phase_and_process": _outages(struck),
                "by_fault": {fault.value: _longest(struck, fault) for fault in Fault if _longest(struck, fault)},
            },
            "answers": self.answers,
            "answers_whole_but_not_kept": self.not_kept,
            "orders_without_receipt": self.unreleased,
            "refused_requests": len(self.refusals),
            "refusals": sorted(set(self.refusals))[:20],
            "own_exits": self.exits,
            "skipped": self.skipped,
        }

    def show(self) -> None:
        """Prints a table of kills and outages, and the violations."""
        console, kills = Console(), [each for each in self.struck if each.entry.fault is Fault.KILL]
        table = Table(title="kills, and the longest outage in seconds", title_justify="left", title_style="bold")
        table.add_column("phase")
        for process in Process:
            table.add_column(process.value, justify="right")
        for phase in Phase:
            cells = (
                [each for each in kills if (each.entry.phase, each.entry.process) == (phase, process)] for process in Process
            )
            table.add_row(phase.value, *(f"{len(cell)}  {_longest(cell):.1f}" if cell else "" for cell in cells))
        console.print(table)
        rest = self.to_json()
        for name in (
            "other_faults",
            "answers",
            "answers_whole_but_not_kept",
            "orders_without_receipt",
            "refused_requests",
            "own_exits",
        ):
            console.print(f"{name}: {rest[name]}")
        for line in self.skipped:
            console.print(f"skipped: {line}")
        for violation in self.violations:
            console.print(f"VIOLATION, seed {violation.seed} on {violation.database}: {violation.text}\n  {violation.repeat}")
        console.print(f"{len(kills)} kills, {len(self.violations)} violations")


def _longest(struck: Sequence[Struck], fault: Fault | None = None) -> float:
    return round(max((each.outage for each in struck if fault in {None, each.entry.fault}), default=0.0), 1)


def _cells(struck: Sequence[Struck]) -> dict[str, dict[str, list[Struck]]]:
    cells: dict[str, dict[str, list[Struck]]] = {}
    for each in struck:
        cells.setdefault(each.entry.phase.value, {}).setdefault(each.entry.process.value, []).append(each)
    return cells


def _counts(struck: Sequence[Struck]) -> dict[str, dict[str, int]]:
    return {phase: {process: len(each) for process, each in row.items()} for phase, row in _cells(struck).items()}


def _outages(struck: Sequence[Struck]) -> dict[str, dict[str, float]]:
    return {phase: {process: _longest(each) for process, each in row.items()} for phase, row in _cells(struck).items()}
