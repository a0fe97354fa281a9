"""Compares a receipt with the other receipts of its tab: sequence numbers, totals and equivocation. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.messages import Receipt


@dataclass(frozen=True, slots=True)
class AdjacentReceipts:
    """The recorded receipts around a new one: with the same seq, the next lower and next higher seq, and for the same order."""

    same_seq: Receipt | None = None
    below: Receipt | None = None
    above: Receipt | None = None
    same_order: Receipt | None = None

    @classmethod
    def of(cls, receipt: Receipt, recorded: Iterable[Receipt]) -> AdjacentReceipts:
        """Selects them from receipts of the same tab. The receipt itself is skipped."""
        words = receipt.words()  # which differ if any field does
        others = [other for other in recorded if other.words() != words]
        return cls(
            same_seq=next((other for other in others if other.seq == receipt.seq), None),
            below=max((other for other in others if other.seq < receipt.seq), key=lambda other: other.seq, default=None),
            above=min((other for other in others if other.seq > receipt.seq), key=lambda other: other.seq, default=None),
            same_order=next((other for other in others if other.order_hash == receipt.order_hash), None),
        )


def check_sequence(receipt: Receipt, adjacent: AdjacentReceipts) -> None:
    """Checks a receipt against its tab. The caller recognises duplicates first. Raises BadReceipt.

    Seqs may be missing in between, because jobs run concurrently and answers get lost. Totals must leave room for the missing
    receipts, and must be exact where none is missing. A total above every ceiling that the ledger knows is not refused, because
    the key may have signed orders that the ledger lost; it is not believed either.
    """
    if adjacent.same_seq is not None:
        raise BadReceipt(f"receipt.seq: {receipt.seq} was already used for another receipt (equivocation)")
    if adjacent.same_order is not None:
        raise BadReceipt(f"receipt.orderHash: this order already has a receipt, with seq {adjacent.same_order.seq}")
    if adjacent.below is not None:
        _check_step(adjacent.below, receipt)
    elif receipt.seq == 1 and receipt.cumulative_cost != receipt.cost:
        raise BadReceipt(
            f"receipt.cumulativeCost: expected {receipt.cost} base units, the cost of a tab's first receipt, got "
            f"{receipt.cumulative_cost}"
        )
    if adjacent.above is not None:
        _check_step(receipt, adjacent.above)


def _check_step(lower: Receipt, higher: Receipt) -> None:
    least = lower.cumulative_cost + higher.cost
    if higher.cumulative_cost < least or (higher.seq == lower.seq + 1 and higher.cumulative_cost != least):
        bound = "exactly" if higher.seq == lower.seq + 1 else "at least"
        raise BadReceipt(
            f"receipt.cumulativeCost: expected {bound} {least} base units at seq {higher.seq} ({lower.cumulative_cost} at seq "
            f"{lower.seq} plus {higher.cost}), got {higher.cumulative_cost}"
        )
