"""The scripts that start services for tests: what a missing service costs, and what is left after the command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
MISSING = {
    "with-postgres": ("No PostgreSQL: ", {"POSTGRES_BIN": "/nowhere"}, "TALLYSTICK_TEST_POSTGRES"),
    "with-anvil": ("No anvil: ", {"ANVIL": "/bin/false"}, "TALLYSTICK_TEST_ANVIL"),
}


def run(script: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs one of the scripts without the services of this test run."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TALLYSTICK_TEST_")}
    return subprocess.run(  # the project's own script
        [SCRIPTS / script, *command], env=inherited | environment, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.mark.parametrize("script", MISSING)
def test_a_service_that_cannot_be_had_is_told_in_one_line(script: str) -> None:
    """An optional one is gone without, and the command's own status is kept; otherwise the script fails."""
    line, environment, _ = MISSING[script]
    result = run(script, "--optional", "sh", "-c", "echo ran; exit 7", **environment)
    assert (result.returncode, result.stdout) == (7, "ran\n")
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    result = run(script, "echo", "ran", **environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert line in result.stderr


@pytest.mark.parametrize("script", MISSING)
def test_a_service_that_is_named_already_is_used(script: str) -> None:
    """Nothing is started beside it."""
    _, environment, variable = MISSING[script]
    result = run(script, "--optional", "sh", "-c", f"echo ${variable}", **environment | {variable: "mine"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "mine\n", "")
