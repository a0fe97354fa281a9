from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.claims import SettleRow
from tallystick.chain.deploy import create_contract
from tallystick.protocol import messages
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Message, Signed, Signer
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address, Amount
from tests.chain.harness import World
from tests.contracts.artifacts import load

FOLDER = Path(__file__).parents[1] / "vectors"
INPUT = json.loads((FOLDER / "messages.json").read_text())
ORACLES = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in ("eth_account", "viem")}
DOMAIN = Domain(chain_id=INPUT["domain"]["chainId"], contract=Address(INPUT["domain"]["verifyingContract"]))
ON_CHAIN = {"Order", "Receipt", "Claim", "Bind", "Release"}


def _read(case: dict[str, Any]) -> Message:
    cls: type[Message] = getattr(messages, case["primaryType"])
    return cls.from_json(case["message"])


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("case", INPUT["cases"], ids=lambda case: case["name"])
def test_python_agrees_with(oracle: str, case: dict[str, Any]) -> None:
    """The digest and signature of every struct equal those of an independent implementation."""
    vector = next(v for v in ORACLES[oracle]["vectors"] if v["name"] == case["name"])
    message, signer = _read(case), Signer(bytes.fromhex(INPUT["secret"][2:]))
    digest = message.digest(DOMAIN)
    assert "0x" + digest.hex() == vector["digest"]
    assert "0x" + signer.sign_digest(digest).hex() == vector["signature"]
    assert signer.address == ORACLES[oracle]["signer"]


def test_every_signed_message_has_vectors() -> None:
    """Every hashed message class is included."""
    classes = {n for n, c in vars(messages).items() if isinstance(c, type) and issubclass(c, Message) and c is not Message}
    assert classes - {"ClaimRow"} == {case["primaryType"] for case in INPUT["cases"]}
    assert INPUT["types"] == {n: getattr(messages, n).SCHEMA.types() for n in INPUT["types"]}


async def test_the_contract_agrees(world: World) -> None:
    """The contract hashes every struct as both reference implementations do, an order also from its packed row."""
    artifact = load("MessageHashes")
    address, _ = await create_contract(world.deployer, artifact.create())

    async def ask(function: str, *arguments: object) -> bytes:
        (value,) = artifact.result(function, await world.rpc.call(address, artifact.call(function, *arguments)))
        return bytes(value)

    checked = 0
    for case, vector in zip(INPUT["cases"], ORACLES["viem"]["vectors"], strict=True):
        if case["primaryType"] not in ON_CHAIN:
            continue
        message = _read(case)
        hashes = [await ask(f"hash{case['primaryType']}", _abi(message))]
        if isinstance(message, Order):
            row = SettleRow(Signed(message, bytes(64) + b"\x1b"), 0, Amount(0))
            hashes.append(await ask("hashRow", row.encode(), message.provider))
        for struct_hash in hashes:
            assert "0x" + keccak(DOMAIN.prefix + struct_hash).hex() == vector["digest"], case["name"]
            checked += 1
    assert checked == 3 * 5 + 3


def _abi(value: Any) -> Any:
    if isinstance(value, Message):
        return tuple(map(_abi, value.SCHEMA.read(value)))
    return [_abi(item) for item in value] if isinstance(value, tuple) else value
