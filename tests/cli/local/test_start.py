"""`tally start`: from nothing to a paid answer, and what it leaves alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.deployment import Deployment
from tallystick.cli.local.processes import free_port
from tallystick.protocol.types import Address
from tests.cli.conftest import Tally

TALLY = (sys.executable, "-m", "tallystick.cli")
NOWHERE = Address("0x" + "ab" * 20)


class Newcomer:
    """A user with an empty home folder, and ports that no other test uses."""

    def __init__(self, home: Path) -> None:
        self.home, self.coordinator = home, f"http://127.0.0.1:{free_port(0)}"
        Deployment(31337, NOWHERE, NOWHERE, 6, 0, f"http://127.0.0.1:{free_port(0)}").save(home / "deployment.json")

    def port(self, service: str) -> int:
        """The port of the coordinator, or of the deployment file's chain."""
        loaded = Deployment.load(self.home / "deployment.json")
        return int((self.coordinator if service == "coordinator" else loaded.rpc).rpartition(":")[2])

    def __call__(self, *arguments: str, fails: bool = False) -> Any:
        environment = os.environ | {
            "TALLYSTICK_HOME": str(self.home),
            "TALLYSTICK_PASSWORD": "a password",
            "TALLY_GATEWAY_COORDINATOR": self.coordinator,
        }
        environment.pop("TALLYSTICK_PASSWORD_FILE", None)
        done = subprocess.run(
            [*TALLY, *arguments, "--json"], capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == int(fails), done.stdout + done.stderr
        answer = json.loads(done.stdout)
        return answer["error"] if fails else answer


@contextmanager
def tally_process(home: Path, *arguments: str) -> Iterator[None]:
    """Runs a `tally` command until the block ends, which starts once the command has printed a line."""
    environment = os.environ | {"TALLYSTICK_HOME": str(home)}
    process = subprocess.Popen([*TALLY, *arguments], stderr=subprocess.PIPE, env=environment, text=True)
    with process:
        assert process.stderr is not None
        assert process.stderr.readline()
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def anything_at(port: int) -> Iterator[int]:
    """A program that listens on a port and answers nothing. Yields its process id, which is this one's."""
    with socket.create_server(("127.0.0.1", port)):
        yield os.getpid()


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    """A newcomer whose local market is stopped at the end."""
    newcomer = Newcomer(tmp_path)
    yield newcomer
    newcomer("start", "--stop")


def test_from_nothing_to_a_paid_answer(newcomer: Newcomer) -> None:
    """One command adds all that is missing and asks; the second run adds nothing; after a stop it works again."""
    first = newcomer("start", "--yes", "--stand-in")
    assert first["done"] == ["wallet", "chain", "contracts", "coins", "purse", "coordinator", "offers"]
    assert int(first["answer"]["cost"]) > 0
    assert first["answer"]["text"]
    assert newcomer("start", "hello")["done"] == []
    assert newcomer("chat", "hello")["outcome"] == "completed"
    stopped = newcomer("start", "--stop")
    assert stopped == {"stopped": True, "lost": {"chain": True, "held": "10000000"}}
    assert newcomer("start", "--stop") == {"stopped": False}
    again = newcomer("start", "--stand-in")
    assert again["done"] == ["chain", "contracts", "coins", "purse", "coordinator", "offers"]
    assert int(again["answer"]["cost"]) > 0
    assert first["answer"]["provider"] not in json.dumps(newcomer("balance")), "the ledger of another chain"


def test_what_others_serve_is_not_adopted(newcomer: Newcomer, tmp_path: Path) -> None:
    """A chain without this market's contracts is left alone: the market gets its own. Another program at the coordinator's
    address is an error that names the program and another address, before anything is made.
    """
    other = tmp_path / "other"
    chain_port, coordinator_port = newcomer.port("chain"), newcomer.port("coordinator")
    with tally_process(other, "chain", "--port", str(chain_port)), anything_at(coordinator_port) as holder:
        refused = newcomer("start", "--yes", "--stand-in", fails=True)
        assert refused["code"] == "port_unavailable"
        for expected in (newcomer.coordinator, f"process {holder}", "--coordinator http://127.0.0.1:"):
            assert expected in refused["message"]
        assert not (newcomer.home / "keys").exists()
        newcomer.coordinator = f"http://127.0.0.1:{free_port(0)}"
        answered = newcomer("start", "--yes", "--stand-in")
        assert {"chain", "contracts", "coordinator"} <= set(answered["done"])
        assert Deployment.load(newcomer.home / "deployment.json").rpc != f"http://127.0.0.1:{chain_port}"
        assert Deployment.load(newcomer.home / "deployment.1.json").escrow == NOWHERE


def test_a_named_market_is_joined(newcomer: Newcomer, tmp_path: Path) -> None:
    """A coordinator that the user names is joined if it settles on the chain that answers; `--stop` then leaves both running."""
    newcomer("start", "--yes", "--stand-in")
    friend = Newcomer(tmp_path / "friend")
    friend.coordinator = newcomer.coordinator
    Deployment(31337, NOWHERE, NOWHERE, 6, 0, Deployment.load(newcomer.home / "deployment.json").rpc).save(
        friend.home / "deployment.json"
    )
    assert friend("start", "--yes")["done"] == ["wallet", "coins", "purse"]
    assert friend("start", "--stop") == {"stopped": False}
    assert newcomer("start")["done"] == []


@pytest.mark.parametrize("chain_id", [None, 8453])
def test_remote_market_is_not_changed(tally: Tally, chain_id: int | None) -> None:
    """For a market that may have real money, nothing is made, neither wallet nor process; the output lists what to do."""
    if chain_id is not None:
        Deployment(chain_id, NOWHERE, NOWHERE, 6, 0, "http://127.0.0.1:9").save(tally.home / "deployment.json")
    arguments = ("start", "--yes", "--coordinator", "http://127.0.0.1:9" if chain_id else "http://market.invalid")
    answer = tally(*arguments)
    assert (answer["local"], answer["next"]) == (False, ["tally wallet new default"])
    assert not any(item["ready"] for item in answer["prerequisites"])
    assert "nothing is changed for you" in tally.says(*arguments)
    assert not (tally.home / "keys").exists()
    assert not (tally.home / "local").exists()


def test_help_mentions_start(tally: Tally) -> None:
    """`tally` without arguments tells a newcomer to begin with `tally start`."""
    assert "tally start" in tally.says(code=2)
