from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import openai
import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.auth import check_public_access
from tallystick.client.ledger.schema import JobState
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import (
    BODY,
    CHAT,
    EVENTS,
    STREAM,
    WORDS,
    FakeMarket,
    Session,
    completion,
    event,
    eventually,
    until_cancelled,
)
from tests.client.parties import MODEL

TEXT = "".join(WORDS)


@pytest.fixture
async def url(market: Market) -> AsyncIterator[str]:
    """A gateway over the market's client."""
    async with serving(build_app(market), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[str]:
    """A gateway with these settings."""
    async with Market(fake.url, wallet, config) as market, serving(build_app(market), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        yield client


async def test_errors_for_a_browser(http: httpx.AsyncClient, fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A refused navigation is a page with links to what there is, and OpenAI's error for programs; also without the API key."""
    html = {"accept": "text/html,*/*;q=0.8"}
    for path in ("/v1/chat/completions", "/nothing", "/v1/models/never", "/tally/jobs/00"):
        answer, plain = await http.get(path, headers=html), await http.get(path)
        assert answer.status_code == plain.status_code >= 400
        assert 'href="/tally/spending"' in answer.text
        assert plain.json()["error"]["message"]
    async with (
        gateway(fake, wallet, replace(config, api_key="a key of some length")) as url,
        httpx.AsyncClient(base_url=url) as closed,
    ):
        answer = await closed.get("/v1/models", headers=html)
        assert (answer.status_code, "Log in first" in answer.text) == (401, True)
        assert (await closed.get("/v1/models")).json()["error"]["code"] == "unauthenticated"


async def test_stream_that_fails_before_output_is_an_http_error(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """A streamed request that fails before its first byte gets an error status, not an empty stream."""

    async def fails(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.NODE_GONE, "the node left", fault=Fault.PROVIDER))

    fake.script = fails
    answer = await http.post(CHAT, json=STREAM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "node_gone")


async def test_bytes_are_unchanged(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Unknown members, order and spacing of a body reach the engine unchanged, and so does the answer on its way back."""
    odd = b'{ "zzz": [1, 2.50],"model":"' + MODEL.encode() + b'",  "messages": [], "tools": [{"x": "\\u00e9"}] }\n'
    answer = await http.post(CHAT, content=odd)
    assert fake.last.body == odd
    assert answer.content == completion(TEXT)
    assert answer.headers["content-type"] == "application/json"


async def test_stream_is_flushed_chunk_by_chunk(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Each chunk reaches the caller before the engine sends the next one."""
    step = asyncio.Event()

    async def stepwise(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        for word in WORDS:
            await session.chunk(event(word))
            await step.wait()
            step.clear()
        await session.chunk(b"data: [DONE]\n\n", last=True)
        await session.finish()

    fake.script = stepwise
    async with http.stream("POST", CHAT, json=STREAM) as answer:
        assert answer.headers["x-tally-job"] == fake.last.job.hex()
        assert answer.headers["x-tally-provider"] == fake.providers[0].address
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no"), "proxies pass it on"
        seen = []
        async for chunk in answer.aiter_raw():
            seen.append(chunk)
            step.set()
    assert seen == [*map(event, WORDS), b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b'{"model": ', "not JSON"),
        (b"[]", "expected a JSON object"),
        (b"{}", "model"),
        (b'{"model": 7}', "model"),
        (b'{"model": "m", "stream": "yes"}', "stream"),
        (b'{"model": "m", "max_tokens": -3}', "max_tokens"),
        (b'{"model": "m", "n": 0}', "n:"),
        (b'{"model": "m", "n": 1e9}', "n, best_of"),
        (b"\xff\xfe", "not JSON in UTF-8"),
        (b'{"model": "\xff"}', "expected UTF-8"),
    ],
)
async def test_bad_bodies(http: httpx.AsyncClient, fake: FakeMarket, body: bytes, text: str) -> None:
    """A malformed body gets status 400 in OpenAI's format with the reason, and nothing is ordered."""
    answer = await http.post(CHAT, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "bad_message")
    assert text in error["message"]
    assert fake.submissions == []


async def test_body_limit(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A body beyond the limit is a 413."""
    async with gateway(fake, wallet, replace(config, max_body_bytes=1_000)) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(CHAT, content=b" " * 1_001)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_unknown_routes(http: httpx.AsyncClient) -> None:
    """Unknown routes and wrong methods get 404 in OpenAI's format; so does a route without a provider."""
    for answer in (await http.post("/v1/Images", json={}), await http.get(CHAT), await http.get("/x")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
    answer = await http.post("/v1/images/generations", json={"model": MODEL})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")


async def test_the_root_says_what_this_is(http: httpx.AsyncClient, url: str) -> None:
    """GET / names the base URLs that clients need, as they reached it; HEAD is answered for clients that look first."""
    answer = await http.get("/")
    assert answer.status_code == 200
    assert answer.json()["clients"] == {"OPENAI_BASE_URL": f"{url}/v1", "ANTHROPIC_BASE_URL": url}
    assert (await http.head("/")).status_code == 200


async def test_health(http: httpx.AsyncClient, wallet: Signer) -> None:
    """GET /health reports the payer's account."""
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["payer"]) == (200, wallet.address)


async def test_a_job_is_exported_as_typed_data(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """The exported job has order and receipt as typed data, whose signers an independent library recovers."""
    from eth_account import Account
    from eth_account.messages import encode_typed_data

    sent = await http.post(CHAT, json=BODY)
    exported = (await http.get(f"/tally/jobs/{sent.headers['x-tally-job']}")).json()
    assert (exported["state"], exported["provider"], exported["cost"]) == ("completed", fake.providers[0].address, "3")
    assert exported["usage"] == {"inputTokens": 10, "cachedInputTokens": 0, "outputTokens": 5}
    assert [entry["state"] for entry in exported["shortlist"]] == ["recorded", "closed"]
    for name, signer in (("order", exported["payer"]), ("receipt", exported["provider"])):
        signable = encode_typed_data(full_message=exported[name]["typedData"])
        assert Account.recover_message(signable, signature=exported[name]["signature"]).lower() == signer
    assert exported["receipt"]["typedData"]["message"]["orderHash"] == exported["order"]["digest"]
    missing = await http.get(f"/tally/jobs/{'0' * 32}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_job")
    assert (await http.get("/tally/jobs/nonsense")).status_code == 400


async def test_a_client_that_leaves_cancels_its_job(http: httpx.AsyncClient, market: Market, fake: FakeMarket) -> None:
    """A caller that disconnects in mid-stream cancels the job, and what was delivered is still recorded."""
    fake.script = until_cancelled
    async with http.stream("POST", CHAT, json=STREAM) as answer:
        await anext(answer.aiter_raw())

    async def booked() -> bool:
        known = await market.find(fake.last.job)
        return known is not None and known.state is JobState.CANCELLED

    await eventually(booked)
    assert (await market.tab(fake.providers[0].address)).accepted == 2
    assert fake.cancels == [fake.last.job]


async def test_a_client_that_leaves_before_the_answer(http: httpx.AsyncClient, market: Market, fake: FakeMarket) -> None:
    """A caller that disconnects before the first byte cancels the job."""
    waiting = asyncio.Event()

    async def waits(session: Session) -> None:
        await session.match()
        waiting.set()
        await session.cancelled.wait()
        await session.void(Outcome.UPSTREAM_ERROR)
        await session.fail(Unavailable(Code.CANCELLED, "cancelled"))

    fake.script = waits
    task = asyncio.create_task(http.post(CHAT, json=BODY))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: market.running == 0)
    assert fake.cancels == [fake.last.job]
    assert (await market.tab(fake.providers[0].address)).open_caps == 0


async def test_api_key(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With an API key set, only its holders are served; /health needs none."""
    async with gateway(fake, wallet, replace(config, api_key="secret")) as url, httpx.AsyncClient(base_url=url) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = await http.post(CHAT, json=BODY, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated")
        assert (await http.get("/health")).status_code == 200
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert [model.id async for model in client.models.list()] == [MODEL]
    assert "secret" not in repr(replace(config, api_key="secret"))


async def test_web_pages_may_not_spend(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Requests of web pages, or to a foreign host name, are refused unless the config allows the page."""
    allowed = replace(config, allow_origins=("http://localhost:3000",))
    async with gateway(fake, wallet, allowed) as url, httpx.AsyncClient(base_url=url) as http:
        for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}, {"host": "[bad"}):
            answer = await http.post(CHAT, json=BODY, headers=headers)
            assert answer.status_code in {400, 401}
        page = {"origin": "http://localhost:3000"}
        asked = await http.options(CHAT, headers=page | {"access-control-request-method": "POST"})
        assert asked.headers["access-control-allow-origin"] == page["origin"]
        assert (await http.post(CHAT, json=BODY, headers=page)).status_code == 200
    assert len(fake.submissions) == 1


def test_public_gateway_needs_a_key(config: ClientConfig) -> None:
    """A gateway that other machines can reach does not start without an API key."""
    for host in ("0.0.0.0", "::", "192.168.1.5", "gateway.example"):
        with pytest.raises(BadMessage, match="api_key"):
            check_public_access(replace(config, host=host))
        check_public_access(replace(config, host=host, api_key="k"))
    for host in ("127.0.0.1", "::1", "localhost"):
        check_public_access(replace(config, host=host))


async def test_no_coordinator(wallet: Signer, config: ClientConfig) -> None:
    """Without a coordinator the gateway answers 503 with Retry-After."""
    fake = FakeMarket()
    async with fake.serve():
        pass
    async with gateway(fake, wallet, config) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(CHAT, json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "coordinator_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert (await http.get("/v1/models")).status_code == 503
