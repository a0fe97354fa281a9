"""`tally chain` and `tally deploy`."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow, EscrowRules
from tallystick.chain.rpc import Rpc
from tallystick.protocol.types import Address
from tests.chain.faulty_proxy import Fault, Proxy
from tests.cli.conftest import Tally

TALLY = (sys.executable, "-m", "tallystick.cli")


def test_chain_command_serves_until_sigterm() -> None:
    """`tally chain --port …` serves a chain with the requested id and accounts until SIGTERM, then exits with code 0."""
    arguments = ("chain", "--port", "0", "--chain-id", "77", "--accounts", "2")
    process = subprocess.Popen([*TALLY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    url = next(word for word in line.split() if word.startswith("http://"))
    assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok", "chain_id": 77}
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.count("0x") == 2


def test_accounts(tally: Tally) -> None:
    """The funded accounts are listed; their private keys only with --private-keys, and each key matches its account."""
    listed = tally("chain", "accounts", "--count", "3", "--private-keys")
    assert [account["privateKey"] for account in listed] == ["0x" + signer.secret.hex() for signer in dev_accounts(3)]
    assert [account["address"].lower() for account in listed] == [signer.address for signer in dev_accounts(3)]
    text = tally.says("chain", "accounts")
    assert "tally wallet import" in text
    assert dev_accounts(1)[0].secret.hex() not in text


def test_advance(tally: Tally, either_url: str) -> None:
    """The clock moves by the requested time and a block is mined, on the embedded chain and on anvil; the text states the new
    time.
    """
    first = tally("chain", "advance", "30s", "--rpc", either_url)
    second = tally("chain", "advance", "2h", "--rpc", either_url)
    assert 7_200 <= second["timestamp"] - first["timestamp"] <= 7_230
    assert (second["advanced"], second["block"]) == (7_200, first["block"] + 1)
    assert "1 day later: block" in tally.says("chain", "advance", "1D", "--rpc", either_url)


@pytest.mark.parametrize("length", ["", "1", "0s", "1y", "1.5h", "1d2h", "s", "99999999999s", "3651d"])
def test_invalid_duration(tally: Tally, length: str, chain_url: str) -> None:
    """An invalid or too long duration is refused with examples of valid ones."""
    assert "30s, 5m, 2h or 1d" in tally("chain", "advance", length, "--rpc", chain_url, fails=True)["message"]


def test_chain_that_cannot_advance(tally: Tally, proxy: Proxy) -> None:
    """A chain without a movable clock is refused for good; a chain that does not answer may be retried."""
    proxy.plan("evm_increaseTime", Fault.NO_METHOD)
    error = tally("chain", "advance", "1d", "--rpc", proxy.url, fails=True)
    assert (error["code"], error["retry"]) == ("chain_refused", False)
    assert "cannot move its clock" in error["message"]
    assert "On other chains, wait" in error["message"]
    gone = tally("chain", "advance", "1d", "--rpc", "http://127.0.0.1:9", fails=True)
    assert (gone["code"], gone["retry"]) == ("chain_unavailable", True)


def test_fund(tally: Tally, either_url: str) -> None:
    """A wallet or an address gets coins; wrong arguments are refused."""
    address = tally.wallet("poor")
    assert tally("chain", "fund", "poor", "--rpc", either_url)["account"] == address
    before = int(tally("chain", "fund", address, "--coins", "0.5", "--rpc", either_url)["coins"])
    after = tally("chain", "fund", address, "--coins", "1.5", "--dev-account", "1", "--rpc", either_url)
    assert int(after["coins"]) == before + 15 * 10**17
    assert "coins" in tally.says("chain", "fund", "poor", "--rpc", either_url)
    for arguments in (("nobody",), ("0x12",), ("poor", "--coins", "much"), ("poor", "--dev-account", "99")):
        assert tally("chain", "fund", *arguments, "--rpc", either_url, fails=True)["code"] == "bad_message"
    assert tally("chain", "fund", "poor", "--coins", "99999999", "--rpc", either_url, fails=True)["code"] == "insufficient_funds"


# -------------------------------------------------------------------------------------------------------------------- deploy


async def _rules_of(deployment: Deployment) -> EscrowRules:
    rpc = Rpc(deployment.rpc)
    try:
        escrow = Escrow(rpc, deployment)
        await escrow.check()
        return await escrow.rules()
    finally:
        await rpc.close()


def test_deploy_with_custom_rules(tally: Tally, either_url: str, tmp_path: Path) -> None:
    """Waits, penalty and treasury are those requested, the others are the defaults, and the written file is what daemons read."""
    treasury = "0x" + "ab" * 20
    file = tmp_path / "market.json"
    waits = ("--thaw-wait", "1h", "--release-wait", "30m", "--unstake-wait", "2d", "--penalty", "12.5", "--treasury", treasury)
    printed = tally("deploy", "--rpc", either_url, "--dev-account", "2", *waits, "--out", str(file))
    deployment = Deployment.load(file)
    assert printed == deployment.to_json() | {"file": str(file)}
    assert asyncio.run(_rules_of(deployment)) == EscrowRules(3_600, 1_800, 2 * 86_400, 12_500_000, Address(treasury))  # type: ignore[arg-type]
    usual = Deployment.from_json(_without_file(tally("deploy", "--rpc", either_url, "--dev-account", "2")))
    assert asyncio.run(_rules_of(usual)).thaw == 86_400
    again = tally("deploy", "--rpc", either_url, "--dev-account", "2", "--short-waits", "--token", usual.token)
    assert again["token"] == usual.token
    assert asyncio.run(_rules_of(Deployment.from_json(_without_file(again)))).thaw < 60


def _without_file(printed: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in printed.items() if name != "file"}


def test_deploy_shows_progress(tally: Tally, chain_url: str) -> None:
    """The output names each step, the funded accounts, the file and the waits."""
    address = tally.wallet("friend")
    text = tally.says(
        "deploy",
        "--rpc",
        chain_url,
        "--dev-account",
        "0",
        "--short-waits",
        "--fund",
        "friend",
        "--fund",
        dev_accounts()[5].address,
    )
    for expected in ("chain 31337", "escrow at 0x", f"gave {address} 1 coin", "deployment.json", "thaw", "5 seconds"):
        assert expected in text
    places = {place["place"]: place["amount"] for place in tally("balance", "--wallet", "friend")["places"]}
    assert places["wallet"] == "1000000000"


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (("--dev-account", "0", "--thaw-wait", "8d"), "bad_message", "longer than --thaw-wait"),
        (("--dev-account", "0", "--unstake-wait", "366d"), "bad_message", "365d"),
        (("--dev-account", "0", "--thaw-wait", "soon"), "bad_message", "--thaw-wait: expected a length of time"),
        (("--dev-account", "0", "--penalty", "0"), "chain_refused", "ZeroAmount"),
        (("--dev-account", "0", "--treasury", "nobody"), "bad_message", "--treasury"),
        (("--dev-account", "10"), "bad_message", "0 to 9"),
        (("--dev-account", "0", "--token", "0x" + "12" * 20), "chain_refused", "no ERC-20"),
        (("--wallet", "pauper"), "insufficient_funds", "--dev-account 0"),
        (("--wallet", "nobody"), "bad_message", "tally wallet new"),
        (("--wallet", "pauper", "--fund", "pauper"), "bad_message", "--fund"),
        (("--dev-account", "0", "--fund", "nobody"), "bad_message", "--fund"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_deploy_refuses_wrong_arguments(tally: Tally, chain_url: str, arguments: tuple[str, ...], code: str, hint: str) -> None:
    """Each wrong argument gives one error that names it, before any file is written."""
    tally.wallet("pauper")
    error = tally("deploy", "--rpc", chain_url, *arguments, fails=True)
    assert error["code"] == code, error
    assert hint in error["message"], error
    assert not (tally.home / "deployment.json").exists()


def test_deployment_file_of_another_chain(tally: Tally, chain_url: str, proxy: Proxy) -> None:
    """Every command fails at once if its deployment file is for another chain than the one that answers, or names no escrow
    there.
    """
    tally.wallet("default")
    printed = _without_file(tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits"))
    file = tally.home / "deployment.json"
    file.write_text(json.dumps(printed | {"chain_id": 1}))
    commands = (("deposit", "1"), ("balance",), ("thaw", "1"), ("stake", "1"), ("contract", "inspect", "rules"))
    for command in commands:
        error = tally(*command, fails=True)
        assert "on chain 1, but" in error["message"], command
        assert not error["retry"]
    file.write_text(json.dumps(printed | {"escrow": dev_accounts()[0].address}))
    for command in commands:
        assert "there is no escrow" in tally(*command, fails=True)["message"]
    file.write_text(json.dumps(printed | {"rpc": proxy.url}))
    proxy.plan("eth_chainId", *[Fault.GARBAGE] * 20)
    assert tally("balance", fails=True)["retry"]
