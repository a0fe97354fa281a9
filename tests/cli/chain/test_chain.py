"""`tally chain`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import httpx
import pytest

from tallystick.chain.devnet import dev_accounts
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
    out, _ = process.communicate(timeout=600)
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
    assert " coins on " in tally.says("chain", "fund", "poor", "--rpc", either_url)
    assert " has 1 coin on " in tally.says("chain", "fund", tally.wallet("poorer"), "--rpc", either_url)
    for arguments in (("nobody",), ("0x12",), ("poor", "--coins", "much"), ("poor", "--dev-account", "99")):
        assert tally("chain", "fund", *arguments, "--rpc", either_url, fails=True)["code"] == "bad_message"
    assert tally("chain", "fund", "poor", "--coins", "99999999", "--rpc", either_url, fails=True)["code"] == "insufficient_funds"


def test_the_deployments_chain_is_used(tally: Tally, either_url: str, proxy: Proxy) -> None:
    """Without --rpc, `advance` and `fund` act on the deployment file's chain, not on the default port, and name it. A chain with
    another id, or without the deployment's contracts, is left alone.
    """
    tally.wallet("poor")
    tally("deploy", "--rpc", either_url, "--dev-account", "0", "--short-waits")
    moved = tally("chain", "advance", "1h")
    assert moved["rpc"] == either_url
    assert tally("chain", "advance", "1s", "--rpc", either_url)["block"] == moved["block"] + 1
    assert f"on {either_url}" in tally.says("chain", "fund", "poor")
    file = tally.home / "deployment.json"
    printed = json.loads(file.read_text())
    other = tally.home / "other.json"
    other.write_text(json.dumps(printed | {"rpc": proxy.url}))
    assert tally("chain", "advance", "1s", "--deployment", str(other))["rpc"] == proxy.url
    file.write_text(json.dumps(printed | {"chain_id": 1}))
    for command in (("advance", "1s"), ("fund", "poor")):
        assert "on chain 1, but" in tally("chain", *command, fails=True)["message"]
    file.write_text(json.dumps(printed | {"escrow": dev_accounts()[0].address}))
    error = tally("chain", "advance", "1s", fails=True)
    assert "there is no escrow" in error["message"]
    assert f"--rpc {either_url}" in error["message"]
    assert "no deployment file" in tally("chain", "advance", "1s", "--deployment", "gone.json", fails=True)["message"]
