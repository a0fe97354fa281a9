"""Deployment of a market: an escrow, and a test token if no token is given."""

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
"""An account whose credit nobody can use, so that penalties benefit only the reporter."""

DAY = 86_400
PRODUCTION_RULES = EscrowRules(thaw=DAY, release=DAY, unstake=7 * DAY, penalty=Amount(100_000_000), treasury=BURN_ADDRESS)
LOCAL_RULES = EscrowRules(thaw=5, release=5, unstake=15, penalty=Amount(100_000_000), treasury=BURN_ADDRESS)


async def deploy(rpc: Rpc, sender: Sender, *, rules: EscrowRules = PRODUCTION_RULES, token: Address | None = None) -> Deployment:
    """Creates the contracts and waits until they are mined.

    Raises ContractError for invalid rules, Refusal if `token` is not an ERC-20, Unavailable.
    """
    if token is None:
        token, _ = await create_contract(sender, load_abi("TestUSD").create())
    try:
        decimals = await Token(rpc, token).decimals()
    except WrongContract:
        raise Refusal(
            Code.CHAIN_REFUSED, f"token: expected an ERC-20 at {token}, there is none on the chain at {rpc.shown_url}"
        ) from None
    escrow, block = await create_contract(sender, load_abi("Escrow").create(token, astuple(rules)))
    return Deployment(
        chain_id=await rpc.chain_id(), escrow=escrow, token=token, token_decimals=decimals, block=block, rpc=rpc.url
    )


async def create_contract(sender: Sender, code: bytes) -> tuple[Address, int]:
    """Creates a contract. Returns its address and its block. Raises what `Sender.send` raises."""
    mined = await sender.send(None, code)
    if mined.created is None:
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain returned no contract address for transaction {mined.hash}")
    return mined.created, mined.block
