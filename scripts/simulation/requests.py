"""Requests of a simulation, and the messages of the protocol that stand for them: orders and receipts without signatures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from random import Random

from coordinator.domain.listed_ask import ListedAsk
from scripts.simulation.parties import Model, Payer, SimulatedNode
from scripts.simulation.records import JobResult
from scripts.simulation.replica import TrustedOrder
from scripts.simulation.scenario import ANSWER
from tallystick.client.selection.prefix_tags import PrefixTag
from tallystick.protocol.criteria import Demand
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms
from tallystick.protocol.pricing import Prices, Usage, cost, worst_case
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Amount, Hash, JobId
from tallystick.protocol.wire import Candidate

BYTES_PER_TOKEN = 4


@dataclass(slots=True)
class Turn:
    """A request: its conversation, the tokens that earlier turns had already, its input and its output."""

    conversation: int
    model: Model
    earlier: int
    input: int
    output: int


@dataclass(slots=True)
class Request:
    """A request of a payer, while it is under way. `cheapest`: the cheapest asks when it came, see `Replica.cheapest`."""

    payer: Payer
    turn: Turn
    random: Random
    result: JobResult
    demand: Demand
    cheapest: tuple[ListedAsk | None, ListedAsk | None] = (None, None)


def candidate_of(payer: Payer, turn: Turn, entry: ListedAsk, job: JobId, now: int) -> Candidate:
    """Returns an order on an ask for a request. `now`: Unix seconds."""
    ask = entry.message
    prices = Prices(ask.input_price, ask.cached_input_price, ask.output_price)
    cap = worst_case(BYTES_PER_TOKEN * turn.input, ANSWER.most, prices, ask.context_tokens)
    terms = Terms(
        model=ask.model,
        ask=entry.digest,
        input_price=ask.input_price,
        cached_input_price=ask.cached_input_price,
        output_price=ask.output_price,
        max_cost=cap,
        max_output_tokens=ANSWER.most,
        job=job,
        request_commitment=ZERO_HASH,
    )
    order = Order(
        payer=payer.address,
        provider=ask.provider,
        ceiling=Amount(1 << 80),
        reserve_target=Amount(payer.reserved),
        seq=1,
        deadline=now + 3_600,
        claim_by=now + 100_000,
        max_fee_bps=0,
        coordinator=ZERO_ADDRESS,
        terms_hash=ZERO_HASH,
    )
    return Candidate(TrustedOrder(order, b""), terms, b"")


def highest_cap(candidates: Iterable[Candidate]) -> int:
    """Returns the highest cap of a job's orders, in base units: no further order may cost more."""
    return max(candidate.terms.max_cost for candidate in candidates)


def price_with(entry: ListedAsk, usage: Usage) -> Amount:
    """Returns what this usage costs with an ask, in base units."""
    ask = entry.message
    return cost(usage, Prices(ask.input_price, ask.cached_input_price, ask.output_price))


def tags_of(turn: Turn) -> tuple[PrefixTag, ...]:
    """Returns the tag of a conversation. Its number is scattered, since the table takes places from a tag's first bytes."""
    tag = sha256(turn.conversation.to_bytes(8, "big")).digest()[:16]
    return (PrefixTag(tag, 100 * turn.earlier // turn.input),)


def receipt_of(payer: Payer, node: SimulatedNode, usage: Usage, paid: Amount) -> Receipt:
    """Returns a receipt of an answer."""
    return Receipt(
        payer=payer.address,
        provider=node.provider,
        seq=1,
        cumulative_cost=paid,
        order_hash=ZERO_HASH,
        result_commitment=Hash(ZERO_HASH),
        input_tokens=usage.input,
        cached_input_tokens=usage.cached,
        output_tokens=usage.output,
        cost=paid,
        outcome=Outcome.COMPLETED.value,
        finished_at=0,
        evidence_root=ZERO_HASH,
    )
