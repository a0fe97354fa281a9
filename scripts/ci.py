"""Everything that must pass before a change lands, in two lanes side by side: the suite, and other steps one after the other. The
tests with real engines come last.

A step's output is in build/ci/STEP.log. Its last line is printed, or all of it if the step fails. The first failure ends the
other lane, and its status is that of the run. SIGTERM and Ctrl-C end all steps. Run it with `.ci/run`, which installs what the
steps need.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
END_SECONDS = 60.0
"""How long a step has to end after SIGTERM."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and what it finds in its environment beside the inherited variables."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


SERVICES = {"TALLYSTICK_REQUIRE_SERVICES": "1"}
LANES = (
    (Step("suite", ("scripts/test",), SERVICES),),
    (
        Step("lint", ("scripts/lint",)),
        Step("contracts", ("scripts/build-contracts", "--check")),
        Step("pages", ("scripts/build-pages", "--check")),
        Step("docs", ("scripts/docs",)),
        Step("gas", ("scripts/bench", "gas", "--check")),
        Step("mutants", ("scripts/mutate-python", "--changed")),
        Step("wheel", ("scripts/test", "wheel")),
        Step("clients", ("scripts/test", "clients")),
    ),
)
LAST = (Step("engines", ("scripts/test", "engines"), SERVICES),)
"""Runs alone: real engines take all cores."""


def main() -> int:
    """Runs the command."""
    names = [step.name for lane in (*LANES, LAST) for step in lane]
    parser = argparse.ArgumentParser(prog=".ci/run", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}; default: all")
    chosen = parser.parse_args().steps
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"STEP: expected one of {', '.join(names)}, got {', '.join(unknown)}")
    *lanes, last = [[step for step in lane if not chosen or step.name in chosen] for lane in (*LANES, LAST)]
    logs = ROOT / "build" / "ci"
    logs.mkdir(parents=True, exist_ok=True)
    return asyncio.run(run_lanes(lanes, logs)) or asyncio.run(run_lanes([last], logs))


async def run_lanes(lanes: Sequence[Sequence[Step]], logs: Path) -> int:
    """Runs the lanes side by side, the steps of each in their order. Returns 0, or the status of the first step that fails."""
    loop, work, ended_by = asyncio.get_running_loop(), asyncio.ensure_future(_run_all(lanes, logs)), list[int]()

    def end(number: int) -> None:
        ended_by.append(number)
        work.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    try:
        return await work
    except asyncio.CancelledError:
        return 128 + ended_by[0]


async def _run_all(lanes: Sequence[Sequence[Step]], logs: Path) -> int:
    running = [asyncio.ensure_future(_run_lane(lane, logs)) for lane in lanes]
    try:
        for ended in asyncio.as_completed(running):
            if status := await ended:
                return status
        return 0
    finally:
        for lane in running:
            lane.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _run_lane(lane: Sequence[Step], logs: Path) -> int:
    for step in lane:
        began, log = time.monotonic(), logs / f"{step.name}.log"
        status = await _run(step, log)
        seconds = time.monotonic() - began
        if status:
            print(f"{log.read_text(errors='replace')}\n✗ {step.name}: status {status} after {seconds:.0f} s", flush=True)
            return status
        print(f"✓ {step.name}, {seconds:.0f} s: {_last_line(log)}", flush=True)
    return 0


def _last_line(log: Path) -> str:
    """What a step said at last, such as how many tests passed."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip("= ") for line in reversed(lines) if line.strip("= ")), "no output")


async def _run(step: Step, log: Path) -> int:
    """Runs a step in a process group of its own. Returns its exit status, as a shell shows it."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *step.command,
            cwd=ROOT,
            env=os.environ | step.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        status = await process.wait()
    finally:
        await _end(process)
    return status if status >= 0 else 128 - status


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends what runs of a step, if anything does: the process, and what it started in its group."""
    if process.returncode is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
    _signal(process, signal.SIGKILL)
    await process.wait()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
