from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, STREAM, FakeMarket, Session
from tests.client.parties import MODEL
from tests.tracing.recorder import Recorder, attributes, is_child, trace_id

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@asynccontextmanager
async def _gateway(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, recorder: Recorder
) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        Market(fake.url, wallet, config, tracer=recorder.tracer) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http,
    ):
        yield http


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_callers_trace_is_continued_to_the_job(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, body: dict[str, object]
) -> None:
    """Whole or streamed; the log line of the request has the trace's id. Nothing of it goes on by default."""
    recorder = Recorder()
    headers = {"traceparent": PARENT, "tracestate": "vendor=s3cret", "baggage": "user=s3cret"}
    with structlog.testing.capture_logs() as logged:
        async with _gateway(fake, wallet, config, recorder) as http:
            answer = await http.post(CHAT, json=body, headers=headers)
    assert answer.status_code == 200
    request, job = recorder.only("POST"), recorder.only("chat")
    assert trace_id(request).hex() == TRACE
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert is_child(job, request)
    assert attributes(request)["http.response.status_code"] == 200
    assert attributes(request)["http.request.method"] == "POST"
    assert [entry["trace_id"] for entry in logged if entry["event"] == "request"] == [TRACE]
    assert fake.last.submission.trace is None
    assert b"s3cret" not in fake.last.submission.dumps() + fake.last.body


@pytest.mark.parametrize("parents", [[PARENT, PARENT], ["x" * 9_000], [f"00-{'0' * 32}-{'0' * 16}-00"], ["\xff"]])
async def test_odd_headers_are_no_error(fake: FakeMarket, wallet: Signer, config: ClientConfig, parents: list[str]) -> None:
    """The answer is as good, in a new trace."""
    recorder = Recorder()
    async with _gateway(fake, wallet, config, recorder) as http:
        headers = [(b"traceparent", parent.encode("latin-1")) for parent in parents]
        answer = await http.post(CHAT, json=BODY, headers=headers)
    assert answer.status_code == 200
    request = recorder.only("POST")
    assert request.parent is None
    assert trace_id(request).hex() != TRACE


async def test_a_refused_request_has_its_code(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Whether the gateway refuses it or its job fails, and if its body cannot be read."""

    async def fails(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.PROVIDER_FAILED, "s3cret", fault=Fault.PROVIDER))

    recorder = Recorder()
    async with _gateway(fake, wallet, config, recorder) as http:
        await http.post(CHAT, json=BODY | {"model": "none"})
        await http.post(CHAT, content=b"not JSON")
        fake.script = fails
        await http.post(CHAT, json=BODY)
    requests = recorder.all("POST")
    assert [attributes(span)["error.type"] for span in requests][1:] == [Code.BAD_MESSAGE.value, Code.PROVIDER_FAILED.value]
    assert all(attributes(span)["http.response.status_code"] >= 400 for span in requests)  # type: ignore[operator]
    assert not any("s3cret" in span.to_json() for span in recorder.spans)


async def test_routes_by_asgi_are_recorded_too(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Such as those for which providers have no usual route."""
    recorder = Recorder()
    async with _gateway(fake, wallet, config, recorder) as http:
        answer = await http.post(
            "/v1/rerank", json={"model": MODEL, "query": "x", "documents": []}, headers={"traceparent": PARENT}
        )
    request = recorder.only("POST")
    assert trace_id(request).hex() == TRACE
    assert attributes(request)["http.response.status_code"] == answer.status_code
