"""Variants of the market that are compared: a policy, and values of constants in place of the defaults."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from scripts.simulation.policies import BY_NAME
from scripts.simulation.scenario import Scenario
from scripts.simulation.simulation import Simulation

CONSTANTS = ("near_tie", "explored", "kept", "load_part", "failed_jobs", "min_weight", "grant_seconds")
"""Constants of the coordinator and the client, in lower case. Fields of a scenario can be set too."""
SWEEPS: dict[str, tuple[float, ...]] = {
    "near_tie": (10_000, 100, 50, 20, 10),
    "explored": (0.0, 0.02, 0.05, 0.1, 0.2),
    "kept": (1_000, 10, 4),
    "load_part": (1_000_000, 100, 20, 5, 2),
    "failed_jobs": (0, 1, 2, 4),
    "min_weight": (1_000, 100_000, 10_000_000),
    "grant_seconds": (2.0, 15.0, 60.0),
    "wait": (15, 30, 60, 120, 300),
    "shortlist_size": (1, 2, 3, 5, 8),
    "shortlist_seconds": (0.0, 5.0, 20.0),
    "seed": (1, 2, 3),
}
"""Values that `--sweep` tries, one constant at a time."""

_COLLECT_EVERY = 200_000
"""Objects between two runs of the garbage collector, which would take a fifth of the time otherwise."""


@dataclass(frozen=True, slots=True)
class Variant:
    """See the module's docstring."""

    policy: str
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in a report."""
        return " ".join([self.policy, *(f"{name}={value:g}" for name, value in self.constants.items())])


def check_constants(constants: Mapping[str, float]) -> None:
    """Raises ValueError that names a constant which does not exist."""
    known = sorted({*CONSTANTS, *(field.name for field in fields(Scenario))})
    for name in constants:
        if name not in known:
            raise ValueError(f"--set {name}: expected one of {', '.join(known)}")


def sweep_variants(names: Iterable[str] = tuple(SWEEPS)) -> list[Variant]:
    """Returns the variants of these sweeps."""
    return [Variant("as_shipped", {name: value}) for name in names for value in SWEEPS[name]]


@contextlib.contextmanager
def overridden(constants: Mapping[str, float]) -> Iterator[None]:
    """Gives constants of the coordinator and the client other values for a while."""
    former: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, value in constants.items():
            if name in CONSTANTS:
                for module in _modules_with(name.upper()):
                    former.append((module, name.upper(), module[name.upper()]))
                    module[name.upper()] = type(module[name.upper()])(value)
        yield
    finally:
        for module, constant, value in former:
            module[constant] = value


def _modules_with(constant: str) -> list[dict[str, Any]]:
    """Returns the names of each module of the coordinator and the client that has this constant or imported it."""
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith(("coordinator.", "tallystick.client."))]
    having = [names for names in modules if constant in names]
    if not having:
        raise ValueError(f"{constant}: expected a constant of the coordinator or the client")
    return having


def run_variant(scenario: Scenario, variant: Variant, progress: Callable[[float], None] = lambda _share: None) -> dict[str, Any]:
    """Runs a variant and returns its report, with the seconds of CPU time that the run took."""
    whole = ("nodes", "models", "payers", "seed", "wait", "shortlist_size")
    own: dict[str, Any] = {name: value for name, value in variant.constants.items() if name not in CONSTANTS}
    own |= {name: int(own[name]) for name in whole if name in own}
    changed = replace(scenario, **own)
    began = time.process_time()
    with overridden(variant.constants):
        simulation = Simulation(changed, BY_NAME[variant.policy])
        gc.collect()
        gc.freeze()  # parties and asks stay for the whole run, so the collector need not look at them again
        thresholds = gc.get_threshold()
        gc.set_threshold(_COLLECT_EVERY)
        try:
            simulation.run(progress)
        finally:
            gc.set_threshold(*thresholds)
            gc.unfreeze()
    return simulation.records.report() | {"cpu_seconds": round(time.process_time() - began, 1)}
