"""Builders of messages with a default for every member, so a test names only the members that matter to it. The defaults are
valid: the first order of a tab, cheap, never expiring. Keyword arguments replace members by name. Nothing is signed here.
"""

from __future__ import annotations

from typing import Any

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.log_facts import AskFacts, RequestFacts
from tallystick.protocol.match_log import SECRET_SIZE, Considered, Match, MatchLeaf, Verdict, commit, draw_of
from tallystick.protocol.messages import Ask, Order, Outcome, Receipt, Spec, Terms
from tallystick.protocol.pricing import Usage, charge
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Address, Amount, JobId

FOREVER = 1 << 40
"""A time that no test reaches (Unix seconds)."""
NO_USAGE = Usage(0, 0, 0)


def build_ask(provider: Address, /, **changes: Any) -> Ask:
    """An ask at one base unit per token, half of that for cached input, and two for output."""
    values: dict[str, Any] = {
        "provider": provider,
        "model": "m",
        "input_price": 1_000_000,
        "cached_input_price": 500_000,
        "output_price": 2_000_000,
        "context_tokens": 8_192,
        "max_output_tokens": 1_024,
        "sealing_suite": "x25519",
        "sealing_key": bytes(32),
        "valid_from": 0,
        "valid_until": FOREVER,
        "seq": 1,
        "spec": Spec(),
    }
    return Ask(**(values | changes))


def build_terms(**changes: Any) -> Terms:
    """Terms of no ask, with the lowest prices."""
    values: dict[str, Any] = {
        "model": "m",
        "ask": ZERO_HASH,
        "input_price": 1,
        "cached_input_price": 1,
        "output_price": 1,
        "max_cost": Amount(1),
        "max_output_tokens": 1,
        "job": JobId(bytes(16)),
        "request_commitment": ZERO_HASH,
    }
    return Terms(**(values | changes))


def terms_of(ask: Verified[Ask], /, **changes: Any) -> Terms:
    """Terms with the model and the prices of an ask."""
    offer = ask.message
    values: dict[str, Any] = {
        "model": offer.model,
        "ask": ask.digest,
        "input_price": offer.input_price,
        "cached_input_price": offer.cached_input_price,
        "output_price": offer.output_price,
    }
    return build_terms(**(values | changes))


def build_order(payer: Address, provider: Address, ceiling: int = 1, /, **changes: Any) -> Order:
    """An order without reservation, fee or coordinator, and with no terms behind its hash."""
    values: dict[str, Any] = {
        "payer": payer,
        "provider": provider,
        "ceiling": Amount(ceiling),
        "reserve_target": Amount(0),
        "seq": 1,
        "deadline": FOREVER,
        "claim_by": FOREVER,
        "max_fee_bps": 0,
        "coordinator": ZERO_ADDRESS,
        "terms_hash": ZERO_HASH,
    }
    return Order(**(values | changes))


def build_receipt(payer: Address, provider: Address, usage: Usage = NO_USAGE, /, **changes: Any) -> Receipt:
    """A receipt at no cost for a job that completed."""
    values: dict[str, Any] = {
        "payer": payer,
        "provider": provider,
        "seq": 1,
        "cumulative_cost": Amount(0),
        "order_hash": ZERO_HASH,
        "result_commitment": ZERO_HASH,
        "input_tokens": usage.input,
        "cached_input_tokens": usage.cached,
        "output_tokens": usage.output,
        "cost": Amount(0),
        "outcome": Outcome.COMPLETED,
        "finished_at": 0,
        "evidence_root": ZERO_HASH,
    }
    return Receipt(**(values | changes))


def receipt_for(
    order: Verified[Order],
    terms: Terms,
    usage: Usage,
    outcome: Outcome = Outcome.COMPLETED,
    tab: tuple[int, int] = (0, 0),
    /,
    **changes: Any,
) -> Receipt:
    """The honest receipt of a job, on a tab whose last receipt had this sequence number and this total in base units."""
    cost = charge(terms, usage, outcome)
    values: dict[str, Any] = {
        "seq": tab[0] + 1,
        "cumulative_cost": Amount(tab[1] + cost),
        "order_hash": order.digest,
        "cost": cost,
        "outcome": outcome,
    }
    return build_receipt(order.message.payer, order.message.provider, usage, **(values | changes))


def check_continuity(previous: Receipt, receipt: Receipt) -> None:
    """Asserts that a receipt of a tab is the one after `previous`."""
    assert receipt.seq == previous.seq + 1
    assert receipt.cumulative_cost == previous.cumulative_cost + receipt.cost


def build_match(order: Verified[Order], terms: Terms, /, index: int = 1, **changes: Any) -> Match:
    """The match of an order, whose leaf names its provider as the only candidate. Keyword arguments replace members of the leaf.

    `provider` and `order_hash` replace what the leaf and the match say of the order.
    """
    secret = bytes(SECRET_SIZE)
    order_hash = changes.pop("order_hash", order.digest)
    provider = changes.pop("provider", order.message.provider)
    prices = (terms.input_price, terms.cached_input_price, terms.output_price)
    facts = AskFacts(*prices, 0, 0xFFFFFFFF, 1, 1, 0, 0, 0, 0, 1.0, newcomer=False)
    deadline = min(order.message.deadline, 0xFFFFFFFF)
    job = changes.get("job", terms.job)
    values: dict[str, Any] = {
        "at": 1,
        "epoch": 0,
        "job": job,
        "attempt": 0,
        "commitment": commit(secret, order.message.payer, order_hash, job),
        "ranked": False,
        "draw": draw_of(job, changes.get("attempt", 0)),
        "model": terms.model,
        "request": RequestFacts(),
        "considered": (Considered(provider, terms.ask, 0, Verdict.CHOSEN, deadline, facts),),
    }
    leaf = MatchLeaf(**(values | changes))
    return Match(index, secret, order_hash, leaf.dumps(), leaf)
