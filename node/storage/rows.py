"""Conversion between the node's objects and the rows of its tables. Documents are binary and compressed."""

from __future__ import annotations

import zlib
from typing import Any

from node.domain.signed_ceilings import SignedCeiling
from node.domain.tabs import StoredTab
from node.ports import ClaimableTab
from tallystick.protocol.eip712 import Signed, Verified, read_signed_bytes, unpack_signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.messages import Order, Receipt, Terms
from tallystick.protocol.types import Address, Amount, Hash

_LEVEL = 1
"""Of compression: most bytes of the binary form are leading zeros of its words, which the fastest level removes as well."""
_WINDOW_BITS = 11
"""A window of 2 KiB, more than a document has: to allocate the usual one takes five times as long as to compress."""


def pack_order(order: Signed[Order], terms: Terms) -> bytes:
    """An order and its terms as one document. Raises BadMessage for one that no peer would read."""
    return zlib.compress(order.to_bytes() + terms.to_bytes(), _LEVEL, _WINDOW_BITS)


def read_order(digest: bytes, document: bytes) -> tuple[Verified[Order], Terms]:
    """Restores a verified order and its terms; the store holds only verified ones. Raises BadMessage."""
    data = _decompress(document)
    order, end = unpack_signed(Order, data)
    return Verified(order.message, order.signature, Hash(digest)), Terms.from_bytes(data[end:], "stored terms")


def pack_receipt(receipt: Signed[Receipt]) -> bytes:
    """A receipt as a document. Raises BadMessage for one that no peer would read."""
    return zlib.compress(receipt.to_bytes(), _LEVEL, _WINDOW_BITS)


def read_receipt(document: bytes) -> Signed[Receipt]:
    """Restores a receipt. Raises BadMessage."""
    return read_signed_bytes(Receipt, _decompress(document), "stored receipt")


def _decompress(document: bytes) -> bytes:
    try:
        return zlib.decompress(document)
    except zlib.error as error:
        raise BadMessage(f"stored document: {error}: the database is damaged; restore a backup") from None


def pack_address(address: Address) -> bytes:
    """The 20 bytes of an address."""
    return bytes.fromhex(address[2:])


def read_address(raw: bytes) -> Address:
    """The address of 20 bytes."""
    return Address(f"0x{raw.hex()}")


def to_order_row(number: int, order: Verified[Order], terms: Terms, admitted_at: int | None) -> dict[str, Any]:
    """Returns the row of an order. `admitted_at`: when its job was admitted, in Unix seconds; None for a recovered order."""
    return {
        "id": number,
        "digest": order.digest,
        "job": terms.job,
        "deadline": order.message.deadline,
        "admitted_at": admitted_at,
        "document": pack_order(order, terms),
    }


def to_receipt_row(number: int, receipt: Verified[Receipt], order_id: int, model: str | None) -> dict[str, Any]:
    """Returns the row of a receipt. `model`: None for a recovered receipt."""
    message = receipt.message
    return {
        "id": number,
        "order_id": order_id,
        "payer": pack_address(message.payer),
        "seq": message.seq,
        "model": model,
        "finished_at": message.finished_at,
        "outcome": int(message.outcome),
        "input_tokens": message.input_tokens,
        "output_tokens": message.output_tokens,
        "cost": message.cost,
        "document": pack_receipt(receipt),
    }


def read_claimable_tab(row: Any) -> ClaimableTab:
    """Reads a claimable tab from a row of the tab and its best order."""
    order, _ = read_order(row["digest"], row["document"])
    return ClaimableTab(
        payer=Address(row["payer"]),
        seq=row["seq"],
        cumulative=row["cumulative"],
        settled=row["settled"],
        reserved=row["reserved"],
        order=order,
        since=row["since"],
        claimed_at=row["claimed_at"],
        claimed=row["claimed"],
    )


def read_stored_tab(row: Any, finished_at: int, ceilings: list[SignedCeiling]) -> StoredTab:
    """Reads a stored tab. `finished_at`: when its last receipt was made (Unix seconds); `ceilings`: live ones, highest first."""
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
        last_order_at=finished_at,
        claimed=row["claimed"],
    )
