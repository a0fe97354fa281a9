"""Variants of the market that are compared: a policy, and values of constants in place of the defaults."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from scripts.simulation.policies import BY_NAME
from scripts.simulation.scenario import Scenario
from scripts.simulation.simulation import Simulation

CONSTANTS: dict[str, tuple[str, ...]] = {
    "near_tie": ("coordinator.domain.ask_index.NEAR_TIE", "coordinator.domain.ranking.NEAR_TIE"),
    "explored": ("coordinator.domain.ranking.EXPLORED",),
    "min_weight": ("coordinator.domain.job_queue.MIN_WEIGHT",),
    "grant_seconds": ("coordinator.domain.job_queue.GRANT_SECONDS",),
}
"""Constants of the coordinator, and where they are. Fields of a scenario can be set too."""
SWEEPS: dict[str, tuple[float, ...]] = {
    "near_tie": (10_000, 1_000, 100, 50, 20, 10),
    "explored": (0.0, 0.02, 0.05, 0.1, 0.2),
    "min_weight": (1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    "grant_seconds": (2.0, 5.0, 15.0, 60.0),
    "wait": (15, 30, 60, 120, 300),
    "shortlist_size": (1, 2, 3, 5, 8),
    "shortlist_seconds": (0.0, 5.0, 20.0),
    "load": (0.3, 0.6, 0.9),
    "seed": (1, 2, 3),
}
"""Values that `--sweep` tries, one constant at a time."""


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


def sweep_variants() -> list[Variant]:
    """Returns the variants of all sweeps."""
    return [Variant("as_shipped", {name: value}) for name, values in SWEEPS.items() for value in values]


@contextlib.contextmanager
def overridden(constants: Mapping[str, float]) -> Iterator[None]:
    """Gives constants of the coordinator other values for a while."""
    former: list[tuple[Any, str, Any]] = []
    try:
        for name, value in constants.items():
            for place in CONSTANTS.get(name, ()):
                module, _, attribute = place.rpartition(".")
                owner = importlib.import_module(module)
                former.append((owner, attribute, getattr(owner, attribute)))
                setattr(owner, attribute, type(getattr(owner, attribute))(value))
        yield
    finally:
        for owner, attribute, value in former:
            setattr(owner, attribute, value)


def run_variant(scenario: Scenario, variant: Variant, progress: Callable[[float], None] = lambda _share: None) -> dict[str, Any]:
    """Runs a variant and returns its report, with the seconds of CPU time that the run took."""
    whole = ("nodes", "models", "payers", "seed", "wait", "shortlist_size")
    own = {name: value for name, value in variant.constants.items() if name not in CONSTANTS}
    changed = replace(scenario, **{name: int(value) if name in whole else value for name, value in own.items()})
    began = time.process_time()
    with overridden(variant.constants):
        simulation = Simulation(changed, BY_NAME[variant.policy])
        simulation.run(progress)
    return simulation.records.report() | {"cpu_seconds": round(time.process_time() - began, 1)}
