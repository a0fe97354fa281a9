from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Tally

TALLY = str(Path(sys.executable).with_name("tally"))
SHELLS = ("bash", "zsh", "fish")


def _completions(shell: str, home: Path, line: str) -> str:
    """Returns what the shell offers after this command line."""
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    if shell == "fish":
        variables["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    environment = os.environ | variables | {"TALLYSTICK_HOME": str(home), "_TALLY_COMPLETE": f"complete_{shell}"}
    done = subprocess.run([TALLY], capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_shell_completion(tally: Tally, shell: str) -> None:
    """Commands, options, wallets and conversations complete in each shell; an empty home folder is no error."""
    assert "deposit" in _completions(shell, tally.home, "tally dep")
    assert "--json" in _completions(shell, tally.home, "tally chat --js")
    assert "savings" not in _completions(shell, tally.home, "tally balance --wallet s")
    tally.wallet("savings")
    for line in ("tally balance --wallet s", "tally wallet show s", "tally deposit 1 --owner s"):
        assert "savings" in _completions(shell, tally.home, line)
    assert "last" in _completions(shell, tally.home, "tally chat --resume l")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_script(shell: str) -> None:
    """The script calls `tally` back with the shell's own protocol."""
    environment = os.environ | {"_TALLY_COMPLETE": f"source_{shell}"}
    script = subprocess.run([TALLY], capture_output=True, text=True, env=environment, timeout=600, check=False).stdout
    assert f"_TALLY_COMPLETE=complete_{shell}" in script


def test_completion_loads_few_modules(tally: Tally) -> None:
    """Completion loads neither chain libraries nor a web server."""
    heavy = ("web3", "eth_tester", "uvicorn", "fastapi", "sqlalchemy", "openai", "prompt_toolkit", "eth_account", "aiohttp")
    code = f"import sys, tallystick.cli.commands; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == "[]"
