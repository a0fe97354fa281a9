"""Receipts: invalid ones, late ones, and acknowledgements, which follow only after storage."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.domain.reputation import UNKNOWN_PROVIDER
from coordinator.jobs.matchmaker import RETURN_SECONDS
from coordinator.ports import JobRecord, KnownJob
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, Refusal, Unavailable
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.tab import MAX_SEQ
from tallystick.protocol.types import Amount, JobId
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import (
    COST,
    PAYER,
    START,
    Client,
    FakeNode,
    World,
    hash_of,
    hedged,
    make_order,
    person,
    quiet,
    unchecked,
)

_REPORTED = "reported by its provider, after this coordinator had lost it"


async def _receipts(world: World, client: Client) -> list[Signed[Receipt]]:
    known = await world.store.job(client.job.id)
    assert known is not None
    return list(known.receipts.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cost": Amount(COST + 1), "cumulative_cost": Amount(COST + 1)}, "receipt.cost"),
        ({"cost": Amount(0)}, "receipt.cost"),
        ({"input_tokens": 1_000}, "receipt.cost"),
        ({"output_tokens": 101}, "receipt.outputTokens"),
        ({"cached_input_tokens": 11}, "usage"),
        ({"cumulative_cost": Amount(COST - 1)}, "receipt.cumulativeCost"),
        ({"order_hash": hash_of("another order")}, "receipt.orderHash"),
        ({"payer": person("somebody").address}, "the payer and the provider of its order"),
        ({"seq": 0}, "receipt.seq"),
        ({"seq": MAX_SEQ + 1}, "receipt.seq"),
    ],
)
async def test_a_bad_receipt_ends_the_job_uncharged(world: World, changes: dict[str, Any], says: str) -> None:
    """A receipt that contradicts its order ends the job as the provider's fault; it is neither stored nor counted."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    node.complete(client.job.id, **changes)
    await quiet()
    assert (client.failure.code, client.failure.fault, client.failure.status) == (Code.BAD_RECEIPT, Fault.PROVIDER, 502)
    assert says in str(client.failure)
    assert await _receipts(world, client) == []
    assert node.got(Kind.RECEIPT_ACK) == []
    assert await world.stored(client) is State.FAILED
    assert world.market.exposure.size == 0
    assert world.market.reputation.score(node.address) < UNKNOWN_PROVIDER.score
    world.assert_idle()


async def test_the_longest_tab_there_may_be(world: World) -> None:
    """A seq is accepted up to the protocol's maximum, which fits the databases' numbers."""
    node = world.node("ann")
    client = await world.started(node)
    node.complete(client.job.id, seq=MAX_SEQ)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT
    assert MAX_SEQ == 1 << 62


async def test_an_unknown_outcome(world: World) -> None:
    """A receipt with an unknown outcome is refused."""
    node = world.node("ann")
    client = await world.started(node)
    good = node.receipt(client.job.id)
    bad = replace(good.message, outcome=7)
    node.hand_in(client.job.id, Signed(bad, node.signer.sign_digest(bad.digest(world.market.domain))))
    await quiet()
    assert "outcome" in str(client.failure)
    world.assert_idle()


async def test_a_receipt_signed_by_another_provider(world: World) -> None:
    """A receipt that another provider signed, for itself or for this one, is refused."""
    node, other = world.node("ann"), person("bob")
    for changes in ({}, {"provider": other.address}):
        client = await world.started(node)
        message = replace(node.receipt(client.job.id).message, **changes)  # type: ignore[arg-type]
        node.hand_in(client.job.id, Signed(message, other.sign_digest(message.digest(world.market.domain))))
        await quiet()
        assert (client.failure.code, client.failure.fault) == (Code.BAD_RECEIPT, Fault.PROVIDER)
        assert await _receipts(world, client) == []


async def test_a_receipt_of_another_job(world: World) -> None:
    """A receipt of one job is refused for the next."""
    node = world.node("ann")
    first = await world.started(node)
    used = node.complete(first.job.id)
    await quiet()
    second = await world.started(node)
    node.hand_in(second.job.id, used)
    await quiet()
    assert "orderHash" in str(second.failure)


@pytest.mark.parametrize("payload", [b"", b"not JSON", b"{}", b"null", b'{"message": {}, "signature": "0x"}', b"\xff"])
async def test_a_receipt_that_is_none(world: World, payload: bytes) -> None:
    """A receipt that does not parse is the provider's fault, not the client's."""
    node = world.node("ann")
    client = await world.started(node)
    node.send(Kind.RECEIPT, client.job.id, payload)
    await quiet()
    assert (client.failure.code, client.failure.fault) == (Code.BAD_RECEIPT, Fault.PROVIDER)
    world.assert_idle()


async def test_an_inflated_total_does_not_use_up_the_purse(world: World) -> None:
    """A provider that signs a total above every ceiling harms its own tab alone: the payer may continue to trade."""
    ann, bob = world.node("ann"), world.node("bob")
    client = await world.started(ann, ceiling=Amount(5_000))
    ann.complete(client.job.id, cumulative_cost=Amount(10**27))
    await quiet()
    tab = world.market.exposure.known(PAYER.address, ann.address)
    assert tab is not None
    assert tab.cumulative == 5_000
    await world.started(bob)
    await world.restart()
    tab = world.market.exposure.known(PAYER.address, ann.address)
    assert tab is not None
    assert tab.cumulative == 5_000


# Late receipts


async def _unknown_jobs(world: World, node: FakeNode) -> tuple[Client, Verified[Receipt]]:
    """Places a job whose node was lost after some output. Returns the receipt that did not arrive."""
    client = await world.started(node)
    node.chunk(client.job.id)
    node.last_chunk(client.job.id)
    await quiet()
    receipt = node.receipt(client.job.id)
    node.leave()
    await quiet()
    assert client.kinds[-1] is Kind.FAIL
    node.connect()
    return client, receipt


async def test_a_receipt_after_a_reconnection(world: World) -> None:
    """A receipt that arrives after its job failed is stored, counted and acknowledged; the job's end does not change."""
    node = world.node("ann")
    client, receipt = await _unknown_jobs(world, node)
    assert await node.hand_in_late(client.job.id, receipt)
    assert await _receipts(world, client) == [unchecked(receipt)]
    assert node.got(Kind.RECEIPT_ACK, client.job.id) == [b""]
    assert await world.stored(client) is State.FAILED
    tab = world.market.exposure.known(PAYER.address, node.address)
    assert tab is not None
    assert tab.cumulative == COST
    world.assert_idle()


async def test_a_receipt_that_comes_twice(world: World) -> None:
    """Sending a receipt again changes nothing and is acknowledged again: the first acknowledgement may have been lost."""
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.complete(client.job.id)
    await quiet()
    for _ in range(2):
        assert await node.hand_in_late(client.job.id, receipt)
    assert len(node.got(Kind.RECEIPT_ACK, client.job.id)) == 3
    assert await _receipts(world, client) == [unchecked(receipt)]


async def test_a_second_receipt_for_one_order(world: World) -> None:
    """Another receipt for the same order is refused and not acknowledged; the first one stays."""
    node = world.node("ann")
    client = await world.started(node)
    first = node.complete(client.job.id)
    await quiet()
    second = node.receipt(client.job.id, outcome=Outcome.PROVIDER_ERROR)
    with pytest.raises(BadReceipt, match="a second one for the same order; the first has seq 1"):
        await node.hand_in_late(client.job.id, second)
    assert await _receipts(world, client) == [unchecked(first)]
    assert len(node.got(Kind.RECEIPT_ACK)) == 1


async def test_a_receipt_of_a_former_attempt(world: World) -> None:
    """The receipt of a former attempt's provider is stored beside that of the provider that completed the job."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    await world.pass_time(11)
    early = ann.receipt(client.job.id, outcome=Outcome.TIMED_OUT)
    assert await ann.hand_in_late(client.job.id, early)
    assert await world.stored(client) is State.MATCHED, "the job goes on"
    done = bob.complete(client.job.id)
    await quiet()
    expected = [unchecked(early), unchecked(done)]
    assert await _receipts(world, client) == expected
    assert ann.got(Kind.RECEIPT_ACK, client.job.id) == bob.got(Kind.RECEIPT_ACK, client.job.id) == [b""]
    assert await ann.hand_in_late(client.job.id, early), "and may be handed in again"
    known = await world.store.job(client.job.id)
    assert known is not None
    assert known.receipt == unchecked(done)
    assert known.record.state is State.COMPLETED


async def test_a_former_attempts_receipt_after_the_end(world: World) -> None:
    """The stored receipt is acknowledged to its own provider; another provider's receipt does not count for it."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    await world.pass_time(11)
    bob.complete(client.job.id)
    await quiet()
    early = ann.receipt(client.job.id, outcome=Outcome.TIMED_OUT)
    assert await ann.hand_in_late(client.job.id, early)
    assert len(await _receipts(world, client)) == 2
    assert ann.got(Kind.RECEIPT_ACK, client.job.id) == [b""]


async def test_a_late_receipt_must_be_as_good(world: World) -> None:
    """A late receipt is checked like any other; one of a provider that never had the job is refused."""
    node, stranger = world.node("ann"), world.node("bob")
    client, receipt = await _unknown_jobs(world, node)
    with pytest.raises(BadReceipt, match=r"receipt\.cost"):
        await node.hand_in_late(client.job.id, node.receipt(client.job.id, cost=Amount(COST + 1)))
    with pytest.raises(BadReceipt, match="never had this job"):
        await stranger.hand_in_late(client.job.id, receipt)
    with pytest.raises(BadReceipt, match="cut off"):
        await world.market.accept_receipt(node.address, client.job.id, b"nonsense")
    assert await _receipts(world, client) == []
    assert node.got(Kind.RECEIPT_ACK) == stranger.got(Kind.RECEIPT_ACK) == []


async def test_a_receipt_of_an_unknown_job(world: World) -> None:
    """A receipt for an unknown job is neither accepted nor acknowledged."""
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.receipt(client.job.id)
    assert not await node.hand_in_late(JobId(b"\x09" * 16), receipt)
    assert node.got(Kind.RECEIPT_ACK) == []


def _late(node: FakeNode, client: Client, **changes: Any) -> LateReceipt:
    order, terms = node.dispatch(client.job.id)
    return LateReceipt(unchecked(node.receipt(client.job.id, **changes)), unchecked(order), terms)


async def _forgotten(world: World) -> None:
    """Restarts a coordinator that was killed before it had stored anything."""
    world.store = MemoryStore()
    await world.restart()


@pytest.mark.parametrize(
    ("outcome", "state"),
    [(Outcome.COMPLETED, State.COMPLETED), (Outcome.CLIENT_CANCELLED, State.CANCELLED), (Outcome.TIMED_OUT, State.EXPIRED)],
)
async def test_a_job_that_was_lost_is_known_again_by_its_receipt(world: World, outcome: Outcome, state: State) -> None:
    """A receipt with its order restores a lost job's outcome and its debt."""
    node = world.node("ann")
    client = await world.started(node)
    late_receipt = _late(node, client, outcome=outcome)
    await _forgotten(world)
    assert not await node.hand_in_late(client.job.id, late_receipt.receipt), "without its order it proves nothing"
    await world.market.accept_late(node.address, client.job.id, late_receipt)
    known = await world.store.job(client.job.id)
    assert known is not None
    assert (known.record.state, known.receipt) == (state, late_receipt.receipt)
    tab = world.market.exposure.known(PAYER.address, node.address)
    assert (tab.cumulative if tab else 0) == late_receipt.receipt.message.cost
    await world.market.accept_late(node.address, client.job.id, late_receipt)
    assert node.got(Kind.RECEIPT_ACK, client.job.id) == [b"", b""], "also when it comes again"
    assert world.market.reputation.score(node.address) == world.market.reputation.score(person("somebody").address)
    with pytest.raises(Refusal, match="placed before"):
        await world.market.place_order(client.job.submission)


async def test_a_lost_jobs_receipt_must_be_as_good(world: World) -> None:
    """Without the payer's own order for this coordinator, or with a wrong cost, nothing is stored."""
    node, stranger = world.node("ann"), world.node("bob")
    client = await world.started(node)
    late_receipt, wrong = _late(node, client), _late(node, client, cost=Amount(COST + 1))
    order = late_receipt.order.message
    elsewhere = make_order(late_receipt.terms, node.address, coordinator=stranger.address)
    forged = Signed(order, stranger.signer.sign_digest(order.digest(world.market.domain)))
    await _forgotten(world)
    for provider, job, invalid in (
        (node.address, client.job.id, wrong),
        (node.address, client.job.id, replace(late_receipt, order=unchecked(elsewhere))),
        (node.address, client.job.id, replace(late_receipt, order=forged)),
        (node.address, JobId(b"\x09" * 16), late_receipt),
        (stranger.address, client.job.id, late_receipt),
    ):
        with pytest.raises(BadReceipt):
            await world.market.accept_late(provider, job, invalid)
    world.clock.seconds = order.claim_by - START
    with pytest.raises(Refusal, match="no longer be claimed"):
        await world.market.accept_late(node.address, client.job.id, late_receipt)
    assert await world.store.job(client.job.id) is None
    assert node.got(Kind.RECEIPT_ACK) == []


# Restarts


async def test_a_receipt_after_a_restart(world: World) -> None:
    """A restart ends live jobs as failed and still accepts their receipts."""
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.receipt(client.job.id)
    await world.restart()
    known = await world.store.job(client.job.id)
    assert known is not None
    assert (known.record.state, known.record.finished_at) == (State.FAILED, int(world.clock.now()))
    assert known.record.last.reason == "the coordinator was restarted"
    assert await node.hand_in_late(client.job.id, receipt)
    assert await _receipts(world, client) == [unchecked(receipt)]
    assert node.got(Kind.RECEIPT_ACK, client.job.id) == [b""]


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (Outcome.COMPLETED, State.COMPLETED),
        (Outcome.LENGTH, State.COMPLETED),
        (Outcome.CLIENT_CANCELLED, State.CANCELLED),
        (Outcome.TIMED_OUT, State.EXPIRED),
        (Outcome.UPSTREAM_ERROR, State.FAILED),
    ],
)
async def test_a_job_whose_end_nobody_saw_ends_as_its_receipt_says(world: World, outcome: Outcome, state: State) -> None:
    """After a restart the state is failed until the receipt comes; then coordinator and client tell the same, for good."""
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.receipt(client.job.id, outcome=outcome)
    await world.restart()
    ended_at = int(world.clock.now())
    world.clock.seconds += 100
    for _ in range(2):
        assert await node.hand_in_late(client.job.id, receipt)
        known = await world.store.job(client.job.id)
        assert known is not None
        record, (attempt,) = known.record, known.record.attempts
        assert (record.state, record.finished_at, attempt.state, attempt.unseen) == (state, ended_at, state, True)
        failed = state is State.FAILED
        assert attempt.reason == ("the coordinator was restarted" if failed else _REPORTED)
        assert (record.unseen_attempts() == (attempt,)) is failed


async def test_an_end_that_was_seen_stays(world: World) -> None:
    """A receipt that comes after a failure that the coordinator saw changes no state, before a restart and after it."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    receipt = node.receipt(client.job.id, outcome=Outcome.UPSTREAM_ERROR)
    world.market.node_gone(node.address)
    await quiet()
    assert await world.stored(client) is State.FAILED
    await world.restart()
    known = await world.store.job(client.job.id)
    assert known is not None
    assert known.record.unseen_attempts() == ()
    assert await node.hand_in_late(client.job.id, receipt)
    assert await world.store.job(client.job.id) == replace(known, receipts={node.address: unchecked(receipt)})


@pytest.mark.parametrize("streams", [True, False])
async def test_a_stop_that_cut_off_a_node_lets_its_receipt_tell_the_end(world: World, *, streams: bool) -> None:
    """The node may have sent its last chunk, which this process never read. So its charge is not refused: the payer gets it, and
    checks it against what came. No other node has the job meanwhile, and no provider is to blame.
    """
    node, other = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(node, other)
    if streams:
        node.chunk(client.job.id)
    receipt = node.receipt(client.job.id)
    world.market.node_gone(node.address, cut_off=True)
    await quiet()
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
    assert other.sent == []
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score
    assert await world.stored(client) is State.FAILED
    await world.restart()
    assert await node.hand_in_late(client.job.id, receipt)
    known = await world.store.job(client.job.id)
    assert known is not None
    assert (known.record.state, known.receipt) == (State.COMPLETED, unchecked(receipt))


async def test_a_lost_node_is_not_cut_off(world: World) -> None:
    """Whatever broke its connection, the last chunk did not come, so it is not charged for through this coordinator."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    receipt = node.receipt(client.job.id)
    world.market.node_gone(node.address)
    await quiet()
    with pytest.raises(BadReceipt, match="the last chunk of the response never reached this coordinator"):
        await node.hand_in_late(client.job.id, receipt)


async def test_a_whole_answer_that_the_stop_cut_off_was_seen(world: World) -> None:
    """Its last chunk was relayed, so nothing about it is unknown."""
    node = world.node("ann")
    client = await world.started(node)
    node.last_chunk(client.job.id)
    await quiet()
    world.market.node_gone(node.address, cut_off=True)
    await quiet()
    known = await world.store.job(client.job.id)
    assert known is not None
    (attempt,) = known.record.attempts
    assert (attempt.delivered, attempt.unseen) == (True, False)


async def test_models_are_unavailable_right_after_a_restart(world: World) -> None:
    """After a restart, a model without asks is unavailable for a while, since its provider may reconnect."""
    node = world.node("ann")
    client = await world.started(node)
    world.nodes.clear()
    await world.restart()
    demand = Demand(model=client.job.submission.candidates[0].terms.model)
    with pytest.raises(Unavailable, match="was restarted"):
        world.market.matchmaker.shortlist(demand)
    await world.pass_time(RETURN_SECONDS)
    with pytest.raises(Refusal, match="no provider offers"):
        world.market.matchmaker.shortlist(demand)


async def test_a_restart_remembers_jobs_and_totals(world: World) -> None:
    """After a restart replays are refused, and debts still count."""
    node = world.node("ann")
    client = await world.started(node)
    node.complete(client.job.id)
    await quiet()
    await world.restart()
    with pytest.raises(Exception, match="placed before"):
        await world.market.place_order(client.job.submission)
    tab = world.market.exposure.known(PAYER.address, node.address)
    assert tab is not None
    assert tab.cumulative == COST


# Durability


@dataclass
class _FailingStore(MemoryStore):
    """A store that records the order of events and refuses receipts while `down`."""

    down: bool = False
    log: list[str] = field(default_factory=list)

    async def put_receipt(self, job: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None = None) -> None:
        if self.down:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database does not answer")
        await super().put_receipt(job, receipt, total, record)
        self.log.append("stored")


class _NotingNode(FakeNode):
    def receive(self, frame: bytes) -> None:
        super().receive(frame)
        store = self.market._store
        if frame[0] == Kind.RECEIPT_ACK and isinstance(store, _FailingStore):
            store.log.append("acknowledged")


async def test_acknowledged_after_it_is_durable() -> None:
    """A receipt is stored before its node gets the acknowledgement."""
    store = _FailingStore()
    world = World(store=store)
    plain = world.node("ann")
    node = _NotingNode(world.market, world.bus, plain.signer, plain.asks)
    node.connect()
    client = await world.started(node)
    node.complete(client.job.id)
    await quiet()
    assert store.log == ["stored", "acknowledged"]


async def test_a_store_that_is_down_loses_no_receipt() -> None:
    """A receipt that cannot be stored still reaches the client and ends the job; its node sends it again, and it is stored."""
    store = _FailingStore(down=True)
    world = World(store=store)
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.complete(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.RECEIPT]
    assert node.got(Kind.RECEIPT_ACK) == []
    assert await world.stored(client) is State.COMPLETED
    world.assert_idle()
    with pytest.raises(Unavailable):
        await node.hand_in_late(client.job.id, receipt)
    assert node.got(Kind.RECEIPT_ACK) == []
    store.down = False
    assert await node.hand_in_late(client.job.id, receipt)
    assert await _receipts(world, client) == [unchecked(receipt)]
    assert node.got(Kind.RECEIPT_ACK, client.job.id) == [b""]
    tab = world.market.exposure.known(PAYER.address, node.address)
    assert tab is not None
    assert tab.cumulative == COST, "counted once"


async def test_an_end_that_was_lost_is_learnt_from_the_receipt() -> None:
    """If the store lost the end of a job, the receipt that arrives again restores it."""
    store = MemoryStore()
    world = World(store=store)
    node = world.node("ann")
    client = await world.started(node)
    record = store.jobs[client.job.id]
    receipt = node.receipt(client.job.id)
    node.fail(client.job.id)
    await quiet()
    store.jobs[client.job.id] = record  # the write of the end was lost
    await node.hand_in_late(client.job.id, receipt)
    known = await store.job(client.job.id)
    assert known is not None
    assert (known.record.state, known.record.last.state) == (State.COMPLETED, State.COMPLETED)


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize("charged", [True, False])
async def test_the_end_of_a_hedged_job_that_was_lost(attempts: int, *, charged: bool) -> None:
    """A receipt ends a job that is open in the store, but one at no cost does not while another provider may still have it."""
    store = MemoryStore()
    world = World(store=store, limits=JobLimits(hedge_share=1.0))
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = world.read(await world.market.place_order(hedged(world.submission(*(ann, bob)[:attempts]), 2.0)))
    await quiet()
    ann.accept(client.job.id)
    record = store.jobs[client.job.id]
    if attempts == 2:
        await world.pass_time(2.0)
        record = store.jobs[client.job.id]
    assert len(record.open_attempts()) == attempts
    free = {"outcome": Outcome.PROVIDER_ERROR, "input_tokens": 0, "output_tokens": 0, "cost": Amount(0)}
    receipt = ann.receipt(client.job.id, **({} if charged else free))
    for node in (ann, bob)[:attempts]:
        node.fail(client.job.id)
    await quiet()
    store.jobs[client.job.id] = record  # the write of the end was lost
    await ann.hand_in_late(client.job.id, receipt)
    known = await store.job(client.job.id)
    assert known is not None
    states = [attempt.state for attempt in known.record.attempts]
    if attempts == 2 and not charged:
        assert (known.record, list(known.receipts)) == (record, [ann.address]), "bob may still have it"
    elif attempts == 2:
        assert (known.record.state, states) == (State.COMPLETED, [State.COMPLETED, State.CANCELLED])
    else:
        assert states == [known.record.state] == [State.COMPLETED if charged else State.FAILED]


async def test_a_receipt_payload_reaches_the_client_untouched(world: World) -> None:
    """The client gets the receipt byte for byte as the provider signed it."""
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.complete(client.job.id)
    await quiet()
    assert client.frames[-1] == (Kind.RECEIPT, receipt.to_bytes())


class _OtherReplicas(MemoryStore):
    """A store whose open jobs run at another replica."""

    async def job(self, job: JobId) -> KnownJob | None:
        known = await super().job(job)
        return known if known is None or known.record.state in TERMINAL else replace(known, replica="two")


async def test_the_replica_that_runs_a_job_checks_its_receipt() -> None:
    """Elsewhere nobody knows what was relayed: the receipt is neither refused nor acknowledged until the job has ended."""
    world = World(store=_OtherReplicas())
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.receipt(client.job.id)
    job, world.market = client.job.id, world.make_market()
    node.market = world.market
    with pytest.raises(Unavailable, match=f"another replica of this coordinator runs job {job.hex()}; send it there") as caught:
        await node.hand_in_late(job, receipt)
    assert (caught.value.code, caught.value.fault) == (Code.COORDINATOR_UNAVAILABLE, Fault.COORDINATOR)
    assert node.got(Kind.RECEIPT_ACK) == node.got(Kind.RECEIPT_REFUSED) == []
    known = await world.store.job(job)
    assert known is not None
    assert known.receipts == {}
    await world.store.load_state(START, 0)
    assert await node.hand_in_late(job, receipt)
    assert node.got(Kind.RECEIPT_ACK, job) == [b""]


async def test_a_receipt_ends_the_job_of_a_lost_replica() -> None:
    """If the replica that ran a job is gone, its job is ended for the receipt, which counts at once; own jobs are left alone."""
    world = World(store=_OtherReplicas())
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.receipt(client.job.id)
    job, world.market = client.job.id, world.make_market()
    node.market, asked = world.market, list[tuple[JobId, str]]()

    async def end_lost(job: JobId, replica: str) -> bool:
        asked.append((job, replica))
        if len(asked) == 2:  # it was alive when it was asked first
            await world.store.load_state(START, 0)
        return len(asked) == 2

    world.market._receipts.end_lost = end_lost
    with pytest.raises(Unavailable, match="another replica of this coordinator runs job"):
        await node.hand_in_late(job, receipt)
    for _ in range(2):
        assert await node.hand_in_late(job, receipt)
    assert node.got(Kind.RECEIPT_ACK, job) == [b"", b""]
    assert asked == [(job, "two"), (job, "two")], "an ended job is no other replica's"


async def test_the_end_of_a_hedged_job_that_nobody_saw() -> None:
    """After a restart, a free receipt of one provider decides nothing while the other may have won; one with a cost does."""
    store = MemoryStore()
    world = World(store=store, limits=JobLimits(hedge_share=1.0))
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = world.read(await world.market.place_order(hedged(world.submission(ann, bob), 2.0)))
    await quiet()
    ann.accept(client.job.id)
    await world.pass_time(2.0)
    bob.accept(client.job.id)
    free = ann.receipt(client.job.id, outcome=Outcome.PROVIDER_ERROR, input_tokens=0, output_tokens=0, cost=Amount(0))
    paid = bob.receipt(client.job.id)
    await world.restart()
    assert len(store.jobs[client.job.id].unseen_attempts()) == 2
    await ann.hand_in_late(client.job.id, free)
    assert store.jobs[client.job.id].state is State.FAILED
    await bob.hand_in_late(client.job.id, paid)
    record = store.jobs[client.job.id]
    states = [(attempt.provider, attempt.state, attempt.outrun) for attempt in record.attempts]
    assert states == [(ann.address, State.CANCELLED, True), (bob.address, State.COMPLETED, False)]
    assert (record.state, record.last.provider) == (State.COMPLETED, bob.address)
