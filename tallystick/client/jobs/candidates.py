"""The candidates of a job: what would be ordered of whom, which of these drafts may be, and the job's key wrapped for those
that were.
"""

from __future__ import annotations

from collections.abc import Sequence

from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import PlacedOrder, cap_for, check_cap, terms_for
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadSeal, Code, Fault, Refusal
from tallystick.protocol.messages import Ask, Terms
from tallystick.protocol.sealing import ContentKey, wrap_key
from tallystick.protocol.types import Address, Amount, Hash, JobId, format_amount
from tallystick.protocol.wire import Candidate


def draft_orders(
    asked: ApiRequest, asks: Sequence[Verified[Ask]], job: JobId, commitment: Hash, default_output: int
) -> list[tuple[Address, Terms]]:
    """What each ask that sells as much output as the call names would be ordered on. Raises Refusal if none does."""
    call = asked.summary
    least, size = call.output_tokens or 0, len(asked.plaintext)
    drafts: list[tuple[Address, Terms]] = []
    for ask in asks:
        sold = ask.message.max_output_tokens
        if least <= sold:
            wanted = call.tokens_to_order(default_output, sold)
            terms = terms_for(ask, job=job, commitment=commitment, output_tokens=wanted, body_bytes=size)
            drafts.append((ask.message.provider, terms))
    if not drafts:
        most = max(ask.message.max_output_tokens for ask in asks)
        text = f"{least} output tokens asked for; providers of {call.model!r} sell at most {most} a request"
        raise Refusal(Code.ORDER_TERMS, text)
    return drafts


def estimate_cost(asked: ApiRequest, ask: Ask, default_output: int, max_cost: int | None) -> tuple[Amount, str]:
    """What a request may cost on an ask, in base units, and why it would not be ordered there; empty if it would."""
    least = asked.summary.output_tokens or 0
    if least > ask.max_output_tokens:
        return Amount(0), f"it sells {ask.max_output_tokens} output tokens, not {least}"
    worst = cap_for(ask, len(asked.plaintext), asked.summary.tokens_to_order(default_output, ask.max_output_tokens))
    dear = max_cost is not None and worst > max_cost
    return worst, f"it may cost {format_amount(worst)}, more than max_cost allows" if dear else ""


def drafts_within_budget(drafts: Sequence[tuple[Address, Terms]], max_cost: Amount | None) -> list[tuple[Address, Terms]]:
    """The drafts whose cap is within what one job may cost. Raises the Refusal of the best one if none is."""
    found: list[tuple[Address, Terms]] = []
    refusals: list[Refusal] = []
    for provider, terms in drafts:
        try:
            check_cap(terms, max_cost)
        except Refusal as error:
            refusals.append(error)
        else:
            found.append((provider, terms))
    if not found:
        raise refusals[0]
    return found


def wrap_keys(job: JobId, key: ContentKey, placed: Sequence[PlacedOrder], asks: Sequence[Verified[Ask]]) -> tuple[Candidate, ...]:
    """The candidates, without those whose sealing key is unusable. Raises BadSeal if none is left."""
    offers = {ask.message.provider: ask.message for ask in asks}
    candidates: list[Candidate] = []
    refused: BadSeal | None = None
    for each in placed:
        ask, digest = offers[each.provider], each.order.digest
        try:
            wrapped = wrap_key(key, ask.sealing_suite, ask.sealing_key, job=job, order_hash=digest, provider=each.provider)
        except BadSeal as error:
            error.fault = Fault.PROVIDER
            refused = error
        else:
            candidates.append(Candidate(each.order, each.terms, wrapped))
    if refused is not None and not candidates:
        raise refused
    return tuple(candidates)
