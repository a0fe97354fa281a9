"""An in-memory market: one escrow, its token, and the signed messages of its parties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.codec import Abi, load_abi
from tallystick.chain.escrow import EscrowRules
from tallystick.chain.events import Event, RowSkipped, Settled, SkipReason
from tallystick.protocol.eip712 import Domain, Message, Signer
from tallystick.protocol.messages import Bind, Claim, Release
from tallystick.protocol.types import Address
from tests.chain.harness import DOLLAR, FAR, RULES
from tests.chain.signing import MessageSigner, person
from tests.contracts.evm_harness import Executed, MemoryChain

U96 = (1 << 96) - 1
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""Number of points of the curve: (r, N - s) signs whatever (r, s) signs."""


class Market(MessageSigner):
    """One escrow and its token. Amounts are base units; each method that sends makes one transaction."""

    def __init__(self, chain: MemoryChain | None = None, *, rules: EscrowRules = RULES, token: Abi | None = None) -> None:
        self.chain, self.rules = chain or MemoryChain(), rules
        self.escrow_abi, self.token_abi = load_abi("Escrow"), token or load_abi("TestUSD")
        deployer = person("deployer").address
        self.token = self.chain.create(deployer, self.token_abi.create())
        self.escrow = self.chain.create(deployer, self.escrow_abi.create(self.token, astuple(rules)))
        self.domain = Domain(chain_id=self.chain.chain_id, contract=self.escrow)

    # ------------------------------------------------------------------------------------------------------------- calls

    def send(self, sender: Address, function: str, *arguments: object) -> Executed:
        """Sends a transaction to the escrow. Raises ContractError."""
        return self.chain.send(sender, self.escrow, self.escrow_abi.call(function, *map(_abi, arguments)))

    def call(self, sender: Address, function: str, *arguments: object) -> tuple[Event, ...]:
        """The events of a transaction. Raises ContractError."""
        return self.send(sender, function, *arguments).events(self.escrow)

    def settle(self, sender: Address, *claims: ClaimBatch) -> tuple[Event, ...]:
        """Settles claims."""
        return self.call(sender, "settle", list(claims))

    def collect(self, provider: Signer, *rows: SettleRow) -> tuple[Event, ...]:
        """Sends a claim of rows that the provider signs."""
        return self.settle(provider.address, self.claim(provider, *rows))

    def coin(self, sender: Address, function: str, *arguments: object) -> Executed:
        """Sends a transaction to the token. Raises ContractError."""
        return self.chain.send(sender, self.token, self.token_abi.call(function, *arguments))

    def fund(self, account: Address, amount: int) -> None:
        """Mints test dollars and approves the escrow to take them."""
        self.coin(account, "mint", account, amount)
        self.coin(account, "approve", self.escrow, U96)

    def purse(self, key: Signer, owner: Address, amount: int) -> None:
        """Opens and fills a purse."""
        self.call(key.address, "open", key.address, owner, b"")
        if amount:
            self.fund(owner, amount)
            self.call(owner, "deposit", key.address, amount)

    def stake(self, provider: Address, amount: int) -> None:
        """Stakes newly minted test dollars."""
        self.fund(provider, amount)
        self.call(provider, "stake", amount)

    # ------------------------------------------------------------------------------------------------------------- views

    def ask(self, function: str, *arguments: object) -> tuple[Any, ...]:
        """The result of a view of the escrow."""
        return self.escrow_abi.result(function, self.chain.ask(self.escrow, self.escrow_abi.call(function, *arguments)))

    def balance(self, account: Address) -> int:
        """The token balance of an account."""
        (value,) = self.token_abi.result("balanceOf", self.chain.ask(self.token, self.token_abi.call("balanceOf", account)))
        return int(value)

    def free(self, key: Address) -> int:
        """The free balance of a purse."""
        return int(self.ask("purse", key)[1])

    def tab(self, payer: Address, provider: Address) -> tuple[int, int]:
        """The settled total and the reservation of a tab."""
        settled, reserved, _ = self.ask("tab", payer, provider)
        return settled, reserved

    def credit(self, account: Address) -> int:
        """The credit of an account."""
        return int(self.ask("account", account)[0])


def _abi(value: object) -> object:
    """Encodes claims and messages as ABI arguments."""
    if isinstance(value, ClaimBatch):
        return value.encode()
    if isinstance(value, Message):
        return tuple(map(_abi, value.SCHEMA.read(value)))
    return [_abi(item) for item in value] if isinstance(value, (list, tuple)) else value


def paid(events: Sequence[Event]) -> list[int]:
    """The payment of each paid row."""
    return [event.paid for event in events if isinstance(event, Settled)]


def skipped(events: Sequence[Event]) -> list[SkipReason]:
    """The reason of each skipped row."""
    return [event.reason for event in events if isinstance(event, RowSkipped)]


__all__ = ["DOLLAR", "FAR", "RULES", "U96", "Bind", "Claim", "Market", "N", "Release", "paid", "person", "skipped"]
