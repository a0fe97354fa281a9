from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.deployment import Deployment
from tallystick.chain.rpc import Rpc, Sender
from tallystick.cli.money.safe import batch_checksum
from tallystick.protocol.eip712 import checksum
from tallystick.protocol.types import parse_address
from tests.chain.harness import person
from tests.cli.conftest import Tally

OWNER, HOT, NODE = person("wallet owner"), person("wallet hot"), person("wallet node")


@pytest.fixture
def market(tally: Tally, chain_url: str) -> Tally:
    """A market; `owner` stands for the smart wallet: it executes what is written down, and its key is nowhere in the home folder
    of the hot key.
    """
    tally.wallet("hot")
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", OWNER.address)
    return tally


def _execute(market: Tally, document: dict[str, Any]) -> None:
    """The owner executes a batch, call by call."""

    async def run() -> None:
        rpc = Rpc(Deployment.load(market.home / "deployment.json").rpc)
        try:
            sender = Sender(rpc, OWNER, poll=0.001)
            for call in document["transactions"]:
                await sender.send(parse_address(call["to"]), bytes.fromhex(call["data"][2:]), value=int(call["value"]))
        finally:
            await rpc.close()

    asyncio.run(run())


def _do(market: Tally, *arguments: str) -> list[str]:
    """Writes the calls down and has them executed; what they are."""
    told = market("safe", *arguments, "--wallet", "hot")
    _execute(market, told["batch"])
    return [entry["summary"].split()[0] for entry in told["transactions"]]


def _advance(market: Tally) -> None:
    market("chain", "advance", "1m", "--rpc", Deployment.load(market.home / "deployment.json").rpc)


def test_a_smart_wallet_owns_a_purse_from_first_to_last(market: Tally) -> None:
    """It opens and fills the purse, pledges, takes back and withdraws, by executing what was written down and nothing else; the
    hot key pays for no gas and signs once.
    """
    owner = ("--owner", OWNER.address)
    assert _do(market, "deposit", "10", *owner) == ["open", "allow", "deposit"]
    assert market("contract", "inspect", "purse", "hot")["purse"]["owner"] == OWNER.address
    assert _do(market, "deposit", "2", *owner) == ["allow", "deposit"]
    assert _do(market, "reserve", NODE.address, "3") == ["reserve"]
    assert _do(market, "release", NODE.address) == ["announce"]
    _advance(market)
    assert _do(market, "release", NODE.address) == ["take"]
    _do(market, "thaw", "1")
    assert _do(market, "thaw", "--cancel") == ["cancel"]
    _do(market, "thaw", "all")
    _advance(market)
    assert _do(market, "withdraw") == ["withdraw"]
    assert market("contract", "inspect", "purse", "hot")["state"] == "empty"
    assert market("balance", "--address", OWNER.address)["places"][0]["amount"] == "1000000000"


def test_the_file_is_for_the_transaction_builder(market: Tally, tmp_path: Path) -> None:
    """Written once, with the chain, the owner and a checksum that fits; people see what each call does."""
    file = tmp_path / "batch.json"
    arguments = ("safe", "deposit", "10", "--owner", OWNER.address, "--wallet", "hot", "--out", str(file))
    seen = market.says(*arguments)
    for part in ("open the purse", "deposit 10 dollars", "no contract at", str(file)):
        assert part in seen
    document = json.loads(file.read_text())
    assert (document["chainId"], document["meta"]["createdFromSafeAddress"]) == ("31337", checksum(OWNER.address))
    assert document["meta"]["checksum"] == batch_checksum(document)
    assert "exists" in market(*arguments, fails=True)["message"]
    _execute(market, document)
    assert json.loads(market.says("safe", "thaw", "1", "--wallet", "hot"))["transactions"]


def test_the_checksum_is_the_builders_own() -> None:
    """A batch that Safe's web interface wrote, with its checksum."""
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
def test_what_the_owner_could_not_execute_is_refused(market: Tally, arguments: tuple[str, ...], code: str, hint: str) -> None:
    """Before anybody signs anything."""
    _do(market, "deposit", "10", "--owner", OWNER.address)
    error = market("safe", *arguments, "--wallet", "hot", fails=True)
    assert (error["code"], hint in error["message"]) == (code, True), error


def test_without_a_purse_nothing_moves(market: Tally) -> None:
    """And the error says how it is opened."""
    assert "tally safe deposit" in market("safe", "withdraw", "--wallet", "hot", fails=True)["message"]
