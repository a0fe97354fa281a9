"""The lanes of `.ci/run`, with short commands instead of the steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.ci import LANES, LAST, ROOT, Step, run_lanes

FOREVER = "sleep 1000 & echo $! >{}; wait"
"""A step that starts a process, whose id it writes to a file, and never ends by itself."""


def shell(name: str, script: str) -> Step:
    """A step that is a shell script."""
    return Step(name, ("sh", "-c", script))


def is_gone(pid: int) -> bool:
    """Whether a process has ended; it may still wait to be reaped by a parent that is not ours."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def wait_until_gone(pid: int) -> None:
    """Fails after a minute."""
    for _ in range(600):
        if is_gone(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"the process {pid} still runs")


async def test_lanes_run_side_by_side_and_their_steps_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each lane waits for the other here, so one after the other would never end; what succeeds is told in a line."""
    meet = "mkfifo {0}/{1} 2>/dev/null; : "
    first = shell("first", f"{meet.format(tmp_path, 'pipe')}; echo output; echo last; echo token >{tmp_path}/pipe")
    second = shell("second", f"{meet.format(tmp_path, 'pipe')}; cat {tmp_path}/pipe >{tmp_path}/read")
    third = shell("third", f"grep token {tmp_path}/read")
    assert await run_lanes([[first], [second, third]], tmp_path) == 0
    told = capsys.readouterr().out
    assert all(f"✓ {name}, " in told for name in ("first", "second", "third"))
    assert " s: last\n" in told
    assert "output" not in told.replace("no output", "")
    assert (tmp_path / "first.log").read_text() == "output\nlast\n"


async def test_a_failure_is_printed_and_ends_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step's output and status count; the other lane ends with all that it started, and no later step begins."""
    pid = tmp_path / "pid"
    fails = shell("fails", f"until [ -s {pid} ]; do sleep 0.05; done; echo what is wrong; exit 7")
    later = shell("later", f"touch {tmp_path}/began")
    assert await run_lanes([[shell("waits", FOREVER.format(pid))], [fails, later]], tmp_path) == 7
    told = capsys.readouterr().out
    assert "what is wrong" in told
    assert "✗ fails: status 7" in told
    assert not (tmp_path / "began").exists()
    wait_until_gone(int(pid.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_steps(tmp_path: Path, number: signal.Signals) -> None:
    """A run that is told to stop leaves no process, and its status says by what it ended."""
    pids = [tmp_path / "one", tmp_path / "two"]
    lanes = [[shell(pid.name, FOREVER.format(pid))] for pid in pids]
    program = (
        "import asyncio, pathlib, sys; from scripts.ci import Step, run_lanes; "
        f"sys.exit(asyncio.run(run_lanes({lanes!r}, pathlib.Path({str(tmp_path)!r}))))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        while not all(pid.exists() and pid.read_text() for pid in pids):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(120) == 128 + number
    finally:
        process.kill()
    for pid in pids:
        wait_until_gone(int(pid.read_text()))


async def test_a_step_that_a_signal_ends_has_failed(tmp_path: Path) -> None:
    """A step that was killed has the status that a shell shows."""
    assert await run_lanes([[shell("killed", "kill -KILL $$")]], tmp_path) == 128 + signal.SIGKILL


def test_every_step_is_a_script() -> None:
    """Each step's command exists and can be run, and names are unique, since each names a log."""
    steps = [step for lane in LANES for step in lane]
    assert len({step.name for step in steps}) == len(steps)
    assert all(os.access(ROOT / step.command[0], os.X_OK) for step in steps)


def test_services_may_not_be_missing() -> None:
    """In CI, no test is skipped for want of a service."""
    required = {
        step.name for lane in (*LANES, LAST) for step in lane if step.environment.get("TALLYSTICK_REQUIRE_SERVICES") == "1"
    }
    assert required == {"suite", "engines"}
