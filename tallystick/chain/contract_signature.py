"""Signatures of smart accounts, which a contract checks instead of a key (EIP-1271, https://eips.ethereum.org/EIPS/eip-1271)."""

from __future__ import annotations

from tallystick.chain.endpoint import Rpc
from tallystick.chain.hex_encoding import InvalidParams, parse_data
from tallystick.chain.rpc_errors import RpcError, RpcErrorKind
from tallystick.protocol.codecs import WORD, keccak
from tallystick.protocol.errors import Refusal
from tallystick.protocol.types import Address, Hash

CHECK_GAS = 1_000_000
"""What the check may use. A Safe of 20 owners uses some 200,000."""
_SELECTOR = keccak(b"isValidSignature(bytes32,bytes)")[:4]


async def is_contract_signature(rpc: Rpc, account: Address, digest: Hash, signature: bytes) -> bool:
    """Whether the contract at an account says that it signed a digest; false for an account without code, or a revert.

    Raises Unavailable if the chain does not answer.
    """
    words = [digest, (2 * WORD).to_bytes(WORD, "big"), len(signature).to_bytes(WORD, "big")]
    data = _SELECTOR + b"".join(words) + signature + bytes(-len(signature) % WORD)
    try:
        answer = await rpc.request("eth_call", {"to": account, "data": "0x" + data.hex(), "gas": hex(CHECK_GAS)}, "latest")
    except Refusal:  # it reverted
        return False
    except RpcError as error:
        if error.kind is RpcErrorKind.OTHER:  # out of gas, for example: nodes have no code of their own for it
            return False
        raise
    try:
        return parse_data(answer)[:WORD] == _SELECTOR + bytes(WORD - len(_SELECTOR))
    except InvalidParams:
        return False
