"""A smart account that takes the signature of one key for its own (EIP-1271), written in the EVM's own bytes."""

from __future__ import annotations

from tallystick.chain.deploy import create_contract
from tallystick.chain.sender import Sender
from tallystick.protocol.types import Address

_ARGUMENTS = "600435600052" + "60a43560001a602052" + "606435604052" + "608435606052"
"""Puts what the precompile ecrecover reads into memory, from the calldata of isValidSignature(bytes32,bytes)."""
_RECOVER = "602060006080600060015afa50"
_MAGIC = "14631626ba7e60e01b0260005260206000f3"
"""Returns the magic value of EIP-1271 if the account on the stack is the one in memory, else 0."""
REVERTING, SPINNING, BOASTING = bytes.fromhex("60006000fd"), bytes.fromhex("5b600056"), bytes.fromhex("600160005260206000f3")
"""Accounts that revert, that never end, and that return 1 as if it were the magic value."""


def code_of(owner: Address) -> bytes:
    """The code of an account whose owner's key signs for it."""
    return bytes.fromhex(_ARGUMENTS + _RECOVER + "60005173" + owner[2:] + _MAGIC)


async def create_account(sender: Sender, code: bytes) -> Address:
    """Puts code on the chain. Returns its address."""
    size = f"60{len(code):02x}"
    account, _ = await create_contract(sender, bytes.fromhex(f"{size}600c600039{size}6000f3") + code)
    return account
