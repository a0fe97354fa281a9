"""Rows and claims of settlement transactions, and batches of claims that fit a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from tallystick.chain.sender import MAX_TRANSACTION_GAS
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.errors import BadMessage, BadSignature
from tallystick.protocol.messages import Claim, ClaimRow, Order
from tallystick.protocol.types import Address, Amount, Hash

BATCH_GAS, CLAIM_GAS, ROW_GAS = 40_000, 45_000, 50_000
"""Upper bounds of gas for planning: per batch, per claim that opens its provider's credit, and per row that opens its tab. Later
rows cost less than half."""

ROW_WORDS = 7
_U64, _U96 = (1 << 64) - 1, (1 << 96) - 1


@dataclass(frozen=True, slots=True)
class SettleRow:
    """One tab to collect: the payer's order, and the provider's total in base units as of receipt `seq`."""

    order: Signed[Order]
    seq: int
    cumulative_cost: Amount

    def encode(self) -> tuple[Any, ...]:
        """The row as the seven words of contracts/src/PackedRow.sol, with the signature in EIP-2098's compact form.

        Raises BadSignature for a signature without such a form: not 65 bytes, v not 27 or 28, or s of 256 bits.
        """
        order, signature = self.order.message, self.order.signature
        if len(signature) != 65 or signature[64] not in (27, 28) or signature[32] > 0x7F:
            raise BadSignature(f"order {order.seq} of {order.payer}: expected a signature of 65 bytes with v 27 or 28 and low s")
        payer, coordinator = int(order.payer, 16), int(order.coordinator, 16)
        return (
            payer << 96 | order.ceiling,
            coordinator << 96 | order.reserve_target,
            order.seq << 192 | order.deadline << 128 | order.claim_by << 64 | self.seq,
            self.cumulative_cost << 16 | order.max_fee_bps,
            order.terms_hash,
            signature[:32],
            bytes((signature[32] | (signature[64] - 27) << 7,)) + signature[33:64],
        )

    @classmethod
    def decode(cls, provider: Address, raw: bytes) -> Self:
        """Reads the seven words of a row in a claim of `provider` as the contract does, which ignores unused bits."""
        first, second, numbers, cost = (int.from_bytes(raw[at : at + 32], "big") for at in range(0, 128, 32))
        signature = raw[160:192] + bytes((raw[192] & 0x7F,)) + raw[193:224] + bytes((27 + (raw[192] >> 7),))
        order = Order(
            payer=_address(first >> 96),
            provider=provider,
            ceiling=Amount(first & _U96),
            reserve_target=Amount(second & _U96),
            seq=numbers >> 192,
            deadline=numbers >> 128 & _U64,
            claim_by=numbers >> 64 & _U64,
            max_fee_bps=cost & 0xFFFF,
            coordinator=_address(second >> 96),
            terms_hash=Hash(raw[128:160]),
        )
        return cls(Signed(order, signature), numbers & _U64, Amount(cost >> 16 & _U96))


@dataclass(frozen=True, slots=True)
class ClaimBatch:
    """The rows that one provider collects, with its signature, which the contract requires of every sender."""

    provider: Address
    rows: tuple[SettleRow, ...]
    signature: bytes = b""

    @classmethod
    def of(cls, claim: Signed[Claim], orders: Iterable[Signed[Order]], domain: Domain) -> Self:
        """A signed claim with its orders, which may be given in any sequence. Raises BadMessage if one is missing."""
        known: dict[Hash, Signed[Order]] = {order.message.digest(domain): order for order in orders}
        missing = [row.order_hash.hex() for row in claim.message.rows if row.order_hash not in known]
        if missing:
            raise BadMessage(f"claim: expected the order of each row, {len(missing)} are missing, the first is {missing[0]}")
        rows = tuple(SettleRow(known[row.order_hash], row.seq, row.cumulative_cost) for row in claim.message.rows)
        return cls(claim.message.provider, rows, claim.signature)

    @classmethod
    def sign(cls, signer: Signer, rows: Sequence[SettleRow], domain: Domain, *, gas: int = MAX_TRANSACTION_GAS) -> list[Self]:
        """Signs a provider's rows as claims, each small enough for a transaction of `gas`, and as few as possible."""
        max_rows = max(1, (gas - BATCH_GAS - CLAIM_GAS) // ROW_GAS)
        parts = [cls(signer.address, tuple(rows[start : start + max_rows])) for start in range(0, len(rows), max_rows)]
        return [replace(part, signature=signer.sign(part.claim(domain), domain).signature) for part in parts]

    def claim(self, domain: Domain) -> Claim:
        """The claim message, which the provider signs."""
        return Claim(
            provider=self.provider,
            rows=tuple(
                ClaimRow(
                    payer=row.order.message.payer,
                    order_hash=row.order.message.digest(domain),
                    seq=row.seq,
                    cumulative_cost=row.cumulative_cost,
                )
                for row in self.rows
            ),
        )

    def encode(self) -> tuple[Any, ...]:
        """The arguments of the contract's ClaimBatch struct."""
        return self.provider, [row.encode() for row in self.rows], self.signature


def pack_batches(claims: Sequence[ClaimBatch], *, gas: int = MAX_TRANSACTION_GAS) -> Iterator[list[ClaimBatch]]:
    """Yields the claims, in order, in lists that fit a transaction of `gas`, and as few as possible.

    A claim is never divided, because its signature covers all of its rows. A claim that is too large is a list of its own.
    """
    batch: list[ClaimBatch] = []
    left = gas - BATCH_GAS
    for claim in claims:
        need = CLAIM_GAS + ROW_GAS * len(claim.rows)
        if batch and need > left:
            yield batch
            batch, left = [], gas - BATCH_GAS
        batch.append(claim)
        left -= need
    if batch:
        yield batch


def _address(number: int) -> Address:
    return Address(f"0x{number:040x}")
