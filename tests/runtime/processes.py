"""Processes for tests: a script of this project runs in a new interpreter and reports on its standard output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 60


@contextmanager
def script(text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Runs Python source in a process of its own, which is killed at the end if it is still running."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", text, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """Returns the next line that the process prints; fails with its errors if it ended instead."""
    assert process.stdout is not None
    printed = process.stdout.readline()
    assert printed, f"it ended: {process.communicate()[1]}"
    return printed.rstrip("\n")
