"""Checks that the code at an escrow's address is this version's contract, with the rules that it reports.

The endpoint runs the constructor with the reported token and rules, without sending anything, and returns the code that it would
store. That code must be the one at the address, except for the address itself and the EIP-712 domain that follows from it.
https://docs.soliditylang.org/en/latest/contracts.html#immutable
"""

from __future__ import annotations

from dataclasses import astuple

from tallystick.chain.codec import WrongContract, load_abi
from tallystick.chain.escrow import Escrow, EscrowRules
from tallystick.chain.hex_encoding import InvalidParams, parse_data
from tallystick.chain.rpc_errors import RpcError, RpcErrorKind
from tallystick.protocol.codecs import keccak
from tallystick.protocol.errors import Code, Refusal, Unavailable

_PUSH1, _PUSH32 = 0x60, 0x7F
_WORD = 32


async def check_code(escrow: Escrow) -> tuple[EscrowRules, str]:
    """Returns the rules of a deployment whose code is this version's, and the hash of that code.

    Raises WrongContract if it is another, Unavailable if the chain does not answer.
    """
    other = WrongContract(
        f"the contract {escrow.deployment.escrow} on chain {escrow.deployment.chain_id} is not the escrow of this version of "
        "tallystick with the rules that it reports; use another market, or a deployment file that you trust (--deployment)"
    )
    try:
        await escrow.check()
        rules = await escrow.rules()
    except (Refusal, RpcError) as error:  # it has no such functions
        if isinstance(error, RpcError) and error.kind is not RpcErrorKind.OTHER:
            raise
        raise other from error
    token, address = escrow.deployment.token, escrow.deployment.escrow
    creation = load_abi("Escrow").create(token, astuple(rules))
    code = _bytes(await escrow.rpc.request("eth_getCode", address, "latest"), escrow)
    expected = _bytes(await escrow.rpc.request("eth_call", {"data": "0x" + creation.hex()}, "latest"), escrow)
    own = {bytes.fromhex(address[2:]).rjust(_WORD, b"\0"), bytes(escrow.deployment.domain.separator)}
    if not same_code(code, expected, own):
        raise other
    return rules, keccak(code).hex()


def same_code(code: bytes, expected: bytes, own: set[bytes]) -> bool:
    """Whether two runtime codes are equal, except for whole PUSH32 operands that are one of the words `own` in `code`."""
    if not code or len(code) != len(expected):
        return False
    position = 0
    while position < len(code):
        opcode, size = expected[position], 1
        if _PUSH1 <= opcode <= _PUSH32:
            size += opcode - _PUSH1 + 1
        part, wanted = code[position : position + size], expected[position : position + size]
        if part != wanted and not (opcode == _PUSH32 == part[0] and part[1:] in own):
            return False
        position += size
    return True


def _bytes(raw: object, escrow: Escrow) -> bytes:
    try:
        return parse_data(raw)
    except InvalidParams as error:
        raise Unavailable(
            Code.CHAIN_UNAVAILABLE, f"the chain at {escrow.rpc.shown_url} returned malformed code: {error}"
        ) from None
