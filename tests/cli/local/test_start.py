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
    """Someone with an empty home folder, on ports of their own."""

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
    """Whose local market is stopped in the end."""
    made = Newcomer(tmp_path)
    yield made
    made("start", "--stop")


def test_from_nothing_to_a_paid_answer(newcomer: Newcomer) -> None:
    """One command makes all that is missing and asks; the next time nothing is; stopped and started again, it works again."""
    first = newcomer("start", "--yes")
    assert first["done"] == ["wallet", "chain", "contracts", "coins", "purse", "coordinator", "offers"]
    assert int(first["answer"]["cost"]) > 0
    assert first["answer"]["text"]
    assert newcomer("start", "hello")["done"] == []
    assert newcomer("chat", "hello")["outcome"] == "completed"
    assert newcomer("start", "--stop") == {"stopped": True}
    assert newcomer("start", "--stop") == {"stopped": False}
    again = newcomer("start")
    assert again["done"] == ["chain", "contracts", "coins", "purse", "coordinator", "offers"]
    assert int(again["answer"]["cost"]) > 0
    assert first["answer"]["provider"] not in json.dumps(newcomer("balance")), "another chain's books"


@pytest.mark.parametrize("chain_id", [None, 8453])
def test_a_market_elsewhere_is_only_told_of(tally: Tally, chain_id: int | None) -> None:
    """Where money may be real, nothing is made: neither a wallet nor a process; what to do is said, the first of it last."""
    if chain_id is not None:
        Deployment(chain_id, NOWHERE, NOWHERE, 6, 0, "http://127.0.0.1:9").save(tally.home / "deployment.json")
    arguments = ("start", "--yes", "--coordinator", "http://127.0.0.1:9" if chain_id else "http://market.invalid")
    told = tally(*arguments)
    assert (told["local"], told["next"]) == (False, ["tally wallet new default"])
    assert not any(item["ready"] for item in told["prerequisites"])
    assert "nothing is changed for you" in tally.says(*arguments)
    assert not (tally.home / "keys").exists()
    assert not (tally.home / "local").exists()


def test_help_points_to_it(tally: Tally) -> None:
    """`tally` alone tells a newcomer where to begin."""
    assert "tally start" in tally.says(code=2)
