"""Whether a job may start here. Pure: the one place where a dispatch becomes trusted.

The node trusts nobody: it holds the coordinator's match and the payer's order against its own asks and its own memory. The
rules are checked in this order, and the first that fails is the answer:

 1. the match is signed by the coordinator at the other end of this link, and names this job, this provider and this order
 2. the order is signed by its payer, and names this provider, this coordinator and a payer that is not the provider itself
 3. the terms are the ones that the order commits to, for this job
 4. the order was not seen before, and no job with this id is running
 5. the terms name one of this node's asks, with its model, its prices and no more output than it allows
 6. the order's deadline has not passed and is not absurdly far away; enough time is left to claim; the fee is bearable

What passes rules 1 to 4 is `Matched`: an order on this node, used up by whatever comes of it, so that a refusal releases its cap
with a receipt. `check_request` adds what can be known only once the seal is open. Whether the payer's tab bears it is
`tabs.Tabs.admit`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from node.domain.published_asks import Offer, PublishedAsks
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Order, Terms
from tallystick.protocol.pricing import prices_of, worst_case
from tallystick.protocol.sealing import commit_request
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import Dispatch


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """What a provider accepts. Times are seconds: `horizon` bounds how far ahead a deadline may lie, `claim_window` how much
    time must be left to claim. `max_fee_bps` bounds what the order lets its coordinator keep of the payment.

    `max_write_off` (base units) and `write_off_percent` (of what was earned there) bound what a coordinator may cost in a day:
    it is served while the jobs that it left unpaid cost no more than the larger of the two.
    """

    max_deadline_ahead: int = 86_400
    claim_window: int = 1_800
    max_fee_bps: int = 1_000
    max_unpaid: Amount = Amount(100_000)
    max_unpaid_percent: int = 5


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    """Who this node is on one link: its own account, the coordinator that proved itself there, and the market's domain."""

    provider: Address
    coordinator: Address
    domain: Domain


@dataclass(frozen=True, slots=True)
class Matched:
    """An order on this node, matched by this link's coordinator and not seen before; whether its terms are bearable is open."""

    job: JobId
    order: Verified[Order]
    terms: Terms
    attempt: int

    @property
    def payer(self) -> Address:
        """Who ordered it."""
        return self.order.message.payer

    @property
    def max_cost(self) -> Amount:
        """The most that it may cost."""
        return self.terms.max_cost


@dataclass(frozen=True, slots=True)
class Admitted(Matched):
    """A job that this node may run."""

    offer: Offer


class Admission:
    """Checks dispatches for one node. `seen` tells whether an order with this digest, or a job with this id, is known."""

    def __init__(self, asks: PublishedAsks, rules: AdmissionRules, seen: Callable[[Hash, JobId], bool]) -> None:
        self._asks, self.rules, self._seen = asks, rules, seen

    def verify(self, house: LinkIdentity, job: JobId, dispatch: Dispatch, now: int) -> Admitted:
        """The admitted job, by all rules. Raises Refusal with the reason, BadSignature, BadMessage, or Unavailable for an ask
        that is gone.
        """
        return self.admit(self.match(house, job, dispatch), now)

    def match(self, house: LinkIdentity, job: JobId, dispatch: Dispatch) -> Matched:
        """Rules 1 to 4. Raises Refusal, BadSignature, BadMessage."""
        order = _verify_match(house, job, dispatch)
        _verify_order(house, order.message)
        terms = dispatch.candidate.terms
        if order.message.terms_hash != terms.struct_hash() or terms.job != job:
            raise Refusal(Code.ORDER_TERMS, "order.termsHash: not the terms of this job")
        matched = Matched(job, order, terms, dispatch.match.message.attempt)
        self.require_unseen(matched)
        return matched

    def admit(self, matched: Matched, now: int) -> Admitted:
        """Rules 5 and 6, at `now` in Unix seconds. Raises Refusal, or Unavailable for an ask that is gone."""
        offer = self._verify_terms(matched.terms, now)
        self._verify_times(matched.order.message, now)
        return Admitted(matched.job, matched.order, matched.terms, matched.attempt, offer)

    def require_unseen(self, matched: Matched) -> None:
        """Rule 4 by itself, for a caller that waited since `match`. Raises Refusal."""
        if self._seen(matched.order.digest, matched.job):
            raise Refusal(Code.ORDER_REPLAYED, f"order {matched.order.digest.hex()}: this node had it before")

    def _verify_terms(self, terms: Terms, now: int) -> Offer:
        standing = self._asks.find(terms.ask, now)
        if standing is None:
            # Its engine may have gone since the shortlist was made: that is nobody's fault, and others can do the job.
            raise Unavailable(Code.ORDER_TERMS, "terms.ask: not an ask of this node that still stands")
        ask = standing.ask.message
        if terms.model != ask.model:
            raise Refusal(Code.UNKNOWN_MODEL, f"terms.model: the ask sells {ask.model!r}")
        if prices_of(terms) != standing.offer.prices:
            raise Refusal(Code.ORDER_TERMS, f"terms: prices differ from the ask's {standing.offer.prices}")
        if terms.max_output_tokens > ask.max_output_tokens:
            raise Refusal(Code.ORDER_TERMS, f"terms.maxOutputTokens: the ask allows {ask.max_output_tokens}")
        return standing.offer

    def _verify_times(self, order: Order, now: int) -> None:
        rules = self.rules
        if order.deadline <= now:
            raise Refusal(Code.ORDER_EXPIRED, f"order.deadline: passed {now - order.deadline} s ago by this node's clock")
        if order.deadline > now + rules.max_deadline_ahead:
            raise Refusal(Code.ORDER_TERMS, f"order.deadline: more than {rules.max_deadline_ahead} s ahead of this node's clock")
        if order.claim_by < now + rules.claim_window:
            raise Refusal(Code.ORDER_TERMS, f"order.claimBy: must leave this node at least {rules.claim_window} s to claim")
        if order.max_fee_bps > rules.max_fee_bps:
            raise Refusal(Code.ORDER_TERMS, f"order.maxFeeBps: this provider bears a fee of {rules.max_fee_bps} at most")


def _verify_match(house: LinkIdentity, job: JobId, dispatch: Dispatch) -> Verified[Order]:
    match = dispatch.match.verify(house.domain).message
    if match.coordinator != house.coordinator:
        raise Refusal(Code.ORDER_MISDIRECTED, f"match: made by {match.coordinator}, this link is of {house.coordinator}")
    order = dispatch.candidate.order.verify(house.domain)
    if (match.provider, match.job, match.order_hash) != (house.provider, job, order.digest):
        raise Refusal(Code.ORDER_MISDIRECTED, "match: of another job, provider or order", fault=Fault.COORDINATOR)
    return order


def _verify_order(house: LinkIdentity, order: Order) -> None:
    if order.provider != house.provider:
        raise Refusal(Code.ORDER_MISDIRECTED, f"order.provider: {order.provider}, this node is {house.provider}")
    if order.coordinator != house.coordinator:
        raise Refusal(Code.ORDER_MISDIRECTED, f"order.coordinator: {order.coordinator}, this link is of {house.coordinator}")
    if order.payer == order.provider:
        raise Refusal(Code.ORDER_MISDIRECTED, "order.payer: is the provider itself; the contract pays no such tab")


def check_request(terms: Terms, commitment_key: bytes, plain: bytes, body: bytes) -> None:
    """Holds an opened request against its terms. `plain` is all of it, `body` what the engine will see. Raises Refusal."""
    if commit_request(commitment_key, terms.job, plain) != terms.request_commitment:
        raise Refusal(Code.ORDER_TERMS, "terms.requestCommitment: not of this request")
    floor = worst_case(len(body), terms.max_output_tokens, prices_of(terms))
    if terms.max_cost < floor:
        raise Refusal(Code.COST_ABOVE_CAP, f"terms.maxCost: {terms.max_cost}, but this request can cost {floor}")
