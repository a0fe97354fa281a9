"""The market's ERC-20 token, with EIP-2612 permits and EIP-3009 authorizations. Amounts are base units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tallystick.chain.abi_values import encode
from tallystick.chain.codec import WrongContract, load_abi
from tallystick.chain.endpoint import Rpc
from tallystick.chain.sender import MinedTransaction, Sender
from tallystick.protocol.codecs import Uint, keccak
from tallystick.protocol.eip712 import Domain, Message, Signer, message
from tallystick.protocol.types import Address, Amount, Hash, Seconds

U256 = Annotated[int, Uint(256)]


@message(signer="owner")
class Permit(Message):
    """EIP-2612: `spender` may take `value` from `owner`."""

    owner: Address
    spender: Address
    value: U256
    nonce: U256
    deadline: U256


@message(signer="from_")
class ReceiveWithAuthorization(Message):
    """EIP-3009: `to` may take `value` from `from_` once."""

    from_: Address
    to: Address
    value: U256
    valid_after: U256
    valid_before: U256
    nonce: Hash


@dataclass(frozen=True, slots=True)
class SignedPermit:
    """The arguments of a permit in `depositWithPermit`."""

    amount: Amount
    deadline: Seconds
    signature: bytes


@dataclass(frozen=True, slots=True)
class SignedAuthorization:
    """The arguments of an authorization in `depositWithAuthorization`. Its nonce is derived from `salt` and the purse's key."""

    amount: Amount
    valid_after: Seconds
    valid_before: Seconds
    salt: Hash
    signature: bytes


def split_signature(signature: bytes) -> tuple[int, bytes, bytes]:
    """Splits a 65-byte signature into v, r and s."""
    return signature[64], signature[:32], signature[32:64]


def authorization_nonce(key: Address, salt: Hash) -> Hash:
    """The EIP-3009 nonce that binds an authorization to the purse of `key`."""
    return keccak(encode(["address", "bytes32"], [key, salt]))


class Token:
    """Typed calls of one token. Reads raise Unavailable; writes raise what `Sender.send` raises."""

    def __init__(self, rpc: Rpc, address: Address) -> None:
        self.rpc, self.address = rpc, address
        self._abi = load_abi("TestUSD")

    async def _read(self, function: str, *arguments: object) -> tuple[Any, ...]:
        return self._abi.result(function, await self.rpc.call(self.address, self._abi.call(function, *arguments)))

    def calldata(self, function: str, *arguments: object) -> bytes:
        """The calldata of a call, for another wallet or contract to send."""
        return self._abi.call(function, *arguments)

    async def balance_of(self, account: Address) -> Amount:
        """The balance of an account."""
        (value,) = await self._read("balanceOf", account)
        return Amount(value)

    async def allowance(self, owner: Address, spender: Address) -> Amount:
        """The amount that `spender` may still take from `owner`."""
        (value,) = await self._read("allowance", owner, spender)
        return Amount(value)

    async def decimals(self) -> int:
        """The number of decimals of the token."""
        (value,) = await self._read("decimals")
        return int(value)

    async def mint(self, sender: Sender, to: Address, amount: Amount) -> MinedTransaction:
        """Mints test dollars from the faucet of a test token."""
        return await sender.send(self.address, self._abi.call("mint", to, amount))

    async def approve(self, sender: Sender, spender: Address, amount: Amount) -> MinedTransaction:
        """Allows `spender` to take up to `amount` from the sender."""
        return await sender.send(self.address, self._abi.call("approve", spender, amount))

    async def transfer(self, sender: Sender, to: Address, amount: Amount) -> MinedTransaction:
        """Transfers tokens from the sender to `to`."""
        return await sender.send(self.address, self._abi.call("transfer", to, amount))

    async def domain(self) -> Domain:
        """The token's own EIP-712 domain, read from the contract (EIP-5267).

        Raises WrongContract if it names another chain or contract: a signature for it would move money there.
        """
        _, name, version, chain_id, contract, _, _ = await self._read("eip712Domain")
        expected = await self.rpc.chain_id()
        if (chain_id, contract) != (expected, self.address):
            raise WrongContract(
                f"token: expected the EIP-712 domain of {self.address} on chain {expected}, got {contract} on chain {chain_id}; "
                "nothing was signed. Use another endpoint, or deposit with an approval"
            )
        return Domain(chain_id=chain_id, contract=self.address, name=name, version=version)

    async def permit(self, owner: Signer, spender: Address, amount: Amount, deadline: Seconds) -> SignedPermit:
        """Signs a permit with the owner's next nonce."""
        (nonce,) = await self._read("nonces", owner.address)
        unsigned = Permit(owner=owner.address, spender=spender, value=amount, nonce=nonce, deadline=deadline)
        return SignedPermit(amount, deadline, owner.sign(unsigned, await self.domain()).signature)

    async def authorize(
        self, owner: Signer, escrow: Address, key: Address, amount: Amount, salt: Hash, *, valid_before: Seconds
    ) -> SignedAuthorization:
        """Signs an authorization that can only fill the purse of `key` in `escrow`."""
        nonce = authorization_nonce(key, salt)
        unsigned = ReceiveWithAuthorization(
            from_=owner.address, to=escrow, value=amount, valid_after=0, valid_before=valid_before, nonce=nonce
        )
        signature = owner.sign(unsigned, await self.domain()).signature
        return SignedAuthorization(amount, Seconds(0), valid_before, salt, signature)
