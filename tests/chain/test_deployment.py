from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.codec import WrongContract
from tallystick.chain.deploy import deploy
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address
from tests.chain.harness import RULES, World, person

SAMPLE = Deployment(1, Address("0x" + "a1" * 20), Address("0x" + "b2" * 20), 6, 9, "http://127.0.0.1:8545")


def test_a_deployment_survives_its_file(tmp_path: Path) -> None:
    """A deployment that is saved in a new folder is equal when it is loaded."""
    path = tmp_path / "new" / "deployment.json"
    SAMPLE.save(path)
    assert Deployment.load(path) == SAMPLE
    assert SAMPLE.domain == Domain(chain_id=1, contract=SAMPLE.escrow)
    assert [p.name for p in path.parent.iterdir()] == ["deployment.json"]


@pytest.mark.parametrize(
    "change",
    [{"escrow": "0x12"}, {"block": -1}, {"block": "9"}, {"chain_id": True}, {"rpc": 5}, {"extra": 1}, {"token": None}],
)
def test_a_bad_file_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    """A file that is not a deployment raises BadMessage; addresses are normalized."""
    path = tmp_path / "deployment.json"
    path.write_text(json.dumps(SAMPLE.to_json() | change))
    with pytest.raises(BadMessage, match="deployment"):
        Deployment.load(path)
    for text in ("", "[]", "{"):
        path.write_text(text)
        with pytest.raises(BadMessage):
            Deployment.load(path)
    path.write_text(json.dumps(SAMPLE.to_json() | {"escrow": SAMPLE.escrow.upper().replace("X", "x")}))
    assert Deployment.load(path) == SAMPLE


async def test_a_new_deployment_records_its_addresses(world: World) -> None:
    """A deployment records the chain, the contracts and the first block to read; a given token is used."""
    made = await deploy(world.rpc, world.deployer, rules=RULES, token=world.deployment.token)
    assert (made.chain_id, made.token, made.token_decimals, made.rpc) == (31337, world.deployment.token, 6, world.rpc.url)
    code = await world.rpc.request("eth_getCode", made.escrow, hex(made.block - 1))
    assert code == "0x" != await world.rpc.request("eth_getCode", made.escrow, hex(made.block))
    (token,) = await Escrow(world.rpc, made).read("token")
    assert token == world.deployment.token


async def test_a_wrong_address_is_noticed(world: World) -> None:
    """Reading from an address without a deployment raises an error that says so."""
    nowhere = Deployment(31337, person("nobody").address, world.deployment.token, 6, 0, world.rpc.url)
    with pytest.raises(WrongContract, match="another contract"):
        await Escrow(world.rpc, nowhere).purse(person("key").address)
