"""Puts a market on a chain: an escrow, and a test token where none is given."""

from __future__ import annotations

from dataclasses import astuple

from tallystick.chain.codec import WrongContract, load_abi
from tallystick.chain.deployment import Deployment
from tallystick.chain.endpoint import Rpc
from tallystick.chain.escrow import EscrowRules
from tallystick.chain.sender import Sender
from tallystick.chain.token import Token
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.types import Address, Amount

BURN_ADDRESS = Address("0x000000000000000000000000000000000000dead")
"""Whose credit nobody can use: penalties enrich nobody but the reporter."""

DAY = 86_400
PRODUCTION_RULES = EscrowRules(thaw=DAY, release=DAY, unstake=7 * DAY, penalty=Amount(100_000_000), treasury=BURN_ADDRESS)
LOCAL_RULES = EscrowRules(thaw=5, release=5, unstake=15, penalty=Amount(100_000_000), treasury=BURN_ADDRESS)


async def deploy(rpc: Rpc, sender: Sender, *, rules: EscrowRules = PRODUCTION_RULES, token: Address | None = None) -> Deployment:
    """Creates the contracts and waits for them. Raises ContractError (rules that make no sense), Refusal (no token there),
    Unavailable.
    """
    if token is None:
        token, _ = await create(sender, load_abi("TestUSD").create())
    try:
        decimals = await Token(rpc, token).decimals()
    except WrongContract:
        raise Refusal(Code.CHAIN_REFUSED, f"there is no ERC-20 at {token}, on the chain at {rpc.url}") from None
    escrow, block = await create(sender, load_abi("Escrow").create(token, astuple(rules)))
    return Deployment(
        chain_id=await rpc.chain_id(), escrow=escrow, token=token, token_decimals=decimals, block=block, rpc=rpc.url
    )


async def create(sender: Sender, code: bytes) -> tuple[Address, int]:
    """Creates any contract; gives its address and its block. Raises what `Sender.send` raises."""
    mined = await sender.send(None, code)
    if mined.created is None:
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain gave no address for the contract of {mined.hash}")
    return mined.created, mined.block
