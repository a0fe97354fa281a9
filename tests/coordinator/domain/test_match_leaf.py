"""Leaves of matches: honest decisions replay without an objection, and each kind of broken rule is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain.limits import JobLimits
from coordinator.domain.log_check import LogReplay
from coordinator.domain.match_leaf import check_leaf
from tallystick.protocol.criteria import Reason
from tallystick.protocol.log_facts import AskFacts, RequestFacts
from tallystick.protocol.match_log import Considered, Match, MatchLeaf, Verdict, draw_of, load_leaf
from tallystick.protocol.merkle import leaf_hash
from tallystick.protocol.types import Amount, Hash, JobId
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import PAYER, FakeNode, World, hedged, quiet


@pytest.fixture
def honest() -> World:
    """A world whose matches are drawn from the job's id, as a real coordinator draws them."""
    world = World()
    world.market.matchmaker.draw = draw_of
    return world


async def leaf_of(world: World, *nodes: FakeNode, **changes: Any) -> MatchLeaf:
    """The leaf of a job's last match."""
    client = await world.started(*nodes, **changes)
    leaf = load_leaf(Match.loads(client.frames[-1][1]).leaf)
    assert isinstance(leaf, MatchLeaf)
    return leaf


def changed(leaf: MatchLeaf, place: int, **members: Any) -> MatchLeaf:
    """The leaf with one candidate changed."""
    entry = leaf.considered[place]
    facts = {name: members.pop(name) for name in list(members) if name in AskFacts._fields}
    if facts:
        assert entry.facts is not None
        members["facts"] = entry.facts._replace(**facts)
    considered = (*leaf.considered[:place], entry._replace(**members), *leaf.considered[place + 1 :])
    return replace(leaf, considered=considered)


async def test_honest_decisions_follow_the_rule(honest: World) -> None:
    """Whatever the load, prices, failures and newcomers: what the matcher decides, a replay of its leaf decides too."""
    prices = (1_000_000, 1_000_000, 1_005_000, 3_000_000)
    nodes = [honest.node(f"node {place}", slots=3, input_price=price) for place, price in enumerate(prices)]
    for step in range(60):
        leaf = await leaf_of(honest, *nodes)
        assert list(check_leaf(leaf)) == []
        client = honest.clients[-1]
        node = next(entry for entry in nodes if entry.address == client.job.provider)
        if step % 7 == 3:
            node.fail(client.job.id)
            await honest.pass_time(0)
            again = load_leaf(Match.loads(client.frames[-1][1]).leaf)
            assert isinstance(again, MatchLeaf)
            assert (again.attempt, list(check_leaf(again))) == (1, [])
            node = next(entry for entry in nodes if entry.address == client.job.provider)
        if step % 3 or step > 50:
            node.complete(client.job.id)
            await honest.pass_time(1)
        elif sum(not other.ended for other in honest.clients) > 8:
            for other in honest.clients:
                if not other.ended:
                    next(entry for entry in nodes if entry.address == other.job.provider).complete(other.job.id)
            await honest.pass_time(1)


async def test_each_candidate_has_its_reason(honest: World) -> None:
    """A busy node, a withdrawn ask, an order that the purse does not cover: the leaf says which, and a replay agrees."""
    chosen, busy, gone = honest.node("ann", input_price=2_000_000), honest.node("bob", slots=0), honest.node("cid")
    honest.market.node_gone(gone.address)
    leaf = await leaf_of(honest, busy, gone, chosen)
    outcomes = {entry.provider: entry.outcome for entry in leaf.considered}
    assert outcomes == {chosen.address: Verdict.CHOSEN, busy.address: Reason.BUSY, gone.address: Reason.ASK_GONE}
    assert [entry.place for entry in leaf.considered] == [2, 0, 1]
    assert list(check_leaf(leaf)) == []


async def test_a_candidate_that_cannot_be_paid_is_passed_over(honest: World) -> None:
    """A candidate that the payer's funds did not cover may come first in the ranking without getting the job."""
    unpaid, paid = honest.node("ann"), honest.node("bob", input_price=5_000_000)
    honest.funds.free[PAYER.address] = Amount(0)
    honest.funds.reserved[PAYER.address, paid.address] = Amount(100_000)
    leaf = await leaf_of(honest, unpaid, paid)
    assert [entry.outcome for entry in leaf.considered] == [Verdict.UNPAID, Verdict.CHOSEN]
    assert list(check_leaf(leaf)) == []


async def test_the_clients_own_order_is_kept(honest: World) -> None:
    """A job whose client ranked the candidates itself is replayed in that order."""
    dear, cheap = honest.node("ann", input_price=5_000_000), honest.node("bob")
    submission = replace(honest.submission(dear, cheap), ranked=True)
    client = honest.read(await honest.market.place_order(submission))
    await honest.pass_time(0)
    leaf = Match.loads(client.frames[0][1]).decision
    assert (leaf.ranked, leaf.chosen.provider, list(check_leaf(leaf))) == (True, dear.address, [])
    assert [text for text in check_leaf(replace(leaf, ranked=False)) if "ranks before" in text]


async def test_broken_rules_are_named(honest: World) -> None:
    """A swapped order, a worse choice, an invented or a missing reason, and a chosen draw are each named."""
    cheap, dear = honest.node("ann"), honest.node("bob", input_price=9_000_000)
    leaf = await leaf_of(honest, cheap, dear)
    assert list(check_leaf(leaf)) == []
    swapped = replace(leaf, considered=leaf.considered[::-1])
    assert any(f"{cheap.address} ranks before {dear.address}" in text for text in check_leaf(swapped))
    worse = changed(changed(leaf, 0, outcome=Verdict.OUTRANKED), 1, outcome=Verdict.CHOSEN)
    assert list(check_leaf(worse)) == [f"{cheap.address} was the first that could take the job, and {dear.address} got it"]
    for reason in (Reason.BUSY, Reason.ASK_EXPIRED, Reason.ASK_GONE, Reason.ORDER_EXPIRED, Reason.FAILED):
        invented = changed(worse, 0, outcome=reason)
        assert any(f"recorded as {reason.value!r}, and the facts say 'it fits'" in text for text in check_leaf(invented))
    full = changed(leaf, 0, free=0)
    assert any("recorded as 'it fits', and the facts say 'no free slot now'" in text for text in check_leaf(full))
    assert any("the draw is 0.5" in text for text in check_leaf(replace(leaf, draw=0.5)))
    late = replace(leaf, at=leaf.considered[0].deadline)
    assert any("the order on it has expired" in text for text in check_leaf(late))


FACTS = st.builds(
    AskFacts,
    input_price=st.integers(0, 10_000_000),
    cached_input_price=st.just(0),
    output_price=st.integers(0, 10_000_000),
    valid_from=st.just(0),
    valid_until=st.sampled_from([500, 2_000]),
    free=st.integers(0, 3),
    slots=st.integers(3, 4),
    queue=st.integers(0, 2),
    first_token_ms=st.integers(0, 10_000),
    tokens_per_second=st.integers(0, 500),
    reliability=st.integers(0, 2),
    score=st.floats(0, 1),
    newcomer=st.booleans(),
    integrity=st.integers(0, 1_000),
    audits=st.integers(0, 1 << 40),
    precision=st.text(max_size=8),
)


WEIGHTS = st.tuples(*[st.integers(0, 10**12)] * 3)


@given(st.lists(st.none() | FACTS, min_size=1, max_size=8), st.booleans(), st.data())
def test_any_leaf_is_judged_without_a_failure(facts: list[AskFacts | None], ranked: bool, data: st.DataObject) -> None:
    """A coordinator that writes nonsense into its leaves is named, and breaks no verifier."""
    outcomes = st.sampled_from([*Verdict, Reason.BUSY, Reason.ASK_GONE, Reason.FAILED])
    considered = tuple(
        Considered(PAYER.address, Hash(bytes(32)), data.draw(st.integers(0, 7)), data.draw(outcomes), 2_000, entry)
        for entry in facts
    )
    chosen = data.draw(st.integers(0, len(considered) - 1))
    others = [entry._replace(outcome=Verdict.OUTRANKED) if entry.outcome is Verdict.CHOSEN else entry for entry in considered]
    others[chosen] = others[chosen]._replace(outcome=Verdict.CHOSEN)
    request, commitment = RequestFacts(5, 6, *data.draw(WEIGHTS)), Hash(bytes(32))
    leaf = MatchLeaf(1_000, 0, JobId(bytes(16)), 0, commitment, ranked, 0.3, "m", request, tuple(others))
    read = load_leaf(leaf.dumps())
    assert isinstance(read, MatchLeaf)
    assert all(isinstance(text, str) for text in check_leaf(read))


async def test_a_hedged_match_follows_the_rule() -> None:
    """The second attempt of a hedged job excludes the first one's provider, and nobody else."""
    world = World(limits=JobLimits(hedge_share=1.0))
    world.market.matchmaker.draw = draw_of
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = world.read(await world.market.place_order(hedged(world.submission(ann, bob), 2.0)))
    await quiet()
    ann.accept(client.job.id)
    await world.pass_time(2.0)
    assert client.kinds == [Kind.MATCH, Kind.HEDGE]
    leaf = Match.loads(client.frames[1][1]).decision
    assert {entry.provider: entry.outcome for entry in leaf.considered} == {
        bob.address: Verdict.CHOSEN,
        ann.address: Reason.FAILED,
    }
    assert list(check_leaf(leaf)) == []
    replay = LogReplay()
    rows = [row.leaf or b"" for row in await world.log_store.log_entries(0, 99)]
    assert [fault.text for row in rows for fault in replay.add(leaf_hash(row), row)] == []


async def test_a_job_that_waited_is_matched_by_the_rule(honest: World) -> None:
    """The match of a job that left the queue has the time and the facts of its start, not those of its order."""
    node = honest.node("ann", slots=1)
    first = await honest.started(node)
    waiting = honest.read(await honest.market.place_order(honest.submission(node)))
    await quiet()
    assert Kind.MATCH not in waiting.kinds
    await honest.pass_time(30)
    node.complete(first.job.id)
    await quiet()
    matches = [payload for kind, payload in waiting.frames if kind is Kind.MATCH]
    leaf = Match.loads(matches[0]).decision
    assert (leaf.at, list(check_leaf(leaf))) == (int(honest.clock.now()), [])
    assert any("'no free slot now'" in text for text in check_leaf(changed(leaf, 0, free=0)))


async def test_the_clients_weights_decide(honest: World) -> None:
    """A leaf that ranks by price alone though the client weighed speed is named, and so is one with other weights."""
    slow, quick = honest.node("ann"), honest.node("bob", input_price=2_000_000, output_price=2_000_000)
    leaf = await leaf_of(honest, slow, quick)
    leaf = changed(changed(leaf, 0, first_token_ms=5_000, tokens_per_second=1), 1, first_token_ms=50, tokens_per_second=500)
    assert (leaf.chosen.provider, list(check_leaf(leaf))) == (slow.address, [])
    weighed = replace(leaf, request=leaf.request._replace(first_token_weight=10**9, speed_weight=10**9))
    assert any(f"{quick.address} ranks before {slow.address}" in text for text in check_leaf(weighed))
    cached = replace(leaf, request=leaf.request._replace(input_tokens=1_000_000, cached_tokens=1_000_000, holder=quick.address))
    assert any(f"{quick.address} ranks before" in text for text in check_leaf(changed(cached, 1, cached_input_price=0)))
