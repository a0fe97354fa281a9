"""The leaf of a match: what the matcher saw of each candidate, and whether a leaf follows the matcher's own rule. Pure.

`check_leaf` decides again from the facts in a leaf, with the functions that decided first. What the facts themselves rest on (a
score, free slots, a payer's purse) is the coordinator's word; TRUST in docs/explanation says which of it others can check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from coordinator.domain.listed_ask import ConnectedNode, ListedAsk, SlotGroup, Speed
from coordinator.domain.matching import candidate_rejection, rank_fitting
from coordinator.domain.ranking import Ranked
from coordinator.domain.reputation import Reputation
from coordinator.domain.scoring import RequestShape, Scorer
from tallystick.protocol.criteria import Reason
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.log_facts import AskFacts, RequestFacts
from tallystick.protocol.match_log import Considered, MatchLeaf, Outcome, Verdict, draw_of
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import Address, Amount, Hash
from tallystick.protocol.weights import Weights
from tallystick.protocol.wire import Candidate

_AFTER_RANKING = (Verdict.UNPAID, Verdict.HELD)
"""Why a candidate that fitted was passed over."""


def facts_of(listed_ask: ListedAsk, reputation: Reputation) -> AskFacts:
    """Returns what the matcher knows of an ask and its node now."""
    ask, node, group = listed_ask.message, listed_ask.node, listed_ask.slot_group
    return AskFacts(
        ask.input_price,
        ask.cached_input_price,
        ask.output_price,
        ask.valid_from,
        ask.valid_until,
        group.places,
        group.slots,
        group.capacity.queue,
        listed_ask.first_token_ms,
        listed_ask.tokens_per_second,
        node.reliability,
        reputation.score(node.provider),
        reputation.newcomer(node.provider),
        listed_ask.integrity,
        listed_ask.audits,
        precision_class(ask.spec.precision),
    )


def consider(
    candidates: Sequence[Candidate],
    ranked: Sequence[Ranked[tuple[ListedAsk, Candidate]]],
    rejected: Mapping[Address, str],
    find: Callable[[Hash], ListedAsk | None],
    reputation: Reputation,
) -> list[Considered]:
    """Returns all candidates of a match as its leaf has them: the fitting ones in their order, then the others.

    Called before anything is assigned. Fitting candidates have the outcome OUTRANKED until `decided` gives them theirs.
    """
    places = {id(candidate): place for place, candidate in enumerate(candidates)}
    fitting = [entry.entry[1] for entry in ranked]
    others = [candidate for candidate in candidates if not any(candidate is entry for entry in fitting)]
    considered = list[Considered]()
    for candidate in (*fitting, *others):
        order, listed_ask = candidate.order.message, find(candidate.terms.ask)
        outcome: Outcome = Verdict.OUTRANKED
        if len(considered) >= len(fitting):
            outcome = Reason(rejected[order.provider])
        facts = None if listed_ask is None else facts_of(listed_ask, reputation)
        considered.append(Considered(order.provider, candidate.terms.ask, places[id(candidate)], outcome, order.deadline, facts))
    return considered


def request_facts(shape: RequestShape) -> RequestFacts:
    """Returns what a leaf says of a request."""
    weights = shape.weights
    return RequestFacts(
        shape.input_tokens,
        shape.output_tokens,
        weights.first_token,
        weights.speed,
        weights.loss,
        shape.cached_tokens,
        shape.holder,
    )


def _shape(facts: RequestFacts) -> RequestShape:
    weights = Weights(*map(Amount, (facts.first_token_weight, facts.speed_weight, facts.loss_weight)))
    return RequestShape(facts.input_tokens, facts.output_tokens, weights, facts.holder, facts.cached_tokens)


def check_leaf(leaf: MatchLeaf) -> Iterator[str]:
    """Yields how a decision broke the matcher's rule, by the facts in its own leaf; nothing if it did not."""
    if leaf.draw != draw_of(leaf.job, leaf.attempt):
        yield f"the draw is {leaf.draw}, and the job's id gives {draw_of(leaf.job, leaf.attempt)}"
    fitting = list[tuple[ListedAsk, Considered]]()
    for entry in leaf.considered:
        listed_ask = None if entry.facts is None else _listed_ask(leaf.model, entry, entry.facts)
        tried = entry.outcome is Reason.FAILED and leaf.attempt > 0
        reason = candidate_rejection(listed_ask, leaf.model, entry.deadline, leaf.at, tried=tried)
        recorded = entry.outcome if isinstance(entry.outcome, Reason) else None
        if reason is not recorded:
            found, given = ("it fits" if why is None else why.value for why in (reason, recorded))
            yield f"{entry.provider}: recorded as {given!r}, and the facts say {found!r}"
        if listed_ask is not None and reason is None:
            fitting.append((listed_ask, entry))
    yield from _check_order(leaf, fitting)


def _check_order(leaf: MatchLeaf, fitting: list[tuple[ListedAsk, Considered]]) -> Iterator[str]:
    facts = {entry.provider: entry.facts for _, entry in fitting if entry.facts is not None}
    submitted = sorted(fitting, key=lambda pair: pair[1].place)
    ranking = rank_fitting(
        submitted,
        Scorer(_shape(leaf.request), lambda provider: facts[provider].score),
        ranked=leaf.ranked,
        newcomer=lambda provider: facts[provider].newcomer,
        chance=leaf.draw,
    )
    ranked = [entry.entry for entry in ranking]
    for (_, expected), (_, recorded) in zip(ranked, fitting, strict=True):
        if expected is not recorded:
            yield f"{expected.provider} ranks before {recorded.provider} by the facts, and the leaf has them the other way round"
            break
    first = next((entry for _, entry in ranked if entry.outcome not in _AFTER_RANKING), None)
    if first is not None and first is not leaf.chosen:
        yield f"{first.provider} was the first that could take the job, and {leaf.chosen.provider} got it"


def _listed_ask(model: str, entry: Considered, facts: AskFacts) -> ListedAsk:
    """Returns an ask with the facts of a leaf, for the functions that ranked the real one."""
    ask = Ask(
        provider=entry.provider,
        model=model,
        input_price=facts.input_price,
        cached_input_price=facts.cached_input_price,
        output_price=facts.output_price,
        context_tokens=0,
        max_output_tokens=0,
        sealing_suite="",
        sealing_key=b"",
        valid_from=facts.valid_from,
        valid_until=facts.valid_until,
        seq=0,
        spec=Spec(),
    )
    node = ConnectedNode(entry.provider, reliability=facts.reliability)
    group = SlotGroup(node, 0, Capacity(facts.free, facts.slots, queue=facts.queue))
    group.set_state(group.current_state, 0)
    standing = facts.integrity, facts.audits
    return ListedAsk(Verified(ask, b"", entry.ask), group, Speed(facts.first_token_ms, facts.tokens_per_second), standing)
