"""The tab of one payer with one provider: the arithmetic of both halves, and the one check of a receipt.

The payer's half says how high a ceiling to sign; the provider's half says whether a job may start; `check_receipt` is what
coordinator and client hold a receipt against. No clock, no store: callers bring both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadReceipt, Code, Refusal
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.pricing import charge, usage_of
from tallystick.protocol.types import Amount

MAX_SEQ = 1 << 62
"""The highest seq of a receipt. No honest tab has that many receipts, and 64-bit integers can count on from there."""


@dataclass(frozen=True, slots=True)
class PayerTab:
    """The payer's half. `accepted`: cost of all receipts accepted so far. `open_caps`: caps of orders still open."""

    accepted: Amount = Amount(0)
    open_caps: Amount = Amount(0)

    def ceiling_for(self, cap: Amount) -> Amount:
        """The cumulative ceiling that an order with this cap must sign."""
        return self.accepted + self.open_caps + cap


@dataclass(frozen=True, slots=True)
class ProviderTab:
    """The provider's half: the last receipt's seq and total, the highest signed ceiling, and the worst case in flight."""

    seq: int = 0
    cumulative: Amount = Amount(0)
    ceiling: Amount = Amount(0)
    in_flight: Amount = Amount(0)

    def admit(self, order: Order, cap: Amount, security: Security) -> ProviderTab:
        """The tab with one more job in flight. Raises Refusal unless the job is authorised and secured."""
        exposure = self.cumulative + self.in_flight + cap
        ceiling = Amount(max(self.ceiling, order.ceiling))
        if exposure > ceiling:
            raise Refusal(
                Code.UNAUTHORISED_TAB,
                f"order.ceiling {ceiling} is below the tab's total {self.cumulative} plus {self.in_flight + cap} in flight",
            )
        if exposure - security.settled > security.reserved + security.unsecured_limit:
            raise Refusal(
                Code.UNSECURED,
                f"{exposure - security.settled} would be owed, {security.reserved} is reserved for this provider and it trusts "
                f"this payer with {security.unsecured_limit} beyond that",
            )
        return replace(self, ceiling=ceiling, in_flight=self.in_flight + cap)

    def book(self, cost: Amount, cap: Amount) -> ProviderTab:
        """The tab after a job with this cap ended and cost this much: its receipt takes the new seq and total."""
        return replace(self, seq=self.seq + 1, cumulative=self.cumulative + cost, in_flight=self.in_flight - cap)

    def drop(self, cap: Amount) -> ProviderTab:
        """The tab after a job ended without a receipt."""
        return replace(self, in_flight=self.in_flight - cap)


@dataclass(frozen=True, slots=True)
class Security:
    """What stands behind a tab: paid on chain so far, reserved on chain, and the provider's own trust in this payer."""

    settled: Amount
    reserved: Amount
    unsecured_limit: Amount


def check_receipt(order: Verified[Order], terms: Terms, receipt: Receipt) -> None:
    """Everything about a receipt that follows from its order alone. Raises BadReceipt, which names what is wrong.

    The rules, in order: same parties; this order; a known outcome; usage within itself and within the terms; the cost is
    exactly what prices, usage and outcome give; the total contains it. (The total may lie above this order's own ceiling, when
    a later order of the tab was finished first; the payer holds it against the highest ceiling that it signed.)
    """
    message = order.message
    if (receipt.payer, receipt.provider) != (message.payer, message.provider):
        raise BadReceipt("receipt: other parties than its order")
    if receipt.order_hash != order.digest:
        raise BadReceipt("receipt.orderHash: not this order")
    try:
        outcome = Outcome(receipt.outcome)
    except ValueError:
        raise BadReceipt(f"receipt.outcome: {receipt.outcome} is not a known outcome") from None
    usage = usage_of(receipt)
    if usage.output > terms.max_output_tokens:
        raise BadReceipt(f"receipt.outputTokens: {usage.output} is above the ordered {terms.max_output_tokens}")
    due = charge(terms, usage, outcome)
    if receipt.cost != due:
        raise BadReceipt(f"receipt.cost: {receipt.cost}, but usage and prices give {due}")
    if receipt.cumulative_cost < receipt.cost:
        raise BadReceipt(f"receipt.cumulativeCost: {receipt.cumulative_cost} is below the cost {receipt.cost} that it contains")


def check_continuity(previous: Receipt, receipt: Receipt) -> None:
    """A tab's receipt against the one with the seq before it. Raises BadReceipt."""
    if receipt.seq != previous.seq + 1:
        raise BadReceipt(f"receipt.seq: {receipt.seq} does not follow {previous.seq}")
    if receipt.cumulative_cost != previous.cumulative_cost + receipt.cost:
        raise BadReceipt(f"receipt.cumulativeCost: {receipt.cumulative_cost} is not {previous.cumulative_cost} + {receipt.cost}")
