"""Breaks the Python code that money passes through, in one place at a time, and lists what the tests of that code did not notice.

Comparisons are shifted and turned, arithmetic and boolean operators are swapped, and raises are left out, one at a time; each
broken module must fail its own tests. tests/mutants.json gives the reason for each break that may survive, since it changes
nothing that anybody can observe, and a digest of each function that was checked: `--changed` checks the others only.
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

from scripts.python_mutants import Mutant, mutants, places

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "tests" / "mutants.json"
SECONDS, CPU_SECONDS = 120, 30
"""A break whose tests run for longer, waiting or reckoning, counts as noticed: it does not end."""
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
"""Loaded once here rather than once in every child."""

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
    "node/domain/signed_caps.py": ("tests/node/domain/test_signed_caps.py",),
    "node/domain/credit_limits.py": ("tests/node/domain/test_credit_limits.py",),
    "node/domain/order_admission.py": ("tests/node/domain/test_order_admission.py",),
    "node/domain/usage_meter.py": ("tests/node/domain/test_usage_meter.py",),
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
        "tests/client/recovery/test_lost_state_totals.py",
    ),
    "tallystick/client/recovery/lost_state.py": (
        "tests/client/recovery/test_lost_state.py",
        "tests/client/recovery/test_lost_state_totals.py",
    ),
    "tallystick/client/receipts/token_audit.py": ("tests/client/receipts/test_token_audit.py",),
    "tallystick/client/ledger/budgets.py": ("tests/client/ledger/test_budgets.py",),
}
"""The modules that money passes through, and the tests of each."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A break, the module that it is in, and that module's tests."""

    mutant: Mutant
    path: str
    tests: tuple[str, ...]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/mutate-python", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only breaks whose name contains this, such as node/domain/tabs.py"
    )
    parser.add_argument("--changed", action="store_true", help="only functions that were not checked as they are now")
    parser.add_argument("--record", action="store_true", help="write down that what was checked now is checked")
    parser.add_argument("--list", action="store_true", help="only name the breaks")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text())
    reasons: dict[str, str] = record["equivalent"]
    every = list(_every())
    known = {choice.mutant.name for choice in every}
    chosen = [c for c in every if options.only in c.mutant.name and not (options.changed and _checked(c, record["checked"]))]
    if options.list:
        print("\n".join(f"{choice.mutant.line:4} {choice.mutant.name}" for choice in chosen))
        return 0
    wrong = [f"no such break any more: {name}" for name in reasons if name not in known]
    wrong += _unbroken(sorted({test for choice in chosen for test in choice.tests}))
    if not wrong:
        wrong = _run(chosen, reasons, options.jobs)
    print("\n".join(wrong) or f"every break is noticed ({len(chosen)} tried)")
    if options.record and not wrong:
        _write_down(record, chosen)
    return 1 if wrong else 0


def _every() -> Iterator[Chosen]:
    for path, tests in CHECKED.items():
        for mutant in mutants((ROOT / path).read_text(), path):
            yield Chosen(mutant, path, tests)


def _checked(choice: Chosen, checked: dict[str, dict[str, str]]) -> bool:
    now = places((ROOT / choice.path).read_text())
    return checked.get(choice.path, {}).get(choice.mutant.place) == now[choice.mutant.place]


def _write_down(record: dict[str, dict[str, dict[str, str]]], chosen: Sequence[Chosen]) -> None:
    for path in CHECKED:
        now, done = places((ROOT / path).read_text()), record["checked"].setdefault(path, {})
        tried = {choice.mutant.place for choice in chosen if choice.path == path}
        record["checked"][path] = {name: digest for name, digest in now.items() if name in tried or done.get(name) == digest}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _unbroken(tests: Sequence[str]) -> list[str]:
    for name in PRELOADED:
        importlib.import_module(name)
    # The same examples for every break and in every run, and none made smaller: whether a break is noticed is no matter of luck.
    settings.register_profile("mutants", derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutants")
    if not tests or _wait(_start(None, tests)):
        return []
    return ["the tests fail on the code as it is"]


def _run(chosen: Sequence[Chosen], reasons: dict[str, str], jobs: int) -> list[str]:
    """Tests each break in a child of its own; returns what survived without a reason, or was noticed in spite of one."""
    wrong, waiting, running = list[str](), list(reversed(chosen)), dict[int, tuple[Chosen, float]]()
    done = 0
    while waiting or running:
        while waiting and len(running) < jobs:
            choice = waiting.pop()
            running[_start(choice, choice.tests)] = (choice, time.monotonic())
        child, status = os.wait()
        choice, began = running.pop(child)
        survived = os.waitstatus_to_exitcode(status) == 0
        done += 1
        verdict, name = "survived" if survived else "killed", choice.mutant.name
        print(f"{done:4}/{len(chosen)} {verdict:8} {time.monotonic() - began:5.1f} s  {choice.mutant.line}: {name}", flush=True)
        if survived != (name in reasons):
            wrong.append(f"survived: {name}" if survived else f"killed, though mutants.json excuses it: {name}")
    return wrong


def _wait(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _start(choice: Chosen | None, tests: Sequence[str]) -> int:
    """A child in which a module is broken, running tests; its exit status is pytest's."""
    child = os.fork()
    if child:
        return child
    signal.alarm(SECONDS)
    if choice is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        name = choice.path.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, _Broken(name, choice.mutant.source, ROOT / choice.path))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        failed = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:schemathesis", *tests])
    os._exit(int(failed))


class _Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from a source given here."""

    def __init__(self, name: str, source: str, path: Path) -> None:
        self._name, self._source, self._path = name, source, path

    def find_spec(self, name: str, _path: object, _target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self._path, loader=self) if name == self._name else None

    def create_module(self, _spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, str(self._path), "exec"), vars(module))  # noqa: S102 - the point of it


if __name__ == "__main__":
    sys.exit(main())
