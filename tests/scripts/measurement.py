"""Runs a benchmark or simulation as its users do."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def run_measurement(module: str, *options: str, seconds: float = 1_000) -> Any:
    """Returns the JSON that `scripts.MODULE` prints. A failure shows what it wrote to standard error."""
    command = [sys.executable, "-m", f"scripts.{module}", *options]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert finished.returncode == 0, finished.stderr[-8_000:]
    return json.loads(finished.stdout)
