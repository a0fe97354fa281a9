"""Failover: another node gets the job of a failed one, before the first output alone and within the job's time."""

from __future__ import annotations

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.domain.reputation import UNKNOWN_PROVIDER
from coordinator.domain.resource_bounds import INBOX_FRAMES
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.wire import Kind, dumps
from tests.coordinator.harness import START, Client, FakeNode, World, quiet


@pytest.fixture
def ann(world: World) -> FakeNode:
    """The cheaper of two nodes: jobs for both go to it first."""
    return world.node("ann")


@pytest.fixture
def bob(world: World) -> FakeNode:
    """The more expensive of two nodes."""
    return world.node("bob", output_price=9_000_000)


async def _handed_on(world: World, client: Client, ann: FakeNode, bob: FakeNode) -> None:
    """Asserts that the job went from Ann to Bob and completes there."""
    assert client.kinds == [Kind.MATCH, Kind.MATCH]
    assert len(ann.got(Kind.DISPATCH)) == len(bob.got(Kind.DISPATCH)) == 1
    bob.chunk(client.job.id)
    bob.complete(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT]
    assert await world.stored(client) is State.COMPLETED
    known = await world.store.job(client.job.id)
    assert known is not None
    assert [a.provider for a in known.record.attempts] == [ann.address, bob.address]
    assert [a.state for a in known.record.attempts] == [State.FAILED, State.COMPLETED]
    world.assert_idle()


async def test_a_node_that_fails_the_job(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A failure that another node may not have moves the job to the next candidate; the client gets a second match."""
    client = await world.started(ann, bob)
    ann.accept(client.job.id)
    ann.fail(client.job.id)
    await quiet()
    await _handed_on(world, client, ann, bob)


async def test_a_node_that_is_lost(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A lost connection moves the job to the next candidate."""
    client = await world.started(ann, bob)
    ann.leave()
    await quiet()
    await _handed_on(world, client, ann, bob)


async def test_a_node_that_does_not_answer(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A node that does not accept in ten seconds is told to stop, and the next candidate gets the job."""
    client = await world.started(ann, bob)
    await world.pass_time(10)
    assert len(bob.sent) == 0
    await world.pass_time(0.5)
    assert ann.got(Kind.CANCEL, client.job.id) == [b"timed_out"]
    await _handed_on(world, client, ann, bob)


async def test_a_node_that_accepts_and_never_begins(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """An accepted job has two minutes for its first output; then the next candidate gets it."""
    client = await world.started(ann, bob)
    ann.accept(client.job.id)
    await quiet()
    await world.pass_time(120)
    assert len(bob.sent) == 0
    await world.pass_time(0.5)
    client.frames = [frame for frame in client.frames if frame[0] is not Kind.BEAT]
    await _handed_on(world, client, ann, bob)


async def test_late_frames_of_a_former_attempt_are_dropped(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """Frames of a former attempt do not reach the client."""
    client = await world.started(ann, bob)
    await world.pass_time(11)
    ann.accept(client.job.id)
    ann.chunk(client.job.id)
    ann.fail(client.job.id)
    await quiet()
    await _handed_on(world, client, ann, bob)


async def test_no_failover_after_output(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """Once the client has output, a failure ends the job: no other node could continue it."""
    client = await world.started(ann, bob)
    ann.chunk(client.job.id)
    ann.fail(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.FAIL]
    assert bob.sent == []
    assert await world.stored(client) is State.FAILED
    world.assert_idle()


async def test_a_node_lost_after_output(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A connection lost in the middle of a response ends the job, at the provider's fault."""
    client = await world.started(ann, bob)
    ann.chunk(client.job.id)
    ann.leave()
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.FAIL]
    assert (client.failure.code, client.failure.fault) == (Code.NODE_GONE, Fault.PROVIDER)
    assert bob.sent == []
    world.assert_idle()


async def test_a_node_that_is_long_at_work_is_not_given_up_unpaid(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A node whose response has no output for minutes keeps its job by repeated ACCEPTs, up to the job's total time."""
    client, other = await world.started(ann, bob), await world.started(ann, bob)
    for _ in range(20):
        for job in (client.job.id, other.job.id):
            ann.accept(job)
        await quiet()
        await world.pass_time(100)
    ann.complete(client.job.id)
    await quiet()
    assert await world.stored(client) is State.COMPLETED
    assert (len(bob.sent), ann.got(Kind.CANCEL)) == (0, [])
    for _ in range(17):
        ann.accept(other.job.id)
        await quiet()
        await world.pass_time(100)
    assert ann.got(Kind.CANCEL) == [b"timed_out"]
    assert other.failure.code is Code.TIMED_OUT


async def test_a_node_that_falls_silent_in_the_middle(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A minute without a chunk ends a streaming job as expired."""
    client = await world.started(ann, bob)
    ann.chunk(client.job.id)
    await quiet()
    await world.pass_time(60.5)
    assert (client.kinds[-1], client.failure.code) == (Kind.FAIL, Code.TIMED_OUT)
    assert bob.sent == []
    assert await world.stored(client) is State.EXPIRED
    world.assert_idle()


async def test_a_deterministic_error_is_final(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """An error in the request is not tried elsewhere, and is the client's fault."""
    client = await world.started(ann, bob)
    ann.fail(client.job.id, Refusal(Code.BAD_MESSAGE, "the request has no head"))
    await quiet()
    assert (client.failure.code, client.failure.status, client.failure.retry) == (Code.BAD_MESSAGE, 400, False)
    assert bob.sent == []
    assert await world.stored(client) is State.FAILED
    assert world.market.reputation.score(ann.address) == UNKNOWN_PROVIDER.score
    world.assert_idle()


@pytest.mark.parametrize("code", [Code.UNSECURED, Code.UNAUTHORISED_TAB, Code.ORDER_EXPIRED, Code.BAD_SEAL])
async def test_a_refusal_by_one_node_moves_the_job(world: World, ann: FakeNode, bob: FakeNode, code: Code) -> None:
    """A node's refusal about its own tab, ask, key or clock moves the job to the next one and costs no reputation."""
    client = await world.started(ann, bob)
    ann.fail(client.job.id, Refusal(code, "not with me"))
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.MATCH]
    assert world.market.reputation.score(ann.address) == UNKNOWN_PROVIDER.score


async def test_the_last_failure_is_reported(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """When all candidates failed, the client gets the last reason and may retry."""
    client = await world.started(ann, bob)
    ann.fail(client.job.id)
    await quiet()
    last = Unavailable(Code.PROVIDER_FAILED, "out of memory", fault=Fault.PROVIDER)
    last.sealed_reason = "c2VhbGVk"
    bob.fail(client.job.id, last)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.MATCH, Kind.FAIL]
    assert client.failure.sealed_reason == "c2VhbGVk", "the node's own words reach its client as they are"
    assert (str(client.failure), client.failure.retry) == ("out of memory", True)
    assert await world.stored(client) is State.FAILED
    world.assert_idle()


async def test_a_job_that_times_out_everywhere_expires(world: World, ann: FakeNode) -> None:
    """A job that timed out at every candidate ends as expired, not as failed."""
    client = await world.started(ann)
    await world.pass_time(11)
    assert client.failure.code is Code.TIMED_OUT
    assert await world.stored(client) is State.EXPIRED
    world.assert_idle()


async def test_the_total_time_of_a_job_is_bounded() -> None:
    """When a job's total time is up, it ends once, and no other attempt begins."""
    world = World(limits=JobLimits(total=100))
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    ann.accept(client.job.id)
    await quiet()
    for _ in range(5):
        await world.pass_time(25)
    assert client.failure.code is Code.TIMED_OUT
    assert client.kinds.count(Kind.FAIL) == 1
    assert bob.sent == []
    assert await world.stored(client) is State.EXPIRED
    world.assert_idle()


async def test_the_total_time_ends_a_streaming_job(world: World, ann: FakeNode) -> None:
    """A node that streams without end is stopped after an hour, even if its frames wait."""
    client = await world.started(ann)
    for _ in range(3_601 // 50 + 1):
        ann.chunk(client.job.id)
        await world.pass_time(50)
    assert client.failure.code is Code.TIMED_OUT
    assert await world.stored(client) is State.EXPIRED
    world.assert_idle()


async def test_orders_that_expired_meanwhile_are_not_used(world: World, ann: FakeNode, bob: FakeNode) -> None:
    """A candidate whose order has expired is not tried: its node would have to refuse."""
    client = await world.started(ann, bob, deadline=START + 5)
    await world.pass_time(11)
    assert bob.sent == []
    assert client.failure.code is Code.TIMED_OUT
    world.assert_idle()


async def test_a_slow_client_is_not_held_against_the_node(world: World, ann: FakeNode) -> None:
    """While chunks wait for the client, the node does not count as silent."""
    client = await world.started(ann)
    ann.chunk(client.job.id)
    await quiet()
    client.reads.clear()
    for _ in range(10):
        ann.chunk(client.job.id)
    for _ in range(100):
        await world.pass_time(1)
    client.reads.set()
    await quiet()
    assert client.kinds.count(Kind.CHUNK) == 11
    assert Kind.FAIL not in client.kinds
    ann.complete(client.job.id)
    await quiet()
    assert await world.stored(client) is State.COMPLETED
    assert world.market.reputation.score(ann.address) > UNKNOWN_PROVIDER.score


async def test_a_lost_node_interrupts_a_full_inbox(world: World, ann: FakeNode) -> None:
    """The loss of a node ends a job even if its client stopped reading and the inbox is full."""
    client = await world.started(ann)
    client.reads.clear()
    ann.chunk(client.job.id)
    await quiet()
    for _ in range(INBOX_FRAMES):
        ann.chunk(client.job.id)
    ann.leave()
    client.reads.set()
    await quiet()
    assert (client.kinds[-1], client.failure.code) == (Kind.FAIL, Code.NODE_GONE)
    world.assert_idle()


@pytest.mark.parametrize("payload", [b"", b"not JSON", b"[]", b'{"error": 1}', b'{"oops": {}}', b"\xff"])
async def test_a_failure_without_a_reason(world: World, ann: FakeNode, payload: bytes) -> None:
    """A malformed FAIL is the node's fault, not the coordinator's or the client's."""
    client = await world.started(ann)
    ann.send(Kind.FAIL, client.job.id, payload)
    await quiet()
    assert (client.failure.code, client.failure.fault) == (Code.PROVIDER_FAILED, Fault.PROVIDER)
    assert world.market.reputation.score(ann.address) < UNKNOWN_PROVIDER.score
    world.assert_idle()


async def test_hostile_failures_are_carried_safely(world: World, ann: FakeNode) -> None:
    """A job ends and is stored with any reason that its node writes."""
    client = await world.started(ann)
    error = {"message": "\x00\x1b[2J" + "x" * 5_000, "code": ["bad"], "fault": {}, "retry": False}
    ann.send(Kind.FAIL, client.job.id, dumps({"error": error}))
    await quiet()
    assert len(str(client.failure)) == 2_000
    assert await world.stored(client) is State.FAILED
    world.assert_idle()


@pytest.mark.parametrize(
    ("error", "counts_as_bad"),
    [
        (Unavailable(Code.PROVIDER_FAILED, "broken", fault=Fault.PROVIDER), True),
        (Unavailable(Code.NODE_BUSY, "full", fault=Fault.PROVIDER), False),
        (Unavailable(Code.ENGINE_UNAVAILABLE, "away", fault=Fault.ENGINE), True),
        (Refusal(Code.UNSECURED, "not enough"), False),
    ],
)
async def test_which_failures_lower_the_score(world: World, ann: FakeNode, error: TallyError, counts_as_bad: bool) -> None:
    """Only a fault of the provider or its engine lowers the score; being busy or refusing an order does not."""
    client = await world.started(ann)
    ann.fail(client.job.id, error)
    await quiet()
    assert (world.market.reputation.score(ann.address) < UNKNOWN_PROVIDER.score) is counts_as_bad


async def test_a_bad_reputation_costs_the_next_job(world: World, ann: FakeNode) -> None:
    """A provider that failed comes after an equally cheap one that did not."""
    cat = world.node("cat", output_price=2_000_001)
    first = await world.started(ann, cat)
    assert first.job.provider == ann.address
    ann.leave()
    ann.connect()
    await quiet()
    second = await world.started(ann, cat)
    assert second.job.provider == cat.address
