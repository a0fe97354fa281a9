"""Mutation check of the Python modules on the money path: lists the mutants that their tests do not kill. Comparisons are shifted
and inverted, arithmetic and boolean operators are swapped, and raises are removed, one at a time; each mutated module must fail
its own tests. tests/mutants.json has the reason for each mutant that may survive, since its change is not observable, and a
digest of each checked function: `--changed` checks the other functions only.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.util
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import Phase, settings

from scripts.python_mutants import Mutant, mutants, place_digests

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "mutants.json"
SECONDS, CPU_SECONDS = 120, 30
"""Limits of wall-clock and CPU time. A mutant whose tests exceed one counts as killed, since it does not terminate."""
PRELOADED = (
    "aiohttp.web",
    "alembic.command",
    "coincurve",
    "cryptography.hazmat.primitives.hpke",
    "eth_tester",
    "fastapi",
    "httpx",
    "orjson",
    "prometheus_client",
    "pytest_asyncio.plugin",
    "schemathesis.pytest.plugin",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.ext.asyncio",
    "structlog",
    "uvicorn",
)
"""Modules that are imported once here instead of once in every child process."""

CHECKED: dict[str, tuple[str, ...]] = {
    "tallystick/protocol/tab.py": ("tests/protocol/test_tab.py",),
    "tallystick/protocol/pricing.py": ("tests/protocol/test_pricing.py",),
    "tallystick/protocol/jobs.py": ("tests/protocol/test_jobs.py",),
    "coordinator/domain/exposure.py": ("tests/coordinator/domain/test_exposure.py",),
    "coordinator/jobs/receipts.py": (
        "tests/coordinator/jobs/test_receipts.py",
        "tests/coordinator/jobs/test_market_bills.py",
        "tests/coordinator/jobs/test_receipts_strangers.py",
    ),
    "coordinator/jobs/reputation_updates.py": (
        "tests/coordinator/jobs/test_market_bills.py",
        "tests/coordinator/jobs/test_market_failover.py",
    ),
    "node/domain/tabs.py": ("tests/node/domain/test_tabs.py", "tests/node/domain/test_credit_limits.py"),
    "node/domain/signed_ceilings.py": ("tests/node/domain/test_signed_ceilings.py",),
    "node/domain/credit_limits.py": ("tests/node/domain/test_credit_limits.py",),
    "node/domain/order_admission.py": ("tests/node/domain/test_order_admission.py",),
    "node/domain/usage_meter.py": ("tests/node/domain/test_usage_meter.py",),
    "node/domain/earned_money.py": ("tests/node/domain/test_earned_money.py",),
    "node/domain/payout_policy.py": ("tests/node/domain/test_payout_policy.py",),
    "node/jobs/coordinator_credit.py": ("tests/node/jobs/test_coordinator_credit.py",),
    "tallystick/client/orders/tab.py": (
        "tests/client/orders/test_tab.py",
        "tests/client/orders/test_tab_concurrent_jobs.py",
        "tests/client/recovery/test_lost_state_totals.py",
    ),
    "tallystick/client/orders/signing.py": ("tests/client/orders/test_signing.py", "tests/client/orders/test_tab.py"),
    "tallystick/client/receipts/delivery_check.py": (
        "tests/client/receipts/test_delivery_check.py",
        "tests/client/receipts/test_price_check.py",
    ),
    "tallystick/client/receipts/price_check.py": (
        "tests/client/receipts/test_price_check.py",
        "tests/client/receipts/test_delivery_check.py",
    ),
    "tallystick/client/receipts/sequence_check.py": ("tests/client/receipts/test_sequence_check.py",),
    "tallystick/client/ledger/open_orders.py": (
        "tests/client/ledger/test_open_orders.py",
        "tests/client/recovery/test_reconciler_lost_streams.py",
        "tests/client/recovery/test_lost_state_totals.py",
    ),
    "tallystick/client/ledger/repair.py": (
        "tests/client/ledger/test_repair.py",
        "tests/client/ledger/test_retention.py",
        "tests/client/recovery/test_lost_state_totals.py",
    ),
    "tallystick/client/recovery/lost_state.py": (
        "tests/client/recovery/test_lost_state.py",
        "tests/client/recovery/test_lost_state_totals.py",
    ),
    "tallystick/client/receipts/token_audit.py": ("tests/client/receipts/test_token_audit.py",),
    "tallystick/client/ledger/budgets.py": ("tests/client/ledger/test_budgets.py",),
    "tallystick/client/ledger/spending.py": ("tests/client/ledger/test_budgets.py", "tests/client/jobs/test_job_hedging.py"),
    "tallystick/client/ledger/upstream_spending.py": ("tests/client/ledger/test_upstream_spending.py",),
    "tallystick/client/upstreams/metering.py": ("tests/client/upstreams/test_metering.py",),
}
"""The modules on the money path, with their tests."""


@dataclass(frozen=True, slots=True)
class SelectedMutant:
    """A mutant, the path of its module, and the module's tests."""

    mutant: Mutant
    path: str
    tests: tuple[str, ...]


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/mutate-python", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only mutants whose name contains this, such as node/domain/tabs.py"
    )
    parser.add_argument("--changed", action="store_true", help="only functions whose code is not recorded as checked")
    parser.add_argument("--record", action="store_true", help="record the tested functions as checked")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of parallel processes (%(default)s)")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text())
    reasons: dict[str, str] = record["equivalent"]
    all_mutants = list(_all_mutants())
    names = {selected.mutant.name for selected in all_mutants}
    selection = [
        c for c in all_mutants if options.only in c.mutant.name and not (options.changed and _checked(c, record["checked"]))
    ]
    if options.list:
        print("\n".join(f"{selected.mutant.line:4} {selected.mutant.name}" for selected in selection))
        return 0
    problems = [f"tests/mutants.json: no such mutant: {name}" for name in reasons if name not in names]
    problems += _test_unmodified(sorted({test for selected in selection for test in selected.tests}))
    if not problems:
        problems = _run(selection, reasons, options.jobs)
    print("\n".join(problems) or f"every mutant is killed ({len(selection)} tested)")
    if options.record and not problems:
        _record(record, selection)
    return 1 if problems else 0


def _all_mutants() -> Iterator[SelectedMutant]:
    for path, tests in CHECKED.items():
        for mutant in mutants((ROOT / path).read_text(), path):
            yield SelectedMutant(mutant, path, tests)


def _checked(selected: SelectedMutant, checked: dict[str, dict[str, str]]) -> bool:
    digests = place_digests((ROOT / selected.path).read_text())
    return checked.get(selected.path, {}).get(selected.mutant.place) == digests[selected.mutant.place]


def _record(record: dict[str, dict[str, dict[str, str]]], selection: Sequence[SelectedMutant]) -> None:
    for path in CHECKED:
        digests, completed = place_digests((ROOT / path).read_text()), record["checked"].setdefault(path, {})
        tried = {selected.mutant.place for selected in selection if selected.path == path}
        record["checked"][path] = {
            name: digest for name, digest in digests.items() if name in tried or completed.get(name) == digest
        }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _test_unmodified(tests: Sequence[str]) -> list[str]:
    for name in PRELOADED:
        importlib.import_module(name)
    # The same examples for every mutant and in every run, without shrinking: killing a mutant must not depend on chance.
    settings.register_profile("mutants", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutants")
    if not tests or _wait(_start(None, tests)):
        return []
    return ["the tests fail on the unmodified code"]


def _run(selection: Sequence[SelectedMutant], reasons: dict[str, str], jobs: int) -> list[str]:
    """Tests each mutant in a child process. Returns those that survive without a reason, and those that are killed in spite of
    one.
    """
    problems, waiting, running = list[str](), list(reversed(selection)), dict[int, tuple[SelectedMutant, float]]()
    completed = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            selected = waiting.pop()
            running[_start(selected, selected.tests)] = (selected, time.monotonic())
        child, status = os.wait()
        selected, began = running.pop(child)
        survived = os.waitstatus_to_exitcode(status) == 0
        completed += 1
        verdict, name = "survived" if survived else "killed", selected.mutant.name
        print(
            f"{completed:4}/{len(selection)} {verdict:8} {time.monotonic() - began:5.1f} s  {selected.mutant.line}: {name}",
            flush=True,
        )
        if survived != (name in reasons):
            problems.append(
                f"survived: {name}" if survived else f"killed, although tests/mutants.json lists it as a survivor: {name}"
            )
    return problems


def _wait(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _start(selected: SelectedMutant | None, tests: Sequence[str]) -> int:
    """Starts a child process that runs tests, with a mutated module if one is given. Its exit status is pytest's."""
    child = os.fork()
    if child:
        return child
    signal.alarm(SECONDS)
    if selected is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        name = selected.path.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, _MutatedModuleFinder(name, selected.mutant.source, ROOT / selected.path))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        failed = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:schemathesis", *tests])
    os._exit(int(failed))


class _MutatedModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from the given source."""

    def __init__(self, name: str, source: str, path: Path) -> None:
        self._name, self._source, self._path = name, source, path

    def find_spec(self, name: str, _path: object, _target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self._path, loader=self) if name == self._name else None

    def create_module(self, _spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, str(self._path), "exec"), vars(module))  # noqa: S102 - runs the mutated module


if __name__ == "__main__":
    sys.exit(main())
