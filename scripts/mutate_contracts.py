"""Breaks the escrow in one place at a time, and lists what no test noticed.

Comparisons are flipped, conditions and statements (requires, reverts, updates of state, events, modifiers) are left out, and
operators are swapped, one at a time; each broken contract is compiled and must fail the tests. contracts/mutants.json gives the
reason for each that may survive, since it does the same as the contract. Compiled code is kept in build/mutants.
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
from tests.contracts import test_invariants  # noqa: F401 - loaded once here rather than once in every child

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "mutants"
REASONS = ROOT / "contracts" / "mutants.json"
TESTS = ("bad_input", "attacks", "metamorphic", "settlement", "tabs", "purses", "stakes", "tokens", "invariants")
QUICK = 10
UNBROKEN = Mutant("the contract as it is", "Escrow.sol", 0, 0, 0, "")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/mutate-contracts", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="only breaks whose name contains this, such as Settlement.sol")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} breaks at random, other ones every time")
    parser.add_argument("--list", action="store_true", help="only name the breaks")
    options = parser.parse_args()
    reasons: dict[str, str] = json.loads(REASONS.read_text())
    every = [mutant for path in PARTS for mutant in mutants(path)]
    chosen = [mutant for mutant in every if options.only in mutant.name]
    if options.quick:
        chosen = random.SystemRandom().sample([m for m in chosen if m.name not in reasons], min(QUICK, len(chosen)))
    if options.list:
        print("\n".join(f"{mutant.line:4} {mutant.name}" for mutant in chosen))
        return 0
    stale = [name for name in reasons if name not in {mutant.name for mutant in every}]
    wrong = [f"no such break any more: {name}" for name in stale] + _run(chosen, reasons)
    print("\n".join(wrong) or "every break is noticed")
    return 1 if wrong else 0


def _run(chosen: list[Mutant], reasons: dict[str, str]) -> list[str]:
    """Compiles and tests each; what survived without a reason, or has a reason and was noticed."""
    wrong, counts = list[str](), dict.fromkeys(("killed", "survived", "no code"), 0)
    codes = _compiled([UNBROKEN, *chosen])
    _, whole = next(codes)
    if whole is None or _noticed(whole):
        return ["the tests fail on the contract as it is"]
    for number, (mutant, code) in enumerate(codes, 1):
        began = time.monotonic()
        verdict = "no code" if code is None else "survived" if code == whole or not _noticed(code) else "killed"
        counts[verdict] += 1
        expected = mutant.name in reasons
        print(f"{number:3}/{len(chosen)} {verdict:8} {time.monotonic() - began:5.1f} s  {mutant.line}: {mutant.name}", flush=True)
        if (verdict == "survived") != expected:
            wrong.append(f"{verdict}, though mutants.json excuses it: {mutant.name}" if expected else f"survived: {mutant.name}")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return wrong


def _compiled(chosen: list[Mutant]) -> Iterator[tuple[Mutant, bytes | None]]:
    """Each with its creation code, None where the compiler refuses it. The compiler works ahead of the tests."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = b"".join(path.read_bytes() for path in [*sorted(SOURCES.rglob("*.sol")), *sorted(SOURCES.parent.glob("*.mjs"))])
    kept = {m: CACHE / sha256(sources + m.path.encode() + m.text().encode()).hexdigest()[:32] for m in chosen}
    missing = [mutant for mutant in chosen if not kept[mutant].exists()]
    lines = "".join(json.dumps({"path": f"src/{m.path}", "text": m.text()}) + "\n" for m in missing)
    with TemporaryFile() as jobs:
        jobs.write(lines.encode())
        jobs.seek(0)
        with subprocess.Popen(["node", "mutate.mjs"], cwd=ROOT / "contracts", stdin=jobs, stdout=subprocess.PIPE) as compiler:
            for mutant in chosen:
                if mutant in missing and compiler.stdout:
                    kept[mutant].write_text(json.loads(compiler.stdout.readline()).get("bytecode", ""))
                yield mutant, bytes.fromhex(kept[mutant].read_text()) or None


def _noticed(code: bytes) -> bool:
    """Whether a test fails on this code; tests run in a child, where the escrow's code is this one."""
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
