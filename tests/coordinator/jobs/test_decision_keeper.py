"""Decisions survive a restart: `tally node why` answers as before, for matches, for shortlists, and at other prices."""

from __future__ import annotations

from coordinator.domain.decision_codec import load_decisions
from coordinator.domain.decision_log import MAX_DECISIONS
from coordinator.storage.memory import MemoryLogStore
from tallystick.protocol.criteria import Demand
from tallystick.protocol.errors import Code, Unavailable
from tests.coordinator.harness import MODEL, World


async def test_decisions_survive_a_restart(world: World) -> None:
    """What was recorded of a provider, and what a shortlist would have been at another price, is the same after a restart."""
    await world.market.start()
    cheap, dear = world.node("ann"), world.node("bob", output_price=9_000_000)
    await world.started(cheap, dear)
    world.market.matchmaker.shortlist(Demand(MODEL, limit=1, max_output_price=3_000_000))
    before = [world.market.decision_log.verdicts(node.address, world.market.book, 9) for node in (cheap, dear)]
    await world.pass_time(1)
    await world.restart()
    after = [world.market.decision_log.verdicts(node.address, world.market.book, 9) for node in (cheap, dear)]
    assert after == before
    assert [verdict.why for verdict in after[1]] == [
        "its output price is above the client's maximum",
        "another was ranked before it: cheaper, or more reliable",
    ]
    (at_price,) = world.market.decision_log.verdicts(dear.address, world.market.book, 9, (None, 1_000_000))
    assert (at_price.won, at_price.why) == (True, "would have been offered to the client at this price")


async def test_only_new_decisions_are_stored(world: World) -> None:
    """Each decision is stored once; one that the database did not take is stored later."""
    await world.market.start()
    node, store = world.node("ann"), world.log_store
    assert isinstance(store, MemoryLogStore)
    await world.started(node)
    await world.pass_time(1)
    await world.pass_time(1)
    assert [len(load_decisions(doc)) for doc in store.decision_docs] == [1]
    enqueue = store.enqueue_decisions

    def refuse(count: int, doc: bytes) -> None:
        raise Unavailable(Code.DATABASE_UNAVAILABLE, f"no room for {count}, {len(doc)} bytes")

    store.enqueue_decisions = refuse  # type: ignore[method-assign]
    await world.started(node)
    await world.pass_time(1)
    store.enqueue_decisions = enqueue  # type: ignore[method-assign]
    await world.started(node)
    await world.pass_time(1)
    assert [len(load_decisions(doc)) for doc in store.decision_docs] == [1, 2]
    await world.restart()
    assert world.market.decision_log.count == 3


async def test_what_another_version_wrote_is_left_out(world: World) -> None:
    """Decisions that cannot be read are no reason not to start, and no more than the last ones are kept."""
    store = world.log_store
    assert isinstance(store, MemoryLogStore)
    store.decision_docs = [b"nonsense"]
    await world.market.start()
    node = world.node("ann")
    await world.started(node)
    await world.pass_time(1)
    store.decision_docs = [store.decision_docs[-1]] * (MAX_DECISIONS + 5)
    await world.restart()
    assert world.market.decision_log.count == MAX_DECISIONS
