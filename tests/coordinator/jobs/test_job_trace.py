"""The spans of jobs at the coordinator: each attempt, waits, refusals, and what nodes get."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.jobs.job_trace import JobTrace, recorded_job
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import Client, FakeNode, World, quiet
from tests.tracing.recorder import Recorder, attributes, events, is_child, trace_id

CALLER = TraceContext(b"\xaa" * 16, b"\xbb" * 8)


async def _placed(world: World, recorder: Recorder, *nodes: FakeNode, trace: TraceContext | None = None) -> Client:
    submission = replace(world.submission(*nodes, job=JobId(bytes(range(16)))), trace=trace)
    client = world.read(await world.market.place_order(submission, JobTrace.begin(recorder.tracer, submission)))
    await quiet()
    return client


async def test_a_job_has_a_trace_of_its_own_whose_id_is_the_jobs() -> None:
    """With spans for its match, its attempt and the write of its receipt; the node gets the context of its attempt."""
    world, recorder = World(), Recorder()
    node = world.node("ann")
    world.market.node_connected(node.address, trace=True, resume=False)
    client = await _placed(world, recorder, node)
    job = client.job.id
    (context,) = node.got(Kind.TRACE, job)
    node.accept(job)
    node.complete(job)
    await quiet()
    root, match, attempt = recorder.only("job"), recorder.only("match"), recorder.only("attempt")
    assert trace_id(root) == job
    assert root.parent is None
    assert all(is_child(span, root) for span in (match, attempt, recorder.only("commit receipt")))
    assert attempt.context is not None
    assert TraceContext.unpack(context) == TraceContext(job, attempt.context.span_id.to_bytes(8, "big"))
    assert events(attempt) == ["first output"]
    assert attributes(attempt) == {
        "tallystick.provider": node.address,
        "tallystick.attempt": 0,
        "tallystick.hedged": False,
        "tallystick.outcome": "completed",
    }
    assert attributes(root)["tallystick.job.id"] == job.hex()
    assert attributes(root)["tallystick.outcome"] == "completed"


async def test_a_job_that_carries_a_context_continues_its_clients_trace() -> None:
    """And so does its node."""
    world, recorder = World(), Recorder()
    node = world.node("ann")
    world.market.node_connected(node.address, trace=True, resume=False)
    client = await _placed(world, recorder, node, trace=CALLER)
    (context,) = node.got(Kind.TRACE, client.job.id)
    node.complete(client.job.id)
    await quiet()
    root = recorder.only("job")
    assert root.parent is not None
    assert (trace_id(root), root.parent.span_id) == (CALLER.trace_id, int.from_bytes(CALLER.span_id, "big"))
    read = TraceContext.unpack(context)
    assert read is not None
    assert read.trace_id == CALLER.trace_id
    assert read.span_id != CALLER.span_id


@pytest.mark.parametrize("trace", [None, CALLER])
async def test_a_coordinator_that_records_nothing_passes_the_context_on(trace: TraceContext | None) -> None:
    """As it came, and nothing if nothing came. A node that did not ask for it gets nothing in any case."""
    world = World()
    new, old = world.node("ann"), world.node("bob")
    world.market.node_connected(new.address, trace=True, resume=False)
    for node in (new, old):
        client = world.read(await world.market.place_order(replace(world.submission(node), trace=trace)))
        await quiet()
        got = node.got(Kind.TRACE, client.job.id)
        assert got == ([trace.pack()] if trace is not None and node is new else [])
        node.complete(client.job.id)
        await quiet()
    new.leave()
    new.connect()
    client = world.read(await world.market.place_order(replace(world.submission(new), trace=trace)))
    await quiet()
    assert new.got(Kind.TRACE, client.job.id) == [], "another connection has to ask for itself"
    new.complete(client.job.id)


async def test_a_failed_attempt_and_its_successor_have_a_span_each() -> None:
    """With the wait for the second match between them."""
    world, recorder = World(), Recorder()
    ann, bob = world.node("ann"), world.node("bob")
    client = await _placed(world, recorder, ann, bob)
    first, second = (ann, bob) if ann.got(Kind.DISPATCH) else (bob, ann)
    first.fail(client.job.id)
    await quiet()
    second.complete(client.job.id)
    await quiet()
    attempts = recorder.all("attempt")
    assert [attributes(span)["tallystick.outcome"] for span in attempts] == ["failed", "completed"]
    assert [attributes(span).get("error.type") for span in attempts] == ["failed", None]
    assert len(recorder.all("match")) == 2
    assert attributes(recorder.only("job"))["tallystick.attempts"] == 2
    assert "error.type" not in attributes(recorder.only("job"))


async def test_a_job_that_waits_for_a_slot_says_so() -> None:
    """As an event of its match, whose span lasts until a node has it."""
    world, recorder = World(), Recorder()
    node = world.node("ann", slots=1)
    busy = await world.started(node)
    client = await _placed(world, recorder, node)
    node.complete(busy.job.id)
    await quiet()
    node.complete(client.job.id)
    await quiet()
    assert events(recorder.only("match")) == ["waits for a free slot"]
    assert len(recorder.all("attempt")) == 1


async def test_a_job_without_a_provider_fails_with_its_code() -> None:
    """Whose text is not recorded."""
    world, recorder = World(limits=JobLimits(max_wait=0)), Recorder()
    node = world.node("ann")
    client = await _placed(world, recorder, node)
    node.fail(client.job.id)
    await quiet()
    root = recorder.only("job")
    assert attributes(root)["tallystick.outcome"] == "failed"
    assert attributes(root)["error.type"] == client.failure.code.value


def test_a_job_that_is_not_admitted_is_recorded_as_refused() -> None:
    """With the code of the refusal, which passes on; its spans end."""
    world, recorder = World(), Recorder()
    submission = world.submission(world.node("ann"), job=JobId(bytes(range(16))))
    with pytest.raises(Refusal), recorded_job(recorder.tracer, submission) as trace:
        raise Refusal(Code.INSUFFICIENT_FUNDS, "a text with s3cret")
    assert trace.trace_id == submission.job.hex()
    root = recorder.only("job")
    assert attributes(root)["error.type"] == Code.INSUFFICIENT_FUNDS.value
    assert attributes(root)["tallystick.outcome"] == "refused"
    assert "s3cret" not in root.to_json()
    assert sorted(recorder.names()) == ["job", "match"]


def test_an_unsampled_context_is_not_recorded_and_passed_on_as_unsampled() -> None:
    """What a caller asks not to record, nobody does."""
    recorder = Recorder()
    world = World()
    submission = replace(world.submission(world.node("ann")), trace=CALLER._replace(sampled=False))
    with recorded_job(recorder.tracer, submission) as trace:
        assert not trace.span.context.sampled
    assert recorder.spans == []
