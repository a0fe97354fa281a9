from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.chain.code_check import check_code, same_code
from tallystick.chain.codec import WrongContract, load_abi
from tallystick.chain.deploy import create_contract
from tallystick.chain.escrow import Escrow
from tallystick.protocol.codecs import keccak
from tests.chain.harness import RULES, World

PUSH32, STOP = b"\x7f", b"\x00"
OWN, OTHER = b"\x11" * 32, b"\x22" * 32


@pytest.mark.parametrize(
    ("code", "expected", "same"),
    [
        (b"", b"", False),
        (b"\x01\x02", b"\x01\x02", True),
        (b"\x01\x02", b"\x01\x03", False),
        (b"\x01\x02\x03", b"\x01\x02", False),
        (PUSH32 + OWN, PUSH32 + OTHER, True),
        (PUSH32 + OTHER, PUSH32 + OTHER, True),
        (PUSH32 + OTHER, PUSH32 + OWN, False),
        (b"\x7e" + OWN, PUSH32 + OWN, False),
        (OWN, OTHER, False),
        (b"\x60\x7f" + OWN, b"\x60\x7f" + OTHER, False),
        (PUSH32 + OWN[:31] + b"\x12", PUSH32 + OTHER, False),
        (PUSH32 + OWN + STOP, PUSH32 + OTHER + b"\x01", False),
        (PUSH32 + OWN[:5], PUSH32 + OTHER[:5], False),
    ],
    ids=[
        "none",
        "same",
        "other",
        "longer",
        "own",
        "same word",
        "strange",
        "opcode",
        "no push",
        "operand",
        "part",
        "after",
        "cut",
    ],
)
def test_codes_differ_in_their_own_words_only(code: bytes, expected: bytes, same: bool) -> None:
    """Only a whole operand of PUSH32 may differ, and only if it is the contract's own address or domain."""
    assert same_code(code, expected, {OWN}) is same


async def test_this_versions_contract_is_recognised(either: World) -> None:
    """The rules and the code's hash are those of the chain, whatever the address."""
    code = await either.rpc.request("eth_getCode", either.deployment.escrow, "latest")
    assert await check_code(either.escrow) == (RULES, keccak(bytes.fromhex(code[2:])).hex())


@pytest.mark.parametrize("where", [100, 5_000, -60])
async def test_changed_code_is_another_contract(either: World, where: int) -> None:
    """A contract that differs in one byte of its code is refused, also if it answers all questions as the escrow does."""
    code = bytearray.fromhex((await either.rpc.request("eth_getCode", either.deployment.escrow, "latest"))[2:])
    code[where] ^= 1
    size = len(code).to_bytes(3, "big")
    returning = b"\x62" + size + b"\x80\x60\x0b\x5f\x39\x5f\xf3"  # copies and returns what follows
    address, _ = await create_contract(either.deployer, returning.ljust(11, STOP) + bytes(code))
    other = Escrow(either.rpc, replace(either.deployment, escrow=address))
    with pytest.raises(WrongContract):
        await check_code(other)


async def test_a_copy_under_another_address_is_another_contract(either: World) -> None:
    """The same code at another address answers as the first one, but its orders would be for that one."""
    code = bytes.fromhex((await either.rpc.request("eth_getCode", either.deployment.escrow, "latest"))[2:])
    returning = (b"\x62" + len(code).to_bytes(3, "big") + b"\x80\x60\x0b\x5f\x39\x5f\xf3").ljust(11, STOP)
    address, _ = await create_contract(either.deployer, returning + code)
    with pytest.raises(WrongContract, match="not the escrow of this version"):
        await check_code(Escrow(either.rpc, replace(either.deployment, escrow=address)))


async def test_a_token_is_no_escrow(either: World) -> None:
    """Another contract, and an address without one, are refused."""
    for address in (either.deployment.token, (await create_contract(either.deployer, load_abi("TestUSD").create()))[0]):
        with pytest.raises(WrongContract):
            await check_code(Escrow(either.rpc, replace(either.deployment, escrow=address)))
