from __future__ import annotations

import asyncio
import secrets

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.trace_context import TraceContext
from tallystick.tracing.otlp import make_sampler
from tallystick.tracing.spans import Role, trace_of_job
from tests.tracing.recorder import Recorder, attributes, events, is_child, trace_id

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
JOB = bytes.fromhex("01a2283974167fe4b057f05666ae39fd")


def test_a_callers_trace_is_continued() -> None:
    """With its tracestate, and its span as the parent. Spans within are its children."""
    recorder = Recorder()
    with recorder.tracer.serve("request", [PARENT], ["vendor=1", "other=2"], {"a": 1}):
        recorder.tracer.start("inner", Role.CLIENT).end()
    request, inner = recorder.only("request"), recorder.only("inner")
    assert trace_id(request).hex() == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == SPAN
    assert request.context is not None
    assert dict(request.context.trace_state) == {"vendor": "1", "other": "2"}
    assert is_child(inner, request)
    assert (request.kind, inner.kind) == (trace.SpanKind.SERVER, trace.SpanKind.CLIENT)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [PARENT, PARENT],
        [PARENT, f"00-{'b' * 32}-{SPAN}-01"],
        [PARENT + "-00"],
        [PARENT + "x" * 10_000],
        ["ff" + PARENT[2:]],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[:-1]}-{SPAN}-01"],
        [f"00-{TRACE}0-{SPAN}-01"],
        [f"00-{'x' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE}-{SPAN}"],
        [PARENT.replace("-", "_")],
        [PARENT + ", " + PARENT],
        ["\x00" * 55],
        ["\u0660\u0660" + PARENT[2:]],
        [PARENT.upper().replace("00-", "0O-", 1)],
    ],
)
def test_headers_that_are_not_valid_begin_a_new_trace(headers: list[str]) -> None:
    """It is never an error (W3C Trace Context, section 4.3)."""
    recorder = Recorder()
    with recorder.tracer.serve("request", headers, ["vendor=1"], {}):
        pass
    request = recorder.only("request")
    assert request.parent is None
    assert trace_id(request).hex() not in {TRACE, "0" * 32}


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    """A header of version 01 may be longer (section 3.2.2.2)."""
    recorder = Recorder()
    with recorder.tracer.serve("request", [f"01-{TRACE}-{SPAN}-01-what-comes"], [], {}):
        pass
    assert trace_id(recorder.only("request")).hex() == TRACE


@pytest.mark.parametrize("states", [["x" * 513], ["a=1," * 200], ["=,=,\x00"], ["a=1", "a=" + "y" * 600], [" ", ""], ["a==b,,c"]])
def test_a_tracestate_that_is_not_valid_leaves_the_trace_as_it_is(states: list[str]) -> None:
    """The trace is continued without it, or with the members that are valid."""
    recorder = Recorder()
    with recorder.tracer.serve("request", [PARENT], states, {}):
        pass
    request = recorder.only("request")
    assert trace_id(request).hex() == TRACE
    assert request.context is not None
    assert sum(len(f"{key}={value},") for key, value in request.context.trace_state.items()) <= 513


def test_what_a_caller_does_not_record_is_not_recorded() -> None:
    """The sampled flag holds for all spans within, and for what goes on."""
    recorder = Recorder(make_sampler(1.0, trusts_parent=True))
    with recorder.tracer.serve("request", [PARENT[:-1] + "0"], [], {}) as span:
        inner = recorder.tracer.start("inner")
        assert not inner.context.sampled
        assert inner.context.trace_id.hex() == TRACE
        inner.set("a", 1)
        inner.event("b")
        inner.fail("c")
        inner.end()
        span.end()
    assert recorder.spans == []


def test_strangers_cannot_make_a_service_record_all() -> None:
    """At a coordinator or a node, what a peer records is recorded within the share; what it does not record is not."""
    never, always = make_sampler(0.0, trusts_parent=False), make_sampler(1.0, trusts_parent=False)
    sampled, unsampled = TraceContext(b"\1" * 16, b"\2" * 8), TraceContext(b"\1" * 16, b"\2" * 8, sampled=False)
    for sampler, parent, recorded in (
        (never, sampled, 0),
        (always, sampled, 1),
        (always, unsampled, 0),
        (never, None, 0),
        (always, None, 1),
    ):
        recorder = Recorder(sampler)
        recorder.tracer.start_of_job("job", JOB, parent, {}, first=True).end()
        assert len(recorder.spans) == recorded
    own = Recorder(make_sampler(0.0, trusts_parent=True))
    own.tracer.start("job", parent=sampled).end()
    assert len(own.spans) == 1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["low half small", "high half small", "all small", "the same again"])
def test_no_choice_of_ids_makes_a_service_record_more(kind: str, shared: bool) -> None:
    """Callers choose the ids of jobs and of traces that they share. About 2 of 2,000 are recorded at a ratio of 0.001."""
    recorder, known = Recorder(make_sampler(0.001, trusts_parent=False)), secrets.token_bytes(16)
    for number in range(1, 2_001):
        small, any_half = number.to_bytes(8, "big"), secrets.token_bytes(8)
        chosen = {
            "low half small": any_half + small,
            "high half small": small + any_half,
            "all small": bytes(8) + small,
            "the same again": known,
        }[kind]
        parent = TraceContext(chosen, known[:8]) if shared else None
        recorder.tracer.start_of_job("job", chosen, parent, {}, first=True).end()
    assert len(recorder.spans) < 60


def test_the_share_of_strangers_jobs_is_the_ratio() -> None:
    """Ids that are equal are no reason to record all of them or none, and a trace that goes on keeps its tracestate."""
    recorder = Recorder(make_sampler(0.5, trusts_parent=False))
    for _ in range(1_000):
        recorder.tracer.start_of_job("job", JOB, TraceContext(JOB, JOB[8:]), {"a": 1}, first=True).end()
    assert 300 < len(recorder.spans) < 700
    assert attributes(recorder.spans[0]) == {"a": 1}
    always = Recorder(make_sampler(1.0, trusts_parent=False))
    with always.tracer.serve("request", [PARENT], ["vendor=1"], {}):
        always.tracer.start("inner").end()
    request = always.only("request")
    assert request.context is not None
    assert dict(request.context.trace_state) == {"vendor": "1"}
    assert is_child(always.only("inner"), request)


def test_the_spans_of_a_job_have_its_own_trace_unless_it_carries_one() -> None:
    """The trace's id is the job's, which all sides know. Only the first side's span has the root's id. Others are random."""
    recorder, elsewhere = Recorder(), Recorder()
    recorder.tracer.start_of_job("job", JOB, None, {}, first=True).end()
    elsewhere.tracer.start_of_job("job", JOB, None, {}, first=False).end()
    first, other = recorder.only("job"), elsewhere.only("job")
    assert trace_id(first) == trace_id(other) == JOB
    assert first.context is not None
    assert other.context is not None
    assert first.context.span_id.to_bytes(8, "big") == trace_of_job(JOB).span_id != other.context.span_id.to_bytes(8, "big")
    assert first.parent is None
    recorder.tracer.start("later").end()
    assert trace_id(recorder.only("later")) != JOB
    recorder.tracer.start_of_job("carried", JOB, TraceContext(b"\1" * 16, b"\2" * 8), {}, first=True).end()
    assert trace_id(recorder.only("carried")) == b"\1" * 16


@pytest.mark.parametrize("job", [bytes(16), b"\1" * 8 + bytes(8)])
def test_a_job_whose_id_is_no_id_of_a_trace_gets_a_new_trace(job: bytes) -> None:
    """Ids of zeros are not valid; a client may choose any id for its job."""
    recorder = Recorder()
    recorder.tracer.start_of_job("job", job, None, {}, first=True).end()
    span = recorder.only("job")
    assert span.context is not None
    assert span.context.is_valid
    assert trace_id(span) != job


def test_an_unsampled_job_does_not_lend_its_id_to_the_next_trace() -> None:
    """Ids are for one span, also if it was not recorded."""
    recorder = Recorder(ParentBased(TraceIdRatioBased(0.0)))
    recorder.tracer.start_of_job("job", JOB, None, {}, first=True)
    assert recorder.tracer.start("other").context.trace_id != JOB


async def test_parallel_requests_do_not_mix() -> None:
    """Each task has its own current span, through waits in any order."""
    recorder, count = Recorder(), 20
    began, go = [asyncio.Event() for _ in range(count)], asyncio.Event()

    async def serve(number: int) -> None:
        with recorder.tracer.serve(f"request {number}", [f"00-{number + 1:032x}-{SPAN}-01"], [], {}):
            began[number].set()
            await go.wait()
            await asyncio.sleep(0)
            recorder.tracer.start(f"inner {number}").end()

    tasks = [asyncio.create_task(serve(number)) for number in range(count)]
    for event in began:
        await event.wait()
    go.set()
    await asyncio.gather(*tasks)
    for number in range(count):
        (inner,) = (span for span in recorder.spans if span.name == f"inner {number}")
        (request,) = (span for span in recorder.spans if span.name == f"request {number}")
        assert is_child(inner, request)
        assert trace_id(inner) == (number + 1).to_bytes(16, "big")


def test_an_error_is_recorded_by_its_code_alone() -> None:
    """Its text may quote others. The error passes on."""
    recorder = Recorder()
    with pytest.raises(Refusal), recorder.tracer.serve("request", [], [], {}):
        raise Refusal(Code.UNKNOWN_MODEL, "a text with s3cret")
    request = recorder.only("request")
    assert attributes(request)["error.type"] == Code.UNKNOWN_MODEL.value
    assert request.status.status_code is trace.StatusCode.ERROR
    assert "s3cret" not in request.to_json()


def test_a_span_takes_nothing_after_its_end() -> None:
    """And ends once."""
    recorder = Recorder()
    span = recorder.tracer.start("span")
    span.end()
    span.set("a", 1)
    span.event("b")
    span.link(TraceContext(b"\1" * 16, b"\2" * 8))
    span.end()
    ended = recorder.only("span")
    assert (attributes(ended), events(ended), list(ended.links)) == ({}, [], [])


def test_baggage_is_not_read() -> None:
    """Whatever a caller's trace carries beside its ids stays with the caller."""
    recorder = Recorder()
    with recorder.tracer.serve("request", [PARENT], [], {}):
        from opentelemetry import baggage

        assert not baggage.get_all()
