"""A market on a Ground: contracts, money, and the papers that people sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.codec import Abi, load_abi
from tallystick.chain.escrow import EscrowRules
from tallystick.chain.events import Event, RowSkipped, Settled, SkipReason
from tallystick.protocol.eip712 import Domain, Message, Signed, Signer
from tallystick.protocol.messages import Bind, Claim, Order, Receipt, Release
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Address, Amount, Hash
from tests.builders import build_order, build_receipt
from tests.chain.harness import DOLLAR, FAR, RULES, as_read, person
from tests.contracts.evm_harness import Done, Ground

U96 = (1 << 96) - 1
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""Number of points of the curve: (r, N - s) signs whatever (r, s) signs."""


class Market:
    """One escrow and its token. Amounts are base units; every method but the papers is one transaction."""

    def __init__(self, ground: Ground | None = None, *, rules: EscrowRules = RULES, token: Abi | None = None) -> None:
        self.ground, self.rules = ground or Ground(), rules
        self.escrow_abi, self.token_abi = load_abi("Escrow"), token or load_abi("TestUSD")
        deployer = person("deployer").address
        self.token = self.ground.create(deployer, self.token_abi.create())
        self.escrow = self.ground.create(deployer, self.escrow_abi.create(self.token, astuple(rules)))
        self.domain = Domain(chain_id=self.ground.chain_id, contract=self.escrow)
        self._seq = 0

    # ------------------------------------------------------------------------------------------------------------- calls

    def send(self, sender: Address, function: str, *arguments: object) -> Done:
        """A transaction to the escrow. Raises ContractError."""
        return self.ground.send(sender, self.escrow, self.escrow_abi.call(function, *map(_abi, arguments)))

    def call(self, sender: Address, function: str, *arguments: object) -> tuple[Event, ...]:
        """The facts of a transaction. Raises ContractError."""
        return self.send(sender, function, *arguments).events(self.escrow)

    def settle(self, sender: Address, *claims: ClaimBatch) -> tuple[Event, ...]:
        """Collects claims."""
        return self.call(sender, "settle", list(claims))

    def collect(self, provider: Signer, *rows: SettleRow) -> tuple[Event, ...]:
        """A provider signs for its rows and sends them."""
        return self.settle(provider.address, self.claim(provider, *rows))

    def coin(self, sender: Address, function: str, *arguments: object) -> Done:
        """A transaction to the token. Raises ContractError."""
        return self.ground.send(sender, self.token, self.token_abi.call(function, *arguments))

    def fund(self, who: Address, amount: int) -> None:
        """Play money, which the escrow may take."""
        self.coin(who, "mint", who, amount)
        self.coin(who, "approve", self.escrow, U96)

    def purse(self, key: Signer, owner: Address, amount: int) -> None:
        """Opens a purse, and fills it."""
        self.call(key.address, "open", key.address, owner, b"")
        if amount:
            self.fund(owner, amount)
            self.call(owner, "deposit", key.address, amount)

    def stake(self, provider: Address, amount: int) -> None:
        """Stakes fresh money."""
        self.fund(provider, amount)
        self.call(provider, "stake", amount)

    # ------------------------------------------------------------------------------------------------------------- views

    def ask(self, function: str, *arguments: object) -> tuple[Any, ...]:
        """What a view of the escrow says."""
        return self.escrow_abi.result(function, self.ground.ask(self.escrow, self.escrow_abi.call(function, *arguments)))

    def balance(self, who: Address) -> int:
        """Tokens of an account."""
        (value,) = self.token_abi.result("balanceOf", self.ground.ask(self.token, self.token_abi.call("balanceOf", who)))
        return int(value)

    def free(self, key: Address) -> int:
        """The free balance of a purse."""
        return int(self.ask("purse", key)[1])

    def tab(self, payer: Address, provider: Address) -> tuple[int, int]:
        """What a tab has settled, and what it reserves."""
        settled, reserved, _ = self.ask("tab", payer, provider)
        return settled, reserved

    def credit(self, who: Address) -> int:
        """What an account can cash out."""
        return int(self.ask("account", who)[0])

    # ------------------------------------------------------------------------------------------------------------ papers

    def order(self, key: Signer, provider: Address, ceiling: int, **changes: object) -> Signed[Order]:
        """A signed order like no other; `changes` replace fields."""
        self._seq += 1
        fields: dict[str, object] = {"seq": self._seq, "terms_hash": Hash(bytes(range(32)))}
        order = build_order(key.address, provider, ceiling, **(fields | changes))
        return Signed(order, key.sign_digest(order.digest(self.domain)))

    def row(self, key: Signer, provider: Address, ceiling: int, cost: int | None = None, **changes: object) -> SettleRow:
        """A row that asks for `cost`, or for the ceiling."""
        return SettleRow(self.order(key, provider, ceiling, **changes), 1, Amount(ceiling if cost is None else cost))

    def claim(self, provider: Signer, *rows: SettleRow) -> ClaimBatch:
        """Rows under the provider's signature."""
        batch = ClaimBatch(provider.address, rows)
        return replace(batch, signature=provider.sign(as_read(batch, self.domain), self.domain).signature)

    def receipt(self, provider: Signer, payer: Address, seq: int, total: int, **changes: object) -> Signed[Receipt]:
        """A signed receipt."""
        fields: dict[str, object] = {"seq": seq, "cumulative_cost": Amount(total), "cost": Amount(1)}
        return provider.sign(build_receipt(payer, provider.address, Usage(1, 0, 1), **(fields | changes)), self.domain)


def _abi(value: object) -> object:
    """Papers as the ABI takes them."""
    if isinstance(value, ClaimBatch):
        return value.encode()
    if isinstance(value, Message):
        return tuple(map(_abi, value.SCHEMA.read(value)))
    return [_abi(item) for item in value] if isinstance(value, (list, tuple)) else value


def paid(events: Sequence[Event]) -> list[int]:
    """What each paid row of a settlement paid."""
    return [event.paid for event in events if isinstance(event, Settled)]


def skipped(events: Sequence[Event]) -> list[SkipReason]:
    """Why each other row did not."""
    return [event.reason for event in events if isinstance(event, RowSkipped)]


__all__ = ["DOLLAR", "FAR", "RULES", "U96", "Bind", "Claim", "Market", "N", "Release", "paid", "person", "skipped"]
