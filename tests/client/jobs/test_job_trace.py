"""The spans of jobs at their client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.trace_context import TraceContext
from tallystick.tracing.settings import ClientTracing
from tallystick.tracing.spans import trace_of_job
from tests.client.fake_coordinator import BODY, CHAT, MESSAGES, STREAM, WORDS, FakeMarket, Session, honest
from tests.client.parties import MODEL
from tests.tracing.recorder import Recorder, attributes, events, is_child, trace_id

_APPLICATION = """
import asyncio, sys
from pathlib import Path
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tallystick.client.config import ClientConfig
from tallystick.client.sdk.sync import SyncMarket
from tests.client.parties import MODEL, signer

exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
config = ClientConfig(ledger_file=Path(sys.argv[2]), request_seconds=60)
with SyncMarket(sys.argv[1], signer("payer"), config) as market:
    with trace.get_tracer("app").start_as_current_span("the application's own"):
        market.chat(MODEL, [{"role": "user", "content": "hello"}], max_tokens=50)
spans = {span.name: span for span in exporter.get_finished_spans()}
job, own = spans[f"chat {MODEL}"], spans["the application's own"]
assert job.parent.span_id == own.context.span_id and job.context.trace_id == own.context.trace_id
print(sorted(spans))
"""


async def _run(market: Market, body: dict[str, Any] = BODY) -> None:
    async with await market.submit(CHAT, body) as job:
        async for _ in job:
            pass


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_job_has_the_spans_of_its_steps(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, body: dict[str, Any]
) -> None:
    """By the conventions for generative AI, with what it cost, whole or streamed."""
    recorder = Recorder()
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:
        await _run(market, body)
    job = recorder.only("chat")
    steps = ["select providers", "submit", "wait for match", "attempt", "check receipt"]
    assert recorder.names() == [*steps, f"chat {MODEL}"]
    assert all(is_child(recorder.only(step), job) for step in steps)
    said = attributes(job)
    assert said["gen_ai.operation.name"] == "chat"
    assert said["gen_ai.provider.name"] == "tallystick"
    assert said["gen_ai.request.model"] == said["gen_ai.response.model"] == MODEL
    assert said["gen_ai.request.stream"] is bool(body.get("stream"))
    assert (said["gen_ai.usage.input_tokens"], said["gen_ai.usage.output_tokens"]) == (10, 5)
    assert (said["tallystick.cost"], said["tallystick.outcome"], said["tallystick.receipt"]) == (3, "completed", "accepted")
    assert said["tallystick.provider"] == fake.providers[0].address
    assert said["tallystick.job.id"] == fake.last.job.hex()
    assert said["tallystick.attempts"] == 1
    assert said["server.address"] == "127.0.0.1"
    first = said["gen_ai.response.time_to_first_chunk"]
    assert isinstance(first, float)
    assert first > 0
    assert events(job) == ["first output"]
    assert "error.type" not in said


async def test_no_trace_id_and_no_content_leaves_by_default(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The coordinator and the provider get no context. The span links to the trace in which they record the job."""
    recorder = Recorder()
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:
        await _run(market)
    assert fake.last.submission.trace is None
    job = recorder.only("chat")
    (link,) = job.links
    expected = trace_of_job(fake.last.job)
    assert link.context.trace_id.to_bytes(16, "big") == expected.trace_id
    assert link.context.span_id.to_bytes(8, "big") == expected.span_id
    everything = "".join(span.to_json() for span in recorder.spans)
    assert MESSAGES[0]["content"] not in everything
    assert WORDS[0] not in everything


async def test_a_user_may_share_the_trace(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Then the job carries the context of its span, and nothing else of the trace."""
    recorder = Recorder()
    config = replace(config, tracing=ClientTracing(share_trace_ids=True))
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:
        caller = ["00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"]
        with recorder.tracer.serve("request", caller, ["vendor=s3cret"], {}):
            await _run(market)
        with recorder.tracer.serve("unsampled", [caller[0][:-1] + "0"], [], {}):
            await _run(market)
    first, second = (session.submission for session in fake.sessions.values())
    job = recorder.only("chat").context
    assert job is not None
    assert first.trace == TraceContext(b"\xab" * 16, job.span_id.to_bytes(8, "big"))
    assert b"s3cret" not in first.dumps()
    assert second.trace is not None
    assert second.trace.trace_id == b"\xab" * 16
    assert not second.trace.sampled


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_user_may_capture_content(fake: FakeMarket, wallet: Signer, config: ClientConfig, body: dict[str, Any]) -> None:
    """As messages of the conventions. The job has no proof because of it."""
    recorder = Recorder()
    config = replace(config, tracing=ClientTracing(capture_content=True))
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:
        job = await market.submit(CHAT, body)
        async with job:
            async for _ in job:
                pass
        assert job.proof is None
    said = attributes(recorder.only("chat"))
    asked = json.loads(str(said["gen_ai.input.messages"]))
    assert asked == [{"role": "user", "parts": [{"type": "text", "content": MESSAGES[0]["content"]}]}]
    answered = json.loads(str(said["gen_ai.output.messages"]))
    assert answered == [{"role": "assistant", "parts": [{"type": "text", "content": "".join(WORDS)}]}]


async def test_a_failed_over_job_has_a_span_for_each_attempt(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Those of the providers that failed end with their receipts at no cost."""

    async def second(session: Session) -> None:
        await session.match(0)
        await session.void()
        await honest_from(session, 1)

    async def honest_from(session: Session, index: int) -> None:
        match = session.match

        async def matched(_index: int = 0, **changes: Any) -> None:
            await match(index, **changes)

        session.match = matched  # type: ignore[method-assign, assignment]
        await honest(session)

    fake.script = second
    recorder = Recorder()
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:
        await _run(market)
    attempts = recorder.all("attempt")
    assert [attributes(span)["tallystick.provider"] for span in attempts] == [
        fake.providers[0].address,
        fake.providers[1].address,
    ]
    assert attributes(attempts[0])["tallystick.outcome"] == "void"
    assert len(recorder.all("wait for match")) == 2
    assert attributes(recorder.only("chat"))["tallystick.attempts"] == 2


async def test_a_failed_job_says_why_by_its_code(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Not by its text."""

    async def fails(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.PROVIDER_FAILED, "a text with s3cret", fault=Fault.PROVIDER))

    fake.script = fails
    recorder = Recorder()
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:
        with pytest.raises(TallyError):
            await _run(market)
    assert attributes(recorder.only("chat"))["error.type"] == Code.PROVIDER_FAILED.value
    assert not any("s3cret" in span.to_json() for span in recorder.spans)


async def test_a_refused_job_ends_its_span(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Also one that found no provider."""
    recorder = Recorder()
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:
        with pytest.raises(TallyError) as refused:
            await _run(market, BODY | {"model": "no such model"})
    job = recorder.only("chat")
    assert attributes(job)["error.type"] == refused.value.code.value
    assert recorder.names() == ["select providers", "chat no such model"]


async def test_parallel_jobs_keep_to_their_traces(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Each job is a child of what was current where it was submitted."""
    recorder = Recorder()
    async with Market(fake.url, wallet, config, tracer=recorder.tracer) as market:

        async def ask(number: int) -> None:
            with recorder.tracer.serve(f"request {number}", [f"00-{number + 1:032x}-{'cd' * 8}-01"], [], {}):
                await _run(market)

        await asyncio.gather(*map(ask, range(8)))
    traces: dict[bytes, list[str]] = {}
    for span in recorder.spans:
        traces.setdefault(trace_id(span), []).append(span.name)
    steps = {"select providers", "submit", "wait for match", "attempt", "check receipt", f"chat {MODEL}"}
    assert {key: set(names) for key, names in traces.items()} == {
        (number + 1).to_bytes(16, "big"): steps | {f"request {number}"} for number in range(8)
    }


async def test_an_application_with_opentelemetry_gets_the_spans(fake: FakeMarket, tmp_path: Any) -> None:
    """Below its current span, also through the synchronous SDK, whose loop runs in another thread. No setting is needed."""
    command = (sys.executable, "-c", _APPLICATION, fake.url, str(tmp_path / "client.db"))
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert f"chat {MODEL}" in out.decode()
