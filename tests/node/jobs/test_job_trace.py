"""The spans of jobs at a node: what it did, whose trace it continues, and what engines get."""

from __future__ import annotations

import asyncio

import pytest

from node.jobs.job_trace import JobTraces, JobTracing
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import ScriptedEngine
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.types import JobId
from tallystick.protocol.usage_reports import ReportedUsage
from tests.node.harness import CHAT, RunnerHarness
from tests.tracing.recorder import Recorder, attributes, events, is_child, trace_id

HEAD = ResponseStart(200, "text/event-stream")
ONE = ResponsePart(b"one.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))
DOWN = Unavailable(Code.ENGINE_UNAVAILABLE, "the engine is down, s3cret", fault=Fault.ENGINE)
PARENT = TraceContext(b"\xaa" * 16, b"\xbb" * 8)


def _harness(recorder: Recorder, engine: ScriptedEngine, *, engine_header: bool = False) -> RunnerHarness:
    harness = RunnerHarness(engine)
    harness.runner.traces = JobTraces(JobTracing(recorder.tracer, engine_header, lambda _engine: "http://10.0.0.7:8000/v1"))
    return harness


async def _ended(harness: RunnerHarness) -> None:
    await harness.ended()
    while harness.runner._tasks:
        await asyncio.wait(harness.runner._tasks)
        await asyncio.sleep(0)  # for what takes them off


async def test_a_job_has_spans_for_its_steps() -> None:
    """In the trace of the job, with what was billed and no content."""
    recorder = Recorder()
    harness = _harness(recorder, ScriptedEngine(HEAD, ONE, END))
    placed = harness.dispatch({"model": "model", "messages": [{"role": "user", "content": "s3cret"}], "stream": True})
    receipt = await harness.receipt(placed)
    await _ended(harness)
    root, engine = recorder.only("serve job"), recorder.only("engine request")
    assert trace_id(root) == placed.job
    assert root.parent is None
    steps = ["admission", "wait for slot", "engine request", "receipt"]
    assert recorder.names() == [*steps, "serve job"]
    assert all(is_child(recorder.only(step), root) for step in steps)
    assert events(engine) == ["first output"]
    assert (attributes(engine)["server.address"], attributes(engine)["server.port"]) == ("10.0.0.7", 8_000)
    assert attributes(root)["gen_ai.request.model"] == "model"
    assert attributes(root)["gen_ai.usage.input_tokens"] == receipt.input_tokens == 20
    assert attributes(root)["gen_ai.usage.cache_read.input_tokens"] == receipt.cached_input_tokens
    assert attributes(root)["gen_ai.usage.output_tokens"] == receipt.output_tokens
    assert attributes(root)["tallystick.cost"] == receipt.cost
    assert attributes(root)["tallystick.outcome"] == "completed"
    assert not any("s3cret" in span.to_json() or "one." in span.to_json() for span in recorder.spans)
    assert harness.observer.reports[-1].trace_id == placed.job.hex()


async def test_the_context_that_was_announced_is_continued_once() -> None:
    """That of another job, or one that is not valid, is ignored. It is never kept for a later job."""
    recorder = Recorder()
    harness = _harness(recorder, ScriptedEngine(HEAD, ONE, END))
    placed = harness.client.order(harness.asks.current[0])
    other = harness.client.order(harness.asks.current[0])
    third = harness.client.order(harness.asks.current[0])
    runner, link = harness.runner, harness.link
    runner.traces.announce(link, other.job, PARENT._replace(trace_id=b"\xcc" * 16).pack())
    runner.traces.announce(link, placed.job, PARENT.pack())
    harness.dispatch_again(placed)
    harness.dispatch_again(other)
    runner.traces.announce(link, third.job, PARENT.pack())
    runner.traces.announce(link, third.job, b"not a context")
    harness.dispatch_again(third)
    await _ended(harness)
    roots = {trace_id(span): span for span in recorder.all("serve job")}
    assert roots.keys() == {PARENT.trace_id, other.job, third.job}
    parent = roots[PARENT.trace_id].parent
    assert parent is not None
    assert parent.span_id == int.from_bytes(PARENT.span_id, "big")


async def test_a_context_of_another_link_is_not_taken() -> None:
    """One coordinator cannot name the parent of another's job."""
    recorder = Recorder()
    harness = _harness(recorder, ScriptedEngine(HEAD, ONE, END))
    placed = harness.client.order(harness.asks.current[0])
    harness.runner.traces.announce(harness.connect(), placed.job, PARENT.pack())
    harness.dispatch_again(placed)
    await _ended(harness)
    assert trace_id(recorder.only("serve job")) == placed.job


async def test_a_node_that_records_nothing_ignores_contexts() -> None:
    """A coordinator that sends one all the same is no error."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    assert not harness.runner.traces.enabled
    harness.runner.traces.announce(harness.link, JobId(bytes(16)), PARENT.pack())
    harness.dispatch()
    await _ended(harness)
    assert harness.observer.reports[-1].trace_id == ""


@pytest.mark.parametrize("engine_header", [False, True])
async def test_engines_get_the_header_if_the_operator_wants_it(engine_header: bool) -> None:
    """With the span of the request to them as the parent."""
    recorder, engine = Recorder(), ScriptedEngine(HEAD, ONE, END)
    harness = _harness(recorder, engine, engine_header=engine_header)
    placed = harness.dispatch()
    await _ended(harness)
    span = recorder.only("engine request").context
    assert span is not None
    expected = f"00-{placed.job.hex()}-{span.span_id:016x}-01" if engine_header else ""
    assert engine.requests[0].traceparent == expected


async def test_a_failed_engine_marks_its_span_and_the_job() -> None:
    """By the outcome alone."""
    recorder = Recorder()
    harness = _harness(recorder, ScriptedEngine(DOWN))
    harness.dispatch()
    await _ended(harness)
    assert attributes(recorder.only("engine request"))["error.type"] == "provider_error"
    assert attributes(recorder.only("serve job"))["error.type"] == "provider_error"
    assert not any("s3cret" in span.to_json() for span in recorder.spans)


async def test_a_refused_job_says_why_by_its_code() -> None:
    """It has no span of an engine."""
    recorder = Recorder()
    harness = _harness(recorder, ScriptedEngine(HEAD, ONE, END))
    placed = harness.dispatch()
    harness.dispatch_again(placed)
    await _ended(harness)
    refused = [span for span in recorder.all("serve job") if attributes(span).get("tallystick.outcome") == "refused"]
    assert [attributes(span)["error.type"] for span in refused] == [Code.ORDER_REPLAYED.value]
    assert len(recorder.all("engine request")) == 1
    assert CHAT.path not in recorder.names()
