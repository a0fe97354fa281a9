"""Mutation check of the escrow: lists the mutants that no test kills. Comparisons are flipped, conditions and statements
(requires, reverts, state updates, events, modifiers) are removed, and operators are swapped, one at a time; each mutant is
compiled and must fail the tests. contracts/mutants.json has the reason for each mutant that may survive, since it behaves as the
contract does. Compiled code is cached in build/mutants.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from scripts.contract_mutants import PARTS, SOURCES, Mutant, mutants
from tallystick.chain.codec import load_abi
from tests.contracts import test_invariants  # noqa: F401 - imported once here instead of once in every child process

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "mutants"
REASONS = ROOT / "contracts" / "mutants.json"
TESTS = ("bad_input", "attacks", "metamorphic", "settlement", "tabs", "purses", "stakes", "tokens", "invariants")
QUICK = 10
ORIGINAL = Mutant("unmodified contract", "Escrow.sol", 0, 0, 0, "")


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="scripts/mutate-contracts", description=__doc__)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only mutants whose name contains this, such as Settlement.sol"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} mutants, chosen at random")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    options = parser.parse_args()
    reasons: dict[str, str] = json.loads(REASONS.read_text())
    all_mutants = [mutant for path in PARTS for mutant in mutants(path)]
    selection = [mutant for mutant in all_mutants if options.only in mutant.name]
    if options.quick:
        selection = random.SystemRandom().sample([m for m in selection if m.name not in reasons], min(QUICK, len(selection)))
    if options.list:
        print("\n".join(f"{mutant.line:4} {mutant.name}" for mutant in selection))
        return 0
    stale = [name for name in reasons if name not in {mutant.name for mutant in all_mutants}]
    problems = [f"contracts/mutants.json: no such mutant: {name}" for name in stale] + _run(selection, reasons)
    print("\n".join(problems) or "every mutant is killed")
    return 1 if problems else 0


def _run(selection: list[Mutant], reasons: dict[str, str]) -> list[str]:
    """Compiles and tests each mutant. Returns those that survive without a reason, and those that are killed in spite of one."""
    problems, counts = list[str](), dict.fromkeys(("killed", "survived", "no code"), 0)
    codes = _compiled([ORIGINAL, *selection])
    _, original = next(codes)
    if original is None or _is_killed(original):
        return ["the tests fail on the unmodified contract"]
    for number, (mutant, code) in enumerate(codes, 1):
        began = time.monotonic()
        verdict = "no code" if code is None else "survived" if code == original or not _is_killed(code) else "killed"
        counts[verdict] += 1
        expected = mutant.name in reasons
        print(
            f"{number:3}/{len(selection)} {verdict:8} {time.monotonic() - began:5.1f} s  {mutant.line}: {mutant.name}", flush=True
        )
        if (verdict == "survived") != expected:
            problems.append(
                f"{verdict}, although contracts/mutants.json lists it as a survivor: {mutant.name}"
                if expected
                else f"survived: {mutant.name}"
            )
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return problems


def _compiled(selection: list[Mutant]) -> Iterator[tuple[Mutant, bytes | None]]:
    """Yields each mutant with its creation code, or None if the compiler refuses it. The compiler works ahead of the tests."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = b"".join(path.read_bytes() for path in [*sorted(SOURCES.rglob("*.sol")), *sorted(SOURCES.parent.glob("*.mjs"))])
    cached = {m: CACHE / sha256(sources + m.path.encode() + m.text().encode()).hexdigest()[:32] for m in selection}
    missing = [mutant for mutant in selection if not cached[mutant].exists()]
    lines = "".join(json.dumps({"path": f"src/{m.path}", "text": m.text()}) + "\n" for m in missing)
    with TemporaryFile() as jobs:
        jobs.write(lines.encode())
        jobs.seek(0)
        with subprocess.Popen(["node", "mutate.mjs"], cwd=ROOT / "contracts", stdin=jobs, stdout=subprocess.PIPE) as compiler:
            for mutant in selection:
                if mutant in missing and compiler.stdout:
                    cached[mutant].write_text(json.loads(compiler.stdout.readline()).get("bytecode", ""))
                yield mutant, bytes.fromhex(cached[mutant].read_text()) or None


def _is_killed(code: bytes) -> bool:
    """Whether a test fails with this code. The tests run in a child process, in which the escrow's code is replaced."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    load_abi("Escrow").bytecode = code
    files = [f"tests/contracts/test_{name}.py" for name in TESTS]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        failed = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files])
    os._exit(int(failed))


if __name__ == "__main__":
    sys.exit(main())
