"""`tally deploy`, and deployment files of other chains."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow, EscrowRules
from tallystick.chain.rpc import Rpc
from tallystick.protocol.types import Address
from tests.chain.faulty_proxy import Fault, Proxy
from tests.cli.conftest import Tally


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
        (("--dev-account", "0", "--token", "0x" + "12" * 20), "chain_refused", "expected an ERC-20"),
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


def test_a_deployment_with_money_is_not_replaced(tally: Tally, chain_url: str) -> None:
    """A deployment file whose escrow holds money is replaced only with --force; the refusal says how much. The old file is kept
    under a number, each time. An escrow without money needs no --force.
    """
    tally.wallet("default")
    deploy = ("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", "default")
    file = tally.home / "deployment.json"
    empty = tally(*deploy)
    assert not (tally.home / "deployment.1.json").exists()
    funded = tally(*deploy)
    assert Deployment.load(tally.home / "deployment.1.json").escrow == empty["escrow"]
    tally("deposit", "2.5")
    before = file.read_bytes()
    error = tally(*deploy, fails=True)
    assert (error["code"], file.read_bytes()) == ("bad_message", before)
    for expected in (str(file), f"the escrow {funded['escrow']} on chain 31337 holds 2.5 dollars", "--out", "--force"):
        assert expected in error["message"]
    forced = tally(*deploy, "--force")
    assert Deployment.load(tally.home / "deployment.2.json").escrow == funded["escrow"]
    assert Deployment.load(file).escrow == forced["escrow"]
    assert "is kept as" in tally.says(*deploy)


@pytest.mark.parametrize("content", ["", "{}", "not a deployment", '["a"]'])
def test_another_file_is_not_replaced(tally: Tally, chain_url: str, tmp_path: Path, content: str) -> None:
    """A file that is no deployment file is replaced only with --force, and kept."""
    file = tmp_path / "notes.txt"
    file.write_text(content)
    deploy = ("deploy", "--rpc", chain_url, "--dev-account", "0", "--out", str(file))
    assert "is no deployment file" in tally(*deploy, fails=True)["message"]
    assert file.read_text() == content
    tally(*deploy, "--force")
    assert (tmp_path / "notes.1.txt").read_text() == content


def test_a_deployment_that_cannot_be_asked_is_not_replaced(tally: Tally, chain_url: str) -> None:
    """If the earlier deployment's chain does not answer, or another chain does, nothing is known of its money: --force it is. A
    chain that lost the escrow holds nothing.
    """
    file = tally.home / "deployment.json"
    deploy = ("deploy", "--rpc", chain_url, "--dev-account", "0")
    printed = _without_file(tally(*deploy))
    for change in ({"rpc": "http://127.0.0.1:9"}, {"chain_id": 8453}):
        file.write_text(json.dumps(printed | change))
        assert "is unknown" in tally(*deploy, fails=True)["message"]
    file.write_text(json.dumps(printed | {"escrow": dev_accounts()[0].address}))
    tally(*deploy)
