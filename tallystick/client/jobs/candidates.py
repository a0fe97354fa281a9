"""The candidates of a job: drafts an order on each ask, drops those that cost too much, and wraps the job's key for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from tallystick.client.jobs.key_sessions import KeySessions
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import PlacedOrder, cap_for, check_cap, terms_for
from tallystick.protocol.criteria import context_refusal
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadSeal, Code, Fault, Refusal
from tallystick.protocol.features import denied
from tallystick.protocol.messages import Ask, Terms
from tallystick.protocol.sealing import ContentKey
from tallystick.protocol.types import Address, Amount, Hash, JobId, format_amount
from tallystick.protocol.wire import Candidate


def draft_orders(
    request: ApiRequest, asks: Sequence[Verified[Ask]], job: JobId, commitment: Hash, default_output: int
) -> list[tuple[Address, Terms]]:
    """The provider and the terms for each ask that sells as much output as the request asks for.

    `default_output`: output tokens to order for each choice if the request sets no limit. Raises Refusal if no ask sells enough,
    or if the request is longer than every context.
    """
    summary = request.summary
    asks, size = _asks_long_enough(request, asks), len(request.plaintext)
    most = max((ask.message.max_output_tokens for ask in asks), default=0)
    needed = summary.least_output(most)
    drafts: list[tuple[Address, Terms]] = []
    for ask in asks:
        sold = ask.message.max_output_tokens
        if needed <= sold:
            output_tokens = summary.tokens_to_order(default_output, sold)
            terms = terms_for(ask, job=job, commitment=commitment, output_tokens=output_tokens, body_bytes=size)
            drafts.append((ask.message.provider, terms))
    if not drafts:
        text = f"max_tokens: expected at most {most}, the most that providers of {summary.model!r} sell a request, got {needed}"
        raise Refusal(Code.ORDER_TERMS, text)
    return drafts


def _asks_long_enough(request: ApiRequest, asks: Sequence[Verified[Ask]]) -> list[Verified[Ask]]:
    """The asks whose context may hold the request. Raises Refusal if none may: an engine would refuse it, or cut it off."""
    least = request.summary.needs.least_tokens
    holding = [ask for ask in asks if _may_hold(ask.message, least)]
    if asks and not holding:
        raise context_refusal(request.summary.model, max(ask.message.context_tokens for ask in asks), least)
    return holding


def _may_hold(ask: Ask, least_tokens: int) -> bool:
    return not ask.context_tokens or least_tokens <= ask.context_tokens


def estimate_cost(request: ApiRequest, ask: Ask, default_output: int, max_cost: int | None) -> tuple[Amount, str]:
    """The most that a request may cost on an ask, in base units, and why it would not be ordered there; empty if it would."""
    needed, needs = request.summary.least_output(ask.max_output_tokens), request.summary.needs
    if not _may_hold(ask, needs.least_tokens):
        return Amount(
            0
        ), f"its context holds at most {ask.context_tokens} tokens, and the request has at least {needs.least_tokens}"
    if lacking := denied(ask.spec.features, needs.essential):
        return Amount(0), f"it declares that it lacks what the request needs: {', '.join(lacking)}"
    if needed > ask.max_output_tokens:
        return Amount(0), f"it sells at most {ask.max_output_tokens} output tokens a request, not {needed}"
    highest = cap_for(ask, len(request.plaintext), request.summary.tokens_to_order(default_output, ask.max_output_tokens))
    too_expensive = max_cost is not None and highest > max_cost
    return highest, f"it may cost {format_amount(highest)} dollars, more than max_cost allows" if too_expensive else ""


def drafts_within_budget(drafts: Sequence[tuple[Address, Terms]], max_cost: Amount | None) -> list[tuple[Address, Terms]]:
    """The drafts whose cap is at most `max_cost`. Raises the Refusal of the best draft if there are none."""
    within: list[tuple[Address, Terms]] = []
    refusals: list[Refusal] = []
    for provider, terms in drafts:
        try:
            check_cap(terms, max_cost)
        except Refusal as error:
            refusals.append(error)
        else:
            within.append((provider, terms))
    if not within:
        raise refusals[0]
    return within


def wrap_keys(
    job: JobId, key: ContentKey, orders: Sequence[PlacedOrder], asks: Sequence[Verified[Ask]], sessions: KeySessions
) -> tuple[Candidate, ...]:
    """The candidates for these orders, without those whose sealing key is unusable. Raises BadSeal if none is left."""
    asks_by_provider = {ask.message.provider: ask.message for ask in asks}
    candidates: list[Candidate] = []
    refused: BadSeal | None = None
    for placed in orders:
        ask, digest = asks_by_provider[placed.provider], placed.order.digest
        try:
            wrapped = sessions.wrap(key, ask, job=job, order_hash=digest, provider=placed.provider)
        except BadSeal as error:
            error.fault = Fault.PROVIDER
            refused = error
        else:
            candidates.append(Candidate(placed.order, placed.terms, wrapped))
    if refused is not None and not candidates:
        raise refused
    return tuple(candidates)
