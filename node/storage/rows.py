"""Conversion between the node's objects and the rows of its tables."""

from __future__ import annotations

from typing import Any

from node.domain.signed_ceilings import SignedCeiling
from node.domain.tabs import StoredTab
from node.ports import ClaimableTab
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.stored import load_signed, store_signed, store_struct
from tallystick.protocol.types import Address, Amount, Hash, JobId


def read_order(digest: str, document: str) -> Verified[Order]:
    """Restores a verified order; the store holds only verified ones."""
    order = load_signed(Order, document)
    return Verified(order.message, order.signature, Hash(bytes.fromhex(digest)))


def to_order_row(order: Verified[Order], terms: Terms, admitted_at: int | None) -> dict[str, Any]:
    """Returns the row of an order. `admitted_at`: when its job was admitted, in Unix seconds; None for a recovered order."""
    message = order.message
    return {
        "digest": order.digest.hex(),
        "job": terms.job.hex(),
        "coordinator": message.coordinator,
        "model": terms.model,
        "admitted_at": admitted_at,
        "payer": message.payer,
        "ceiling": message.ceiling,
        "deadline": message.deadline,
        "claim_by": message.claim_by,
        "order_doc": store_signed(order),
        "terms_doc": store_struct(terms),
    }


def to_receipt_row(receipt: Verified[Receipt], order: str, job: JobId, coordinator: Address) -> dict[str, Any]:
    """Returns the row of a receipt that is not acknowledged yet."""
    message = receipt.message
    return {
        "order_digest": order,
        "job": job.hex(),
        "payer": message.payer,
        "coordinator": coordinator,
        "seq": message.seq,
        "cumulative": message.cumulative_cost,
        "cost": message.cost,
        "input_tokens": message.input_tokens,
        "cached_input_tokens": message.cached_input_tokens,
        "output_tokens": message.output_tokens,
        "finished_at": message.finished_at,
        "acknowledged": False,
        "receipt_doc": store_signed(receipt),
    }


def read_claimable_tab(row: Any) -> ClaimableTab:
    """Reads a claimable tab from a row of the tab and its best order."""
    return ClaimableTab(
        payer=Address(row["payer"]),
        seq=row["seq"],
        cumulative=row["cumulative"],
        settled=row["settled"],
        reserved=row["reserved"],
        order=read_order(row["digest"], row["order_doc"]),
        since=row["since"],
        claimed_at=row["claimed_at"],
        claimed=row["claimed"],
    )


def read_stored_tab(row: Any, ceilings: list[SignedCeiling]) -> StoredTab:
    """Reads a stored tab; `ceilings` are its live ceilings, highest first."""
    best, *lower = ceilings or [SignedCeiling(Amount(0), 0)]
    return StoredTab(
        payer=Address(row["payer"]),
        seq=row["seq"],
        cumulative=row["cumulative"],
        ceiling=best.amount,
        claim_by=best.claim_by,
        settled=row["settled"],
        reserved=row["reserved"],
        lower_ceilings=tuple(lower),
        last_order_at=row["finished_at"] or 0,
        claimed=row["claimed"],
    )
