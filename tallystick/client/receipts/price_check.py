"""Compares a receipt with its order: parties, price, tokens, and the answer that arrived. Pure.

`check_against_order` is the entry point. The price and usage rules themselves are in `protocol.tab.check_receipt`. Charges for
output that never arrived are the subject of `delivery_check`.
"""

from __future__ import annotations

from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd, check_delivery, excess_tokens
from tallystick.protocol import pricing
from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.tab import MAX_SEQ, check_receipt


def check_against_order(placed: PlacedOrder, receipt: Receipt, delivery: Delivery | None) -> None:
    """Checks a verified receipt against its order and against what arrived.

    `delivery` is None if this process crashed and nobody knows what arrived; then only the terms bound the bill. Raises
    BadReceipt. Its fault is the coordinator if the receipt belongs to another order, which says nothing about the provider.
    Raises UndeliveredCharge if the receipt bills output that did not arrive and a third party may have withheld it.
    """
    order = placed.order
    if (receipt.payer, receipt.provider, receipt.order_hash) != (order.message.payer, order.message.provider, order.digest):
        raise BadReceipt(
            f"receipt.orderHash: expected the matched order 0x{order.digest.hex()} of payer {order.message.payer} and provider "
            f"{order.message.provider}, got another order",
            fault=Fault.COORDINATOR,
        )
    check_receipt(order, placed.terms, receipt)
    if not 0 < receipt.seq <= MAX_SEQ:
        raise BadReceipt(f"receipt.seq: expected 1 to {MAX_SEQ}, got {receipt.seq}")
    if delivery is None or CHARGES[Outcome(receipt.outcome)] is Charge.NOTHING:
        return
    _check_input(receipt, delivery)
    same_transcript = receipt.result_commitment == delivery.commitment
    if delivery.finished and not same_transcript:
        raise BadReceipt("receipt.resultCommitment: expected the commitment to the answer that arrived, got another one")
    if same_transcript:
        _check_output(receipt, delivery)
    if receipt.cost:
        check_delivery(receipt, delivery, same_transcript=same_transcript)


def _check_input(receipt: Receipt, delivery: Delivery) -> None:
    limit = delivery.request_bytes + pricing.TEMPLATE_ALLOWANCE
    if delivery.bounded and receipt.input_tokens > limit:
        raise BadReceipt(f"receipt.inputTokens: expected at most {limit} for the request's bytes, got {receipt.input_tokens}")


def _check_output(receipt: Receipt, delivery: Delivery) -> None:
    """Checks a receipt in which the provider signed for exactly what arrived."""
    complete = receipt.outcome in (Outcome.COMPLETED, Outcome.LENGTH)
    if complete and not delivery.finished and delivery.stream is StreamEnd.ENDED:
        raise BadReceipt("receipt.outcome: a finished answer, but its last chunk was never sent")
    excess = excess_tokens(receipt, delivery)
    if excess > 0:
        limit = receipt.output_tokens - excess
        raise BadReceipt(f"receipt.outputTokens: expected at most {limit} for the answer's bytes, got {receipt.output_tokens}")
