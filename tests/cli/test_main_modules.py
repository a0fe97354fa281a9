"""Which modules `tally` and the package load: a command that loads what it does not need is slow to start. Nothing is timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tallystick.cli.commands import app as app_of_all
from tallystick.cli.daemons import daemon_app
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
    assert "tallystick.cli.commands" in loaded
    assert {name.partition(".")[0] for name in loaded} & COMMANDS[command] == set()
    if "typer.rich_utils" not in loaded:  # which prints help, and errors of usage, with colours
        assert "pygments.token" not in loaded  # an import that fails is listed by its name alone


@pytest.mark.parametrize("command", ["gateway", "node run", "coordinator run"])
def test_a_daemon_loads_no_other_command(tmp_path: Path, command: str) -> None:
    """A process that becomes a daemon has its own command alone."""
    loaded = _loaded("-m", "tallystick.cli", *command.split(), "--config", "nowhere.toml", home=tmp_path)
    assert "tallystick.cli.daemons" in loaded
    assert "tallystick.cli.commands" not in loaded
    assert {name for name in loaded if name.startswith("tallystick.cli.") and name.count(".") > 2} == set()


def test_a_daemon_loads_nothing_that_it_never_uses(tmp_path: Path) -> None:
    """The server comes without what watches code for changes, and a keystore of ours is opened by the standard library."""
    create_keystore(tmp_path / "keys" / "main.json", "pass", cost=1 << 12)
    imports = "from tallystick.cli.daemons import load_server; from tallystick.cli.options import unlock"
    code = f"{imports}; load_server(); unlock('main', None)"
    loaded = _loaded("-c", code, home=tmp_path)
    assert {"uvicorn.main", "tallystick.runtime.web3_keystore"} <= loaded
    assert not {"watchfiles.main", "pycparser.c_ast", "Crypto.Protocol.KDF"} & loaded


def test_help_of_a_daemon_is_that_of_the_whole_command() -> None:
    """`tally node run --help` says the same, whether or not the other sub-commands are loaded."""
    daemon, whole = (CliRunner().invoke(app, ["node", "run", "--help"]).output for app in (daemon_app(), app_of_all))
    assert "--skip-recovery" in daemon
    assert daemon == whole


def test_the_package_loads_next_to_nothing() -> None:
    """`import tallystick` loads its version alone: some forty modules beside those of an empty program."""
    own = _loaded("-c", "import tallystick") - _loaded("-c", "pass")
    assert {name for name in own if name.startswith("tallystick")} == {"tallystick", "tallystick.version"}
    assert len(own) < 45


def test_the_settings_of_a_node_load_no_engine() -> None:
    """Commands that read a node's config load neither its store nor its connections."""
    own = _loaded("-c", "import node.service.config")
    assert {name.partition(".")[0] for name in own} & (NEVER | DATABASE | HTTP | LOGS) == set()


def test_a_coordinator_loads_no_colours(tmp_path: Path) -> None:
    """It writes lines of logs alone, so it runs without the library for tables and colours, which takes 2 MiB."""
    code = "from tallystick.cli.root import _root; _root(False); import tallystick.cli.daemons, coordinator.app"
    loaded = _loaded("-c", code, home=tmp_path)
    assert {"structlog.dev", "tallystick.cli.options", "coordinator.app"} <= loaded
    assert "rich.console" not in loaded
