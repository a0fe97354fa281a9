"""Which modules `tally` and the package load: a command that loads what it does not need is slow to start. Nothing is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tallystick.runtime.keystore import create_keystore

SERVERS = {"uvicorn", "fastapi", "starlette", "websockets"}
CHAINS = {"web3", "eth_tester", "eth", "eth_account", "py_ecc"}
NEVER = SERVERS | CHAINS | {"alembic", "openai", "prompt_toolkit", "numpy"}
DATABASE, HTTP, LOGS, SEALS = {"sqlalchemy"}, {"aiohttp"}, {"structlog"}, {"cryptography"}
NOBODY = "http://127.0.0.1:9"
COMMANDS = {
    "--help": NEVER | DATABASE | HTTP | LOGS | SEALS,
    "--version": NEVER | DATABASE | HTTP | LOGS | SEALS,
    "wallet list": NEVER | DATABASE | HTTP | SEALS,
    "wallet show main": NEVER | DATABASE | HTTP | SEALS,
    "wallet new": NEVER | DATABASE | HTTP,
    "spending --wallet main": NEVER | HTTP,
    "job list --wallet main": NEVER | HTTP,
    "receipt evidence --wallet main": NEVER | HTTP,
    f"models --coordinator {NOBODY}": NEVER | DATABASE,
    f"explain m --coordinator {NOBODY}": NEVER | DATABASE,
    f"log head --coordinator {NOBODY}": NEVER | DATABASE,
    f"balance --wallet main --coordinator {NOBODY}": NEVER | DATABASE,
    "node status": NEVER | DATABASE | HTTP,
    "node why": NEVER | DATABASE,
    "node earnings": NEVER,
    "node doctor": NEVER | DATABASE,
}
"""What no run of a command may load. Where nothing is configured, a command gets as far as its first error."""


def _loaded(*arguments: str, home: Path | None = None) -> set[str]:
    """The modules that Python loads for these arguments."""
    environment = os.environ | {"TALLYSTICK_HOME": str(home), "TALLYSTICK_PASSWORD": "pass"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        stdin=subprocess.DEVNULL,
        timeout=600,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_loads_what_it_needs(tmp_path: Path, command: str) -> None:
    """No command loads a server, a chain or a migration tool; those without a database or a network load neither."""
    create_keystore(tmp_path / "keys" / "main.json", "pass", cost=1 << 12)
    for _ in range(1 if COMMANDS[command] >= DATABASE else 2):  # the first run with a ledger makes it, by a migration
        loaded = _loaded("-m", "tallystick.cli", *command.split(), home=tmp_path)
    assert "tallystick.cli.main" in loaded
    assert {name.partition(".")[0] for name in loaded} & COMMANDS[command] == set()
    if "typer.rich_utils" not in loaded:  # which prints help, and errors of usage, with colours
        assert "pygments.token" not in loaded  # an import that fails is listed by its name alone


def test_the_package_loads_next_to_nothing() -> None:
    """`import tallystick` loads its version alone: some forty modules beside those of an empty program."""
    own = _loaded("-c", "import tallystick") - _loaded("-c", "pass")
    assert {name for name in own if name.startswith("tallystick")} == {"tallystick", "tallystick.version"}
    assert len(own) < 45


def test_the_settings_of_a_node_load_no_engine() -> None:
    """Commands that read a node's config load neither its store nor its connections."""
    own = _loaded("-c", "import node.service.config")
    assert {name.partition(".")[0] for name in own} & (NEVER | DATABASE | HTTP | LOGS) == set()
