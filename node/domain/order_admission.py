"""Order admission: decides whether a dispatched job may start here. This is the only place where a dispatch becomes trusted.

The node trusts no other party: it checks the coordinator's match and the payer's order against its own asks and its own records.
The first rule that fails gives the error:

1. the match is signed by the coordinator of this link, and names this job, this provider and this order
2. the order is signed by its payer, and names this provider, this coordinator, and a payer other than the provider
3. the terms are the ones that the order commits to, for this job
4. the order was not seen before, and no job with this id is running
5. the terms name one of this node's asks, with its model, its prices and at most its output limit
6. the order's deadline lies ahead and within `max_deadline_ahead`; enough time is left to claim; the fee is acceptable

An order that passes rules 1 to 4 is `MatchedOrder`: it is addressed to this node and consumed by every later step, so a refusal
releases its cap with a receipt. `check_request` adds the rules that need the opened request. `tabs.Tabs.admit` decides whether
the payer has enough credit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from node.domain.admission_rules import AdmissionRules
from node.domain.published_asks import Offer, PublishedAsks
from tallystick.protocol.eip712 import Domain, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Order, Terms
from tallystick.protocol.pricing import prices_of, worst_case
from tallystick.protocol.sealing import commit_request
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tallystick.protocol.wire import Dispatch


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    """The parties of one link: this provider's account, the authenticated coordinator, and the market's EIP-712 domain."""

    provider: Address
    coordinator: Address
    domain: Domain


@dataclass(frozen=True, slots=True)
class MatchedOrder:
    """An order that was matched with this node by this link's coordinator and not seen before. Its terms are not yet checked."""

    job: JobId
    order: Verified[Order]
    terms: Terms

    @property
    def payer(self) -> Address:
        """The account that signed the order."""
        return self.order.message.payer

    @property
    def max_cost(self) -> Amount:
        """The largest cost of the job, in base units."""
        return self.terms.max_cost


@dataclass(frozen=True, slots=True)
class AdmittedJob(MatchedOrder):
    """A job that this node may run."""

    offer: Offer


class Admission:
    """Checks dispatches for one node. `seen` returns whether an order with this digest or a job with this id is known."""

    def __init__(self, asks: PublishedAsks, rules: AdmissionRules, seen: Callable[[Hash, JobId], bool]) -> None:
        self._asks, self.rules, self._seen = asks, rules, seen

    def verify(self, link: LinkIdentity, job: JobId, dispatch: Dispatch, now: int) -> AdmittedJob:
        """Checks all rules and returns the admitted job. Raises Refusal, BadSignature or BadMessage, and Unavailable if the ask
        was withdrawn.
        """
        return self.admit(self.match(link, job, dispatch), now)

    def match(self, link: LinkIdentity, job: JobId, dispatch: Dispatch) -> MatchedOrder:
        """Checks rules 1 to 4. Raises Refusal, BadSignature, BadMessage."""
        order = _verify_match(link, job, dispatch)
        _verify_order(link, order.message)
        terms = dispatch.candidate.terms
        if order.message.terms_hash != terms.struct_hash() or terms.job != job:
            raise Refusal(
                Code.ORDER_TERMS,
                "order.termsHash: expected the hash of this job's terms; the client must sign the terms that it sends",
            )
        matched = MatchedOrder(job, order, terms)
        self.require_unseen(matched)
        return matched

    def admit(self, matched: MatchedOrder, now: int) -> AdmittedJob:
        """Checks rules 5 and 6 at `now` (Unix seconds). Raises Refusal, or Unavailable if the ask was withdrawn."""
        offer = self._verify_terms(matched.terms, now)
        self._verify_times(matched.order.message, now)
        return AdmittedJob(matched.job, matched.order, matched.terms, offer)

    def require_unseen(self, matched: MatchedOrder) -> None:
        """Checks rule 4 alone, for a caller that waited since `match`. Raises Refusal."""
        if self._seen(matched.order.digest, matched.job):
            raise Refusal(
                Code.ORDER_REPLAYED, f"order {matched.order.digest.hex()}: this node has already received it; sign a new order"
            )

    def _verify_terms(self, terms: Terms, now: int) -> Offer:
        published = self._asks.find(terms.ask, now)
        if published is None:
            # The engine may have failed since the shortlist was made. No party is at fault, and other providers can do the job.
            raise Unavailable(
                Code.ORDER_TERMS, "terms.ask: expected a current ask of this node; the ask was withdrawn or has expired"
            )
        ask = published.ask.message
        if terms.model != ask.model:
            raise Refusal(Code.UNKNOWN_MODEL, f"terms.model: expected {ask.model!r}, the model of the ask, got {terms.model!r}")
        if prices_of(terms) != published.offer.prices:
            raise Refusal(Code.ORDER_TERMS, f"terms: expected the ask's {published.offer.prices}, got {prices_of(terms)}")
        if terms.max_output_tokens > ask.max_output_tokens:
            raise Refusal(
                Code.ORDER_TERMS,
                f"terms.maxOutputTokens: expected at most {ask.max_output_tokens}, got {terms.max_output_tokens}",
            )
        return published.offer

    def _verify_times(self, order: Order, now: int) -> None:
        rules = self.rules
        if order.deadline <= now:
            raise Refusal(Code.ORDER_EXPIRED, f"order.deadline: passed {now - order.deadline} s ago by this node's clock")
        if order.deadline > now + rules.max_deadline_ahead:
            raise Refusal(
                Code.ORDER_TERMS,
                f"order.deadline: expected at most {rules.max_deadline_ahead} s ahead of this node's clock, got "
                f"{order.deadline - now} s",
            )
        if order.claim_by < now + rules.claim_window:
            raise Refusal(
                Code.ORDER_TERMS,
                f"order.claimBy: expected at least {rules.claim_window} s from now, got {order.claim_by - now} s",
            )
        if order.max_fee_bps > rules.max_fee_bps:
            raise Refusal(Code.ORDER_TERMS, f"order.maxFeeBps: expected at most {rules.max_fee_bps}, got {order.max_fee_bps}")


def _verify_match(link: LinkIdentity, job: JobId, dispatch: Dispatch) -> Verified[Order]:
    order = dispatch.candidate.order.verify(link.domain)
    try:
        dispatch.match.check(job, order.digest, link.provider, order.message.payer)
    except BadMessage as error:
        raise Refusal(Code.ORDER_MISDIRECTED, str(error), fault=Fault.COORDINATOR) from error
    return order


def _verify_order(link: LinkIdentity, order: Order) -> None:
    if order.provider != link.provider:
        raise Refusal(
            Code.ORDER_MISDIRECTED, f"order.provider: expected {link.provider}, this node's account, got {order.provider}"
        )
    if order.coordinator != link.coordinator:
        raise Refusal(
            Code.ORDER_MISDIRECTED,
            f"order.coordinator: expected {link.coordinator}, the coordinator of this link, got {order.coordinator}",
        )
    if order.payer == order.provider:
        raise Refusal(
            Code.ORDER_MISDIRECTED, "order.payer: expected an account other than the provider's; the contract settles no such tab"
        )


def check_request(terms: Terms, commitment_key: bytes, plain: bytes, body: bytes, context_tokens: int = 0) -> None:
    """Checks an opened request against its terms. `plain` is the whole request, `body` the part that the engine receives,
    `context_tokens` the context of the ask. Raises Refusal.
    """
    if commit_request(commitment_key, terms.job, plain) != terms.request_commitment:
        raise Refusal(Code.ORDER_TERMS, "terms.requestCommitment: expected the commitment to this request")
    largest_cost = worst_case(len(body), terms.max_output_tokens, prices_of(terms), context_tokens)
    if terms.max_cost < largest_cost:
        raise Refusal(
            Code.COST_ABOVE_CAP,
            f"terms.maxCost: expected at least {largest_cost} base units, the largest cost of this request, got {terms.max_cost}",
        )
