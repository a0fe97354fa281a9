from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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

    def __call__(self, *arguments: str) -> Any:
        environment = os.environ | {
            "TALLYSTICK_HOME": str(self.home),
            "TALLYSTICK_PASSWORD": "a password",
            "TALLY_GATEWAY_COORDINATOR": self.coordinator,
        }
        environment.pop("TALLYSTICK_PASSWORD_FILE", None)
        done = subprocess.run(
            [*TALLY, *arguments, "--json"], capture_output=True, text=True, env=environment, timeout=100, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


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
    assert newcomer("start", "--stop") == {"stopped": True}
    assert newcomer("start", "--stop") == {"stopped": False}
    again = newcomer("start", "--stand-in")
    assert again["done"] == ["chain", "contracts", "coins", "purse", "coordinator", "offers"]
    assert int(again["answer"]["cost"]) > 0
    assert first["answer"]["provider"] not in json.dumps(newcomer("balance")), "the ledger of another chain"


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
