"""What a command shows of its work: on a terminal, in a pipe, with --json, without colours, and when it is interrupted."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

WORK = """
import sys, threading
from tallystick.cli.output import step
from tallystick.cli.progress import Unit, activity
with activity("weighing [red]foreign\\x1b[2J text") as first:
    with activity("counting") as second:
        second.update(done=3, total=7)
        sys.stdin.readline()
    with activity("fetching", 10 << 20, Unit.BYTES) as third:
        threading.Thread(target=lambda: third.advance(4 << 20)).start()
        step("a line")
        sys.stdin.readline()
print("result")
"""
WAITING = """
import asyncio, signal, typer
from tallystick.cli.progress import run_shown
app = typer.Typer()
async def work() -> None:
    print("begun", flush=True)
    await asyncio.sleep(600)
@app.command()
def wait() -> None:
    run_shown("waiting for nothing", work())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it, and so do its children
app()
"""
ERASE_LINE = b"\x1b[2K"
DEADLINE = 120


class Terminal:
    """A program whose stderr is a terminal, with what it wrote there until now."""

    def __init__(self, code: str, *arguments: str, **environment: str) -> None:
        own, other = pty.openpty()
        clean = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR", "TERM"}}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=other,
            env=clean | {"TERM": "xterm"} | environment,
        )
        os.close(other)
        self._own, self._changed, self.shown, self._ended = own, threading.Condition(), b"", False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._own, 1 << 16)
            except OSError:  # the program has ended
                part = b""
            with self._changed:
                self.shown += part
                self._ended = not part
                self._changed.notify_all()
            if not part:
                return

    def await_text(self, text: bytes) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.shown or self._ended, DEADLINE)
        assert text in self.shown, self.shown

    def enter(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def finish(self) -> bytes:
        """What it wrote to stdout, once it has ended."""
        stdout, _ = self.process.communicate(timeout=DEADLINE)
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended, DEADLINE)
        os.close(self._own)
        return bytes(stdout)


def test_terminal_shows_each_work_and_erases_it() -> None:
    """Foreign text steers nothing, results alone go to stdout, and the cursor is shown at the end."""
    terminal = Terminal(WORK)
    terminal.await_text(b"3/7")
    assert b"weighing [red]foreign[2J text" in terminal.shown
    terminal.enter()
    terminal.await_text(b"4/10 MiB")
    terminal.await_text(b"a line")
    terminal.enter()
    assert terminal.finish() == b"result\n"
    assert terminal.process.returncode == 0
    last = terminal.shown.rpartition(b"fetching")[2]
    assert ERASE_LINE in last
    assert terminal.shown.rfind(b"\x1b[?25h") > terminal.shown.rfind(b"\x1b[?25l")
    assert b"\x1b[2J" not in terminal.shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "unknown"}])
def test_plain_terminal_gets_lines_without_escapes(environment: dict[str, str]) -> None:
    """A terminal without colours or cursor movements gets one line for each piece of work."""
    terminal = Terminal(WORK, **environment)
    terminal.enter()
    terminal.enter()
    assert terminal.finish() == b"result\n"
    lines = terminal.shown.decode().splitlines()
    assert [line.strip() for line in lines] == ["weighing [red]foreign[2J text …", "counting …", "fetching …", "✓ a line"]
    assert b"\x1b" not in terminal.shown


def test_json_shows_nothing_on_a_terminal() -> None:
    """A program that reads JSON is not disturbed by progress, even if it passes its terminal on."""
    terminal = Terminal(WORK, "--json")
    terminal.enter()
    terminal.enter()
    assert terminal.finish() == b"result\n"
    assert b"counting" not in terminal.shown
    assert b"fetching" not in terminal.shown


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}])
def test_pipe_gets_nothing_of_it(environment: dict[str, str]) -> None:
    """A pipe gets results and lines that stay, and no progress, whatever the environment says of colours."""
    arguments, everything = [sys.executable, "-c", WORK], os.environ | environment
    ended = subprocess.run(arguments, input=b"\n\n", capture_output=True, timeout=DEADLINE, check=True, env=everything)
    assert ended.stdout == b"result\n"
    assert b"counting" not in ended.stderr
    assert b"fetching" not in ended.stderr


def test_interrupt_leaves_a_clean_terminal() -> None:
    """Ctrl-C ends the work without a traceback, erases its line and leaves the cursor visible."""
    terminal = Terminal(WAITING)
    terminal.await_text(b"waiting for nothing")
    assert terminal.process.stdout is not None
    assert terminal.process.stdout.readline() == b"begun\n"
    terminal.process.send_signal(signal.SIGINT)
    terminal.finish()
    assert terminal.process.returncode == 130
    assert b"Traceback" not in terminal.shown
    assert ERASE_LINE in terminal.shown.rpartition(b"waiting for nothing")[2]
    assert terminal.shown.rfind(b"\x1b[?25h") > terminal.shown.rfind(b"\x1b[?25l")
