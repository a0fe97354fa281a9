from __future__ import annotations

import zlib

import pytest

from node.storage.rows import pack_order, pack_receipt, read_order, read_receipt
from tallystick.protocol.errors import BadMessage
from tests.builders import build_receipt
from tests.node.harness import DOMAIN, PROVIDER, Client, make_asks


@pytest.mark.parametrize("model", ["model", "m" * 200])
def test_documents_are_read_as_they_were_written(model: str) -> None:
    """Orders and receipts, also those that are larger, or were written with another window."""
    placed = Client().order(make_asks().current[0], terms_with={"model": model})
    document = pack_order(placed.order, placed.terms)
    earlier = zlib.compress(placed.order.to_bytes() + placed.terms.to_bytes(), 1)
    for written in (document, earlier):
        order, terms = read_order(placed.order.digest, written)
        assert (order.message, order.signature, order.digest) == (
            placed.order.message,
            placed.order.signature,
            placed.order.digest,
        )
        assert terms == placed.terms
    assert len(document) <= len(earlier) + 8
    receipt = PROVIDER.sign(build_receipt(placed.order.message.payer, PROVIDER.address), DOMAIN)
    assert read_receipt(pack_receipt(receipt)).message == receipt.message
    assert read_receipt(zlib.compress(receipt.to_bytes())).message == receipt.message


def test_a_damaged_document() -> None:
    """The operator learns what to do."""
    with pytest.raises(BadMessage, match="restore a backup"):
        read_receipt(b"damaged")
