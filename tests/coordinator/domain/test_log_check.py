"""The replay of a whole log: honest logs have no fault, and each kind of manipulation is named with its leaf."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from coordinator.domain.log_check import LogReplay
from tallystick.protocol.criteria import Reason
from tallystick.protocol.eip712 import read_signed
from tallystick.protocol.log_leaves import ReportLeaf, RestartLeaf
from tallystick.protocol.match_log import Match, MatchLeaf, draw_of, load_leaf
from tallystick.protocol.merkle import leaf_hash
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Hash
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import MODEL, PAYER, START, World, quiet


async def leaves_of(world: World) -> list[bytes]:
    """The leaves of a market with a failover and a restart."""
    world.market.matchmaker.draw = draw_of
    await world.market.start()
    first, second = world.node("ann"), world.node("bob", input_price=2_000_000)
    client = await world.started(first, second)
    first.fail(client.job.id)
    await quiet()
    assert client.kinds.count(Kind.MATCH) == 2
    await world.pass_time(3)
    await world.restart()
    world.market.matchmaker.draw = draw_of
    client = await world.started(second)
    assert Match.loads(client.frames[0][1]).decision.epoch == 3
    return [row.leaf or b"" for row in await world.log_store.log_entries(0, 99)]


def faults(leaves: list[bytes]) -> list[tuple[int, str]]:
    """What a replay of these leaves finds."""
    replay = LogReplay()
    return [(fault.index, fault.text) for leaf in leaves for fault in replay.add(leaf_hash(leaf), leaf)]


async def test_an_honest_log_has_no_fault(world: World) -> None:
    """The replay computes the signed root, and counts matches and restarts; contents that are gone are only counted."""
    leaves = await leaves_of(world)
    await world.market.match_log.sign_head()
    head = read_signed(LogHead, (await world.market.match_log.proof((), ()))["head"]).message
    replay = LogReplay()
    assert [fault for leaf in leaves for fault in replay.add(leaf_hash(leaf), leaf)] == []
    assert (replay.edge.size, replay.edge.root()) == (head.size, head.root)
    assert (replay.matches, replay.restarts, replay.forgotten) == (3, 2, 0)
    partly = LogReplay()
    kept = [None, None, *leaves[2:]]
    assert [fault for leaf, data in zip(leaves, kept, strict=True) for fault in partly.add(leaf_hash(leaf), data)] == []
    assert (partly.edge.root(), partly.forgotten) == (head.root, 2)


async def test_manipulations_are_named(world: World) -> None:
    """Back-dated leaves, wrong restarts, repeated attempts, invented failures and unreadable or swapped contents are named."""
    leaves = await leaves_of(world)
    first, last = load_leaf(leaves[1]), load_leaf(leaves[4])
    assert isinstance(first, MatchLeaf)
    assert isinstance(last, MatchLeaf)
    back = [*leaves[:4], replace(last, at=first.at - 1).dumps()]
    assert any(index == 4 and "it is back-dated" in text for index, text in faults(back))
    assert any(
        "it names leaf 1 as the restart of its process" in text
        for _, text in faults([*leaves[:4], replace(last, epoch=1).dumps()])
    )
    assert any(index == 2 and "were logged before" in text for index, text in faults([leaves[0], leaves[1], leaves[1]]))
    invented = first.considered[1]._replace(outcome=Reason.FAILED)
    excluded = replace(first, considered=(first.considered[0], invented)).dumps()
    assert any(index == 1 and "said to have had the job before" in text for index, text in faults([leaves[0], excluded]))
    assert any("leaf" in text for _, text in faults([b"\xff" * 20]))
    replay = LogReplay()
    (fault,) = replay.add(leaf_hash(leaves[0]), leaves[1])
    assert "do not have the hash" in fault.text
    assert faults([RestartLeaf(5).dumps()]) == []


async def test_facts_about_an_ask_are_compared_with_what_its_provider_signed(world: World) -> None:
    """A price or a validity that a leaf invents changes the ranking and breaks no rule in the leaf: the signed ask shows it."""
    leaves = await leaves_of(world)
    asks = [ask for node in world.nodes for ask in node.asks]
    replay = LogReplay()
    for leaf in leaves:
        assert list(replay.add(leaf_hash(leaf), leaf)) == []
    assert replay.models == {MODEL}
    assert [fault for ask in asks for fault in replay.check_ask(ask)] == []
    first = load_leaf(leaves[1])
    assert isinstance(first, MatchLeaf)
    entry = first.considered[-1]
    assert entry.facts is not None
    invented = {"input_price": 7, "cached_input_price": 7, "output_price": 7, "valid_from": 7, "valid_until": 1 << 31}
    for member, value in invented.items():
        considered = (*first.considered[:-1], entry._replace(facts=entry.facts._replace(**cast(Any, {member: value}))))
        forged = replace(first, considered=considered).dumps()
        replay = LogReplay()
        list(replay.add(leaf_hash(leaves[0]), leaves[0]))
        list(replay.add(leaf_hash(forged), forged))
        (fault,) = [fault for ask in asks for fault in replay.check_ask(ask)]
        assert fault.index == 1
        assert f"its {member} is recorded as {value}" in fault.text
    moved = replace(first, model="another", considered=(*first.considered[:-1], entry._replace(provider=PAYER.address))).dumps()
    replay = LogReplay()
    list(replay.add(leaf_hash(moved), moved))
    texts = [fault.text for ask in asks for fault in replay.check_ask(ask)]
    assert sum("its provider is recorded as" in text for text in texts) == 1
    assert sum("its model is recorded as another" in text for text in texts) == 2


async def audited_log(world: World) -> list[bytes]:
    """The leaves of a market in which an audit of ann was reported before its second match."""
    world.market.matchmaker.draw = draw_of
    await world.market.start()
    first = world.node("ann")
    await world.started(first)
    leaf = ReportLeaf(START, 0, bytes(16), first.signer.address, MODEL, "unknown", 0, False, 5_000, Hash(bytes(32)))
    world.market.matchmaker.integrity.apply(leaf, world.market.match_log.append_report(leaf)[0])
    await world.started(first)
    await quiet()
    return [row.leaf or b"" for row in await world.log_store.log_entries(0, 99)]


async def test_integrity_is_replayed(world: World) -> None:
    """The reports before a match give the integrity by which it was ranked; another one is named, and so is a dropped report."""
    leaves = await audited_log(world)
    assert faults(leaves) == []
    replay = LogReplay()
    for data in leaves:
        list(replay.add(leaf_hash(data), data))
    assert (replay.matches, replay.reports) == (2, 1)
    last = load_leaf(leaves[3])
    assert isinstance(last, MatchLeaf)
    facts = last.considered[0].facts
    assert facts is not None
    assert (facts.audits, facts.precision) == (1, "unknown")
    for wrong in (facts._replace(integrity=900), facts._replace(audits=2)):
        forged = replace(last, considered=(last.considered[0]._replace(facts=wrong),)).dumps()
        assert any("the logged reports make it" in text for _, text in faults([*leaves[:3], forged]))
    without = [leaves[0], leaves[1], leaves[3]]
    assert any("its integrity is recorded as" in text for _, text in faults(without))


async def test_an_old_integrity_counts_for_a_minute(world: World) -> None:
    """A match is decided a moment before it is logged, so it may not know a report of that moment, and must know older ones."""
    leaves = await audited_log(world)
    early = load_leaf(leaves[1])
    assert isinstance(early, MatchLeaf)
    for later, known in ((60, True), (61, False)):
        assert (faults([leaves[0], leaves[2], replace(early, at=early.at + later, draw=early.draw).dumps()]) == []) is known


@pytest.mark.parametrize(("verdict", "most"), [(0, 50_000), (1, 50_000), (2, 1_000)])
def test_reports_that_count_more_in_a_day_than_payers_may_are_named(verdict: int, most: int) -> None:
    """A coordinator that lets its friends' keys praise or accuse without bound shows it in its log. Its own probes are free."""

    def too_many(*reports: tuple[int, int, int, str, bool]) -> list[int]:
        """The leaves that break the bound; each report: seconds, verdict, weight, model, and whether it is a probe."""
        made = [
            ReportLeaf(START + at, 0, bytes((n,)) * 16, PAYER.address, model, "bf16", kind, probe, weight, Hash(bytes((n,)) * 32))
            for n, (at, kind, weight, model, probe) in enumerate(reports)
        ]
        return [index for index, text in faults([leaf.dumps() for leaf in made]) if "audits of" in text]

    weights = [10_000] * (most // 10_000) or [most]
    full = [(0, verdict, weight, MODEL, False) for weight in weights]
    assert too_many(*full) == []
    assert too_many(*full, (86_399, verdict, 1, MODEL, False)) == [len(full)]
    assert too_many(*full, (86_400, verdict, 1, MODEL, False)) == []
    assert too_many(*full, (1, verdict, 10_000, MODEL, True), (1, verdict, 1, "another", False)) == []
    assert too_many(*full, (1, 1 if verdict == 0 else 0, 10_000, MODEL, False), (2, 9, 10_000, MODEL, False)) == []


async def test_an_audit_that_counts_twice_is_named(world: World) -> None:
    """A coordinator that repeats a report to ruin or to praise a provider shows in its log."""
    leaves = await audited_log(world)
    leaf = load_leaf(leaves[2])
    assert isinstance(leaf, ReportLeaf)
    again = replace(leaf, report_hash=Hash(b"\x01" * 32)), replace(leaf, job_alias=b"\x02" * 16)
    for data in (leaves[2], *(other.dumps() for other in again)):
        assert any(index == 3 and "is counted again" in text for index, text in faults([*leaves[:3], data]))
    other = replace(again[0], job_alias=b"\x02" * 16).dumps()
    assert not any("is counted again" in text for _, text in faults([*leaves[:3], other]))
