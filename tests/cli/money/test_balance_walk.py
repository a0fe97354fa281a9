"""The money commands in the order in which a user runs them, on a local chain of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.devnet import dev_accounts
from tallystick.cli.local.processes import free_port

TALLY = (sys.executable, "-m", "tallystick.cli")
OWNER, PROVIDER = dev_accounts()[3].address, dev_accounts()[1].address
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def rpc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local chain in a process of its own."""
    url = f"http://127.0.0.1:{(port := free_port(0))}"
    with (tmp_path_factory.mktemp("chain") / "log").open("wb") as log:
        process = subprocess.Popen([*TALLY, "chain", "--port", str(port)], stdout=log, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr is not None
        assert url in process.stderr.readline()
        yield url
        process.terminate()
        assert process.wait(300) == 0


@pytest.fixture(scope="module")
def tally(rpc: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `tally …` and returns its JSON, or with `fails` its error."""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"TALLYSTICK_HOME": str(home), "TALLYSTICK_PASSWORD": "a password"}
    environment.pop("TALLYSTICK_PASSWORD_FILE", None)

    def run(*arguments: str, fails: bool = False) -> Any:
        done = subprocess.run(
            [*TALLY, *arguments, "--json"], capture_output=True, text=True, env=environment, timeout=600, check=False
        )
        assert done.returncode == int(fails), done.stderr
        assert "Traceback" not in done.stderr
        answer = json.loads(done.stdout)
        return answer["error"] if fails else answer

    run("wallet", "import", "default", "--dev-account", "3")
    waits = (
        "--thaw-wait",
        "1h",
        "--release-wait",
        "1h",
        "--unstake-wait",
        "2h",
    )  # longer than two commands on any machine
    run("deploy", "--rpc", rpc, "--dev-account", "0", "--short-waits", *waits, "--fund", "default")
    return run


def test_deposit_to_withdrawal_loses_nothing(tally: Run, rpc: str) -> None:
    """After deposit, reserve, release, thaw, withdraw and their waits, every unit is back in the wallet."""
    before = _places(tally)["wallet"]
    assert tally("deposit", "10")["free"] == "10000000"
    assert tally("reserve", PROVIDER, "2")["tx"].startswith("0x")
    inspected = tally("contract", "inspect", "tab", "default", PROVIDER)
    assert (inspected["state"], inspected["tab"]["reserved"]) == ("reserved", "2000000")
    assert _places(tally, "--provider", PROVIDER)[f"reserved for {PROVIDER}"] == 2_000_000
    tally("release", PROVIDER)
    assert "tally chain advance" in tally("release", PROVIDER, fails=True)["message"]
    tally("chain", "advance", "2h", "--rpc", rpc)
    tally("release", PROVIDER)
    tally("thaw", "all")
    early = tally("withdraw", fails=True)
    assert (early["code"], early["fault"]) == ("chain_refused", "client")
    tally("chain", "advance", "2h", "--rpc", rpc)
    tally("withdraw")
    assert _places(tally)["wallet"] == before
    assert tally("contract", "inspect", "purse", "default")["state"] == "empty"


def test_stake_to_withdrawal_loses_nothing(tally: Run, rpc: str) -> None:
    """After stake, unstake and the wait, the whole stake is back in the wallet."""
    before = _places(tally)["wallet"]
    tally("stake", "5")
    assert tally("contract", "inspect", "provider", "default")["state"] == "staked"
    tally("unstake", "5")
    tally("chain", "advance", "1d", "--rpc", rpc)
    tally("unstake")
    assert _places(tally)["wallet"] == before


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (("deposit", "0"), "bad_message", "more than 0 dollars"),
        (("deposit", "1.2345678"), "bad_message", "decimal"),
        (("deposit", "999999999"), "insufficient_funds", "holds"),
        (("thaw", "5", "--wallet", "nobody"), "bad_message", "nobody"),
        (("reserve", "not-an-address", "1"), "bad_message", "address"),
        (("release", PROVIDER), "chain_refused", ""),
        (("cash-out",), "insufficient_funds", "no credit"),
        (("balance", "--wallet", "nobody"), "bad_message", "nobody"),
        (("contract", "inspect", "purse", "nobody"), "bad_message", "nobody"),
        (("deposit", "1", "--rpc", "http://127.0.0.1:9"), "chain_unavailable", "127.0.0.1:9"),
        (("deposit", "1", "--deployment", "/nonexistent.json"), "bad_message", "tally deploy"),
    ],
)
def test_wrong_use_is_refused(tally: Run, arguments: tuple[str, ...], code: str, hint: str) -> None:
    """Each wrong use ends with exit code 1 and one error that names it, without a traceback."""
    error = tally(*arguments, fails=True)
    assert error["code"] == code, error
    assert hint in error["message"], error


def test_wallets_are_private(tally: Run, tmp_path: Path) -> None:
    """A new keystore is readable by its owner only, shows no secret, and is never overwritten."""
    wallet = tally("wallet", "new", "second")
    path = Path(wallet["keystore"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert wallet.keys() == {"wallet", "address", "keystore"}
    assert "never overwritten" in tally("wallet", "new", "second", fails=True)["message"]
    assert tally("wallet", "list")["second"] == tally("wallet", "show", "second")["address"]
    key = tmp_path / "key"
    key.write_text("0x" + "11" * 32)
    assert tally("wallet", "import", "third", "--key-file", str(key))["address"] == "0x19E7E376E7C213B7E7e7e46cc70A5dD086DAff2A"


def test_chain_accounts(tally: Run) -> None:
    """The funded accounts are listed without a chain, and their private keys only if requested."""
    assert [account["address"].lower() for account in tally("chain", "accounts")][3] == OWNER
    assert "privateKey" not in tally("chain", "accounts")[0]


def _places(tally: Run, *arguments: str) -> dict[str, int]:
    return {place["place"]: int(place["amount"]) for place in tally("balance", *arguments)["places"]}
