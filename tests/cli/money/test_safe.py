from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.codec import load_abi
from tallystick.chain.deployment import Deployment
from tallystick.chain.rpc import Rpc, Sender
from tallystick.cli.money.safe import batch_checksum
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import parse_address
from tests.chain.harness import person
from tests.cli.conftest import Tally

OWNER, HOT, NODE = person("wallet owner"), person("wallet hot"), person("wallet node")


@pytest.fixture
def market(tally: Tally, chain_url: str) -> Tally:
    """A market in which `owner` stands for the smart wallet: it executes the written transactions, and its key is not in the hot
    key's home folder.
    """
    tally.wallet("hot")
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", OWNER.address)
    return tally


def _execute(market: Tally, document: dict[str, Any]) -> None:
    """The owner executes the transactions of a batch."""

    async def run() -> None:
        rpc = Rpc(Deployment.load(market.home / "deployment.json").rpc)
        try:
            sender = Sender(rpc, OWNER, poll=0.001)
            for call in document["transactions"]:
                await sender.send(parse_address(call["to"]), bytes.fromhex(call["data"][2:]), value=int(call["value"]))
        finally:
            await rpc.close()

    asyncio.run(run())


def _plan_and_execute(market: Tally, *arguments: str) -> list[str]:
    """Plans transactions and has the owner execute them. Returns the first word of each summary."""
    planned = market("safe", *arguments, "--wallet", "hot")
    _execute(market, planned["batch"])
    return [entry["summary"].split()[0] for entry in planned["transactions"]]


def _advance(market: Tally) -> None:
    market("chain", "advance", "1m", "--rpc", Deployment.load(market.home / "deployment.json").rpc)


def test_whole_life_of_a_purse_owned_by_a_safe(market: Tally) -> None:
    """The Safe opens and fills the purse, reserves, releases and withdraws by executing written transactions only. The hot key
    pays no gas and signs once.
    """
    owner = ("--owner", OWNER.address)
    assert _plan_and_execute(market, "deposit", "10", *owner) == ["open", "allow", "deposit"]
    assert market("contract", "inspect", "purse", "hot")["purse"]["owner"] == OWNER.address
    assert _plan_and_execute(market, "deposit", "2", *owner) == ["allow", "deposit"]
    assert _plan_and_execute(market, "reserve", NODE.address, "3") == ["reserve"]
    assert _plan_and_execute(market, "release", NODE.address) == ["announce"]
    _advance(market)
    assert _plan_and_execute(market, "release", NODE.address) == ["take"]
    _plan_and_execute(market, "thaw", "1")
    assert _plan_and_execute(market, "thaw", "--cancel") == ["cancel"]
    _plan_and_execute(market, "thaw", "all")
    _advance(market)
    assert _plan_and_execute(market, "withdraw") == ["withdraw"]
    assert market("contract", "inspect", "purse", "hot")["state"] == "empty"
    assert market("balance", "--address", OWNER.address)["places"][0]["amount"] == "1000000000"


def test_batch_file(market: Tally, tmp_path: Path) -> None:
    """The batch file is written once, with chain, owner and a valid checksum; the text names each transaction."""
    file = tmp_path / "batch.json"
    arguments = ("safe", "deposit", "10", "--owner", OWNER.address, "--wallet", "hot", "--out", str(file))
    text = market.says(*arguments)
    for part in ("open the purse", "deposit 10 dollars", "no contract at", str(file)):
        assert part in text
    document = json.loads(file.read_text())
    assert (document["chainId"], document["meta"]["createdFromSafeAddress"]) == ("31337", checksum(OWNER.address))
    assert document["meta"]["checksum"] == batch_checksum(document)
    assert "exists" in market(*arguments, fails=True)["message"]
    _execute(market, document)
    assert json.loads(market.says("safe", "thaw", "1", "--wallet", "hot"))["transactions"]


def test_batch_checksum() -> None:
    """The checksum equals that of a batch that Safe's web interface wrote."""
    inputs = [{"internalType": kind, "name": name, "type": kind} for kind, name in (("address", "spender"), ("uint256", "value"))]
    document = {
        "version": "1.0",
        "chainId": "1",
        "createdAt": 1761326849944,
        "meta": {
            "name": "Transactions Batch",
            "description": "",
            "txBuilderVersion": "1.18.2",
            "createdFromSafeAddress": "0xA77DE01e157f9f57C7c4A326eeE9C4874D0598b6",
            "createdFromOwnerAddress": "",
            "checksum": "0x8b5032f716845c8b08bab3d63dbd9ba92e056f3557793cd041e59b84e16aa989",
        },
        "transactions": [
            {
                "to": "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48",
                "value": "0",
                "data": None,
                "contractMethod": {"inputs": inputs, "name": "approve", "payable": False},
                "contractInputsValues": {"spender": "0x474e5Ded6b5D078163BFB8F6dBa355C3aA5478C8", "value": "100000000000"},
            }
        ],
    }
    assert batch_checksum(document) == document["meta"]["checksum"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (("deposit", "0", "--owner", OWNER.address), "bad_message", "more than 0"),
        (("deposit", "1", "--owner", HOT.address), "bad_message", "tally deposit"),
        (("deposit", "1", "--owner", NODE.address), "chain_refused", "for ever"),
        (("thaw",), "bad_message", "--cancel"),
        (("thaw", "11"), "insufficient_funds", "at most 10 dollars"),
        (("withdraw",), "chain_refused", "tally safe thaw"),
        (("reserve", NODE.address, "11"), "insufficient_funds", "at most 10 dollars"),
        (("release", NODE.address), "chain_refused", "nothing is reserved"),
    ],
)
def test_impossible_transactions_are_refused(market: Tally, arguments: tuple[str, ...], code: str, hint: str) -> None:
    """Transactions that the owner could not execute are refused before anybody signs."""
    _plan_and_execute(market, "deposit", "10", "--owner", OWNER.address)
    error = market("safe", *arguments, "--wallet", "hot", fails=True)
    assert (error["code"], hint in error["message"]) == (code, True), error


def test_key_without_a_purse(market: Tally) -> None:
    """The error says how to open a purse."""
    assert "tally safe deposit" in market("safe", "withdraw", "--wallet", "hot", fails=True)["message"]


def test_the_key_signs_for_its_owner(market: Tally) -> None:
    """Another account opens the purse with the printed signature. Once it is open, nothing is signed."""
    signed = market("safe", "bind", OWNER.address, "--wallet", "hot")
    assert (parse_address(signed["key"]), parse_address(signed["owner"])) == (HOT.address, OWNER.address)
    assert signed["signature"] in market.says("safe", "bind", OWNER.address, "--wallet", "hot")
    arguments = (HOT.address, OWNER.address, bytes.fromhex(signed["signature"][2:]))
    data = load_abi("Escrow").call("open", *arguments)
    escrow = Deployment.load(market.home / "deployment.json").escrow
    _execute(market, {"transactions": [{"to": escrow, "value": "0", "data": "0x" + data.hex()}]})
    assert market("contract", "inspect", "purse", "hot")["purse"]["owner"] == OWNER.address
    assert "for ever" in market("safe", "bind", NODE.address, "--wallet", "hot", fails=True)["message"]
