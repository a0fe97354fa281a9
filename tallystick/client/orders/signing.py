"""Signing orders: the cap of a job, its terms, the reservation asked for, and the cumulative ceiling of the tab. Pure.

The next ceiling of a tab is the cost of all accepted receipts, plus the caps of all open orders, plus the cap of the new job.
"""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.client.orders.tab import Tab
from tallystick.protocol import pricing
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Ask, Order, Terms
from tallystick.protocol.sealing import padded_size
from tallystick.protocol.types import Address, Amount, Hash, JobId, format_amount

RESERVE_MULTIPLE = 4
"""An order asks for a reservation of at most this many times the cost of the provider's recorded receipts."""

MAX_CAP = Amount(10**15)
"""Highest cap of a job, in base units (a billion dollars): it keeps sums of caps within 63 bits."""


@dataclass(frozen=True, slots=True)
class OrderPolicy:
    """Settings that every order of a payer follows. Amounts are base units, durations seconds. `reserve_target` is the highest
    reservation that an order asks for; see `reserve_for`.
    """

    reserve_target: Amount
    start_seconds: int
    run_seconds: int
    claim_seconds: int
    max_fee_bps: int


@dataclass(frozen=True, slots=True)
class PlacedOrder:
    """A signed order and the terms that it commits to."""

    order: Verified[Order]
    terms: Terms

    @property
    def provider(self) -> Address:
        """The provider that the order is addressed to."""
        return self.order.message.provider


def cap_for(ask: Ask, request_bytes: int, output_tokens: int) -> Amount:
    """The cap, in base units, of a request with this many bytes of plaintext and at most this many output tokens.

    The cap is the worst case for the padded size, within the ask's context. The coordinator sees the padded size anyway, so the
    cap does not reveal the request's exact length.
    """
    prices = pricing.Prices(ask.input_price, ask.cached_input_price, ask.output_price)
    return pricing.worst_case(padded_size(request_bytes), output_tokens, prices, ask.context_tokens)


def reserve_for(tab: Tab, most: Amount) -> Amount:
    """The reservation, in base units, that an order asks for its provider.

    It is zero before the first recorded receipt that charged something, then RESERVE_MULTIPLE times the cost of the receipts, up
    to `most`.
    """
    return Amount(min(most, RESERVE_MULTIPLE * tab.accepted))


def terms_for(ask: Verified[Ask], *, job: JobId, commitment: Hash, output_tokens: int, body_bytes: int) -> Terms:
    """The terms of a job on this ask: `body_bytes` of plaintext, at most `output_tokens` of output; see `cap_for`."""
    offer = ask.message
    return Terms(
        model=offer.model,
        ask=ask.digest,
        input_price=offer.input_price,
        cached_input_price=offer.cached_input_price,
        output_price=offer.output_price,
        max_cost=cap_for(offer, body_bytes, output_tokens),
        max_output_tokens=output_tokens,
        job=job,
        request_commitment=commitment,
    ).keep_words()


def check_cap(terms: Terms, max_cost: Amount | None) -> None:
    """Compares the cap of a job with `max_cost`, the most that the payer allows for one request (None: MAX_CAP).

    Raises Refusal (cost_above_cap).
    """
    limit = min(MAX_CAP, MAX_CAP if max_cost is None else max_cost)
    if terms.max_cost > limit:
        raise Refusal(
            Code.COST_ABOVE_CAP,
            f"this request may cost up to {format_amount(terms.max_cost)} dollars, above the {format_amount(limit)} allowed for "
            "one request; lower max_tokens or raise max_cost",
        )


def sign_order(
    tab: Tab,
    terms: Terms,
    *,
    signer: Signer,
    provider: Address,
    coordinator: Address,
    domain: Domain,
    policy: OrderPolicy,
    now_ns: int,
) -> PlacedOrder:
    """Signs the order of a job for one provider.

    `now_ns` is Unix time in nanoseconds. The order's seq is at least `now_ns`, so it stays unique if the ledger file is lost.
    """
    now = now_ns // 1_000_000_000
    order = Order(
        payer=signer.address,
        provider=provider,
        ceiling=tab.protocol_tab.ceiling_for(terms.max_cost),
        reserve_target=reserve_for(tab, policy.reserve_target),
        seq=max(tab.order_seq + 1, now_ns),
        deadline=now + policy.start_seconds,
        claim_by=now + policy.claim_seconds,
        max_fee_bps=policy.max_fee_bps,
        coordinator=coordinator,
        terms_hash=terms.struct_hash(),
    ).keep_words()
    return PlacedOrder(signer.sign(order, domain), terms)
