"""The real market for end-to-end tests: every process that a user would start, on free ports, with real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contracts.freshness import check_freshness

TALLY = (sys.executable, "-m", "tallystick.cli")
DEMO = (*TALLY, "demo", "--stand-in", "--json")


def clean_environment() -> dict[str, str]:
    """The environment without settings that would lead the demo to the user's engine or wallet."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "TALLY"))}


@pytest.fixture(scope="session")
def market() -> Iterator[dict[str, Any]]:
    """A running `tally demo --json`: the trace of its first job and the URLs of its services."""
    check_freshness()
    process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, text=True, env=clean_environment())
    try:
        yield read_trace(process)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0


def read_trace(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Reads the JSON object that the demo prints after its job is settled."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line == "}\n":
            break
    story: dict[str, Any] = json.loads("".join(lines))
    return story
