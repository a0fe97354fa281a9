"""The tab of one payer with one provider: the arithmetic of both sides, and the checks of a receipt. Pure.

The payer's side computes the ceiling to sign. The provider's side decides whether a job may start. Coordinator and client check
each receipt with `check_receipt`. A ceiling is the cap on the tab's total over its whole life; a job's cap is `terms.max_cost`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadReceipt, Code, Refusal
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.pricing import charge, usage_of
from tallystick.protocol.types import Amount, format_amount

MAX_SEQ = 1 << 62
"""The highest seq of a receipt. No honest tab has that many receipts, and 64-bit integers can count on from there."""


@dataclass(frozen=True, slots=True)
class PayerTab:
    """The payer's side, in base units. `accepted`: the cost of all accepted receipts. `open_caps`: the caps of open orders."""

    accepted: Amount = Amount(0)
    open_caps: Amount = Amount(0)

    def ceiling_for(self, cap: Amount) -> Amount:
        """The ceiling to sign in an order for a job with this cap."""
        return self.accepted + self.open_caps + cap


class ProviderTab(NamedTuple):
    """The provider's side: the last receipt's `seq` and total, the highest signed ceiling, and the caps of running jobs.

    Amounts are base units.
    """

    seq: int = 0
    cumulative: Amount = Amount(0)
    ceiling: Amount = Amount(0)
    in_flight: Amount = Amount(0)

    def admit(self, order: Order, cap: Amount, security: Security) -> ProviderTab:
        """The tab with one more job in flight. Raises Refusal (unauthorised_tab, unsecured) if the job may not start."""
        exposure = self.cumulative + self.in_flight + cap
        ceiling = Amount(max(self.ceiling, order.ceiling))
        if exposure > ceiling:
            raise Refusal(
                Code.UNAUTHORISED_TAB,
                f"order.ceiling: expected at least {exposure} base units (the tab's total {self.cumulative} plus "
                f"{self.in_flight + cap} for this and running jobs), got {ceiling}",
            )
        if int(exposure) - int(security.settled) > int(security.reserved) + int(security.unsecured_limit):
            raise Refusal(
                Code.UNSECURED,
                f"this payer would owe {format_amount(exposure - security.settled)} dollars, but only "
                f"{format_amount(security.reserved)} is reserved for this provider, which trusts this payer with "
                f"{format_amount(security.unsecured_limit)} more. Reserve more: tally reserve PROVIDER AMOUNT",
            )
        return self._replace(ceiling=ceiling, in_flight=self.in_flight + cap)

    def record(self, cost: Amount, cap: Amount) -> ProviderTab:
        """The tab after the receipt of a job with this cap: it has the next `seq` and the new total."""
        return self._replace(seq=self.seq + 1, cumulative=self.cumulative + cost, in_flight=self.in_flight - cap)

    def drop(self, cap: Amount) -> ProviderTab:
        """The tab after a job ended without a receipt."""
        return self._replace(in_flight=self.in_flight - cap)


class Security(NamedTuple):
    """The security of a tab in base units: paid on chain, reserved on chain, and the provider's own trust in this payer."""

    settled: Amount
    reserved: Amount
    unsecured_limit: Amount


def check_receipt(order: Verified[Order], terms: Terms, receipt: Receipt) -> None:
    """Checks all of a receipt that follows from its order alone. Raises BadReceipt that names the member.

    The rules, in order: the parties are the order's; the order hash is the order's; the outcome is known; the usage is possible
    and within the terms; the cost is the charge for prices, usage and outcome; the total contains the cost. The total may exceed
    this order's own ceiling if a later order of the tab finished first: the payer compares it with its highest signed ceiling.
    """
    message = order.message
    if (receipt.payer, receipt.provider) != (message.payer, message.provider):
        raise BadReceipt("receipt: expected the payer and the provider of its order")
    if receipt.order_hash != order.digest:
        raise BadReceipt("receipt.orderHash: expected the hash of its order")
    try:
        outcome = Outcome(receipt.outcome)
    except ValueError:
        raise BadReceipt(f"receipt.outcome: expected a known outcome, got {receipt.outcome}") from None
    usage = usage_of(receipt)
    if usage.output > terms.max_output_tokens:
        raise BadReceipt(f"receipt.outputTokens: expected at most {terms.max_output_tokens}, got {usage.output}")
    due = charge(terms, usage, outcome)
    if receipt.cost != due:
        raise BadReceipt(f"receipt.cost: expected {due} base units from usage and prices, got {receipt.cost}")
    if receipt.cumulative_cost < receipt.cost:
        raise BadReceipt(
            f"receipt.cumulativeCost: expected at least the receipt's own cost of {receipt.cost} base units, "
            f"got {receipt.cumulative_cost}"
        )
