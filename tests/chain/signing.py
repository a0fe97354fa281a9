"""Signed orders, rows, claims and receipts of one market, for tests on any chain."""

from __future__ import annotations

from dataclasses import replace

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.messages import Claim, Order, Receipt
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Address, Amount, Hash
from tests.builders import build_order, build_receipt


def person(name: str) -> Signer:
    """A key that is derived from a name."""
    return Signer(keccak(name.encode()))


class MessageSigner:
    """Signs messages for `domain`. `seq` counts orders, so no two are equal."""

    domain: Domain
    seq: int = 0

    def order(self, key: Signer, provider: Address, ceiling: int, **changes: object) -> Signed[Order]:
        """Returns a signed order; `changes` replace fields."""
        self.seq += 1
        fields: dict[str, object] = {"seq": self.seq, "terms_hash": Hash(bytes(range(32)))}
        order = build_order(key.address, provider, ceiling, **(fields | changes))
        return Signed(order, key.sign_digest(order.digest(self.domain)))

    def row(self, key: Signer, provider: Address, ceiling: int, cost: int | None = None, **changes: object) -> SettleRow:
        """A row that claims `cost`, by default the ceiling."""
        return SettleRow(self.order(key, provider, ceiling, **changes), 1, Amount(ceiling if cost is None else cost))

    def claim(self, provider: Signer, *rows: SettleRow) -> ClaimBatch:
        """A claim of rows with the provider's signature."""
        batch = ClaimBatch(provider.address, rows)
        return replace(batch, signature=provider.sign(as_read(batch, self.domain), self.domain).signature)

    def receipt(self, provider: Signer, payer: Address, seq: int, total: int, **changes: object) -> Signed[Receipt]:
        """Returns a signed receipt; `changes` replace fields."""
        fields: dict[str, object] = {"seq": seq, "cumulative_cost": Amount(total), "cost": Amount(1)}
        return provider.sign(build_receipt(payer, provider.address, Usage(1, 0, 1), **(fields | changes)), self.domain)


def as_read(claim: ClaimBatch, domain: Domain) -> Claim:
    """The message that the provider of a claim must sign: the contract reads each row as a row of this provider."""
    orders = [replace(row.order, message=read_for(claim.provider, row.order.message)) for row in claim.rows]
    rows = tuple(replace(row, order=order) for row, order in zip(claim.rows, orders, strict=True))
    return replace(claim, rows=rows).claim(domain)


def read_for(provider: Address, order: Order) -> Order:
    """The order as the contract reads it in a claim of this provider: rows do not contain the provider."""
    return order if order.provider == provider else replace(order, provider=provider)
