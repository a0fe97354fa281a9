from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import orjson
import pytest
from openai.types.chat import ChatCompletion

from tallystick.client.config import ClientConfig
from tallystick.client.gateway import build_app, check_exposed
from tallystick.client.sdk import Market
from tallystick.client.tables import JobState
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount, JobId
from tallystick.runtime.serving import serving
from tests.client.fake import (
    BODY,
    CHAT,
    EVENTS,
    MESSAGES,
    MODEL,
    STREAM,
    WORDS,
    FakeMarket,
    Session,
    completion,
    event,
    eventually,
    until_cancelled,
)

TEXT = "".join(WORDS)


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[str]:
    async with Market(fake.url, wallet, config) as market, serving(build_app(market), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def url(market: Market) -> AsyncIterator[str]:
    """A gateway over the market's client."""
    async with serving(build_app(market), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, with nothing changed but its base URL."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Bare HTTP."""
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:
        yield client


async def ask(sdk: openai.AsyncOpenAI) -> ChatCompletion:
    return await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])


async def test_openai_chat(sdk: openai.AsyncOpenAI) -> None:
    """The official SDK gets a completion."""
    answer = await ask(sdk)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage is not None
    assert answer.usage.total_tokens == 15


async def test_openai_stream(sdk: openai.AsyncOpenAI) -> None:
    """The official SDK streams."""
    stream = await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True)
    assert [chunk.choices[0].delta.content async for chunk in stream] == list(WORDS)


async def test_openai_sync(url: str) -> None:
    """The synchronous SDK works as well, streamed and not."""

    def use() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
            whole = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
            parts = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True)
            return whole.choices[0].message.content, "".join(part.choices[0].delta.content or "" for part in parts)

    assert await asyncio.to_thread(use) == (TEXT, TEXT)


async def test_openai_raw_response(sdk: openai.AsyncOpenAI, market: Market, fake: FakeMarket) -> None:
    """Response headers name the job, the provider, the cost and the receipt."""
    raw = await sdk.chat.completions.with_raw_response.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert (await _parse(raw)).choices[0].message.content == TEXT
    known = await market.find(JobId(bytes.fromhex(raw.headers["x-tally-job"])))
    assert known is not None
    assert known.receipt is not None
    assert raw.headers["x-tally-provider"] == fake.providers[0].address
    assert raw.headers["x-tally-cost"] == "3"
    assert raw.headers["x-tally-receipt"] == "0x" + known.receipt.verify(known.domain).digest.hex()


async def _parse(raw: Any) -> ChatCompletion:
    parsed = raw.parse()
    return await parsed if asyncio.iscoroutine(parsed) else parsed  # type: ignore[no-any-return]


async def test_openai_models(sdk: openai.AsyncOpenAI) -> None:
    """Models are listed and looked up, also by names with a slash; an unknown one is a 404."""
    listed = [model async for model in sdk.models.list()]
    assert [model.id for model in listed] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).owned_by == "tallystick"
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("nothing")


async def test_openai_completions_and_embeddings(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """Completions and embeddings go the same way."""

    async def completes(session: Session) -> None:
        await session.match()
        await session.answer()
        choice = {"index": 0, "text": "once", "finish_reason": "stop", "logprobs": None}
        whole = {"id": "x", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]}
        await session.chunk(orjson.dumps(whole), last=True)
        await session.finish()

    vectors = await sdk.embeddings.create(model=MODEL, input="hello", encoding_format="float")
    assert vectors.data[0].embedding == [0.5, 0.25]
    assert fake.submissions[-1].candidates[0].terms.max_output_tokens == 0
    fake.script = completes
    answer = await sdk.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=7, n=2)
    assert answer.choices[0].text == "once"
    assert fake.submissions[-1].candidates[0].terms.max_output_tokens == 28


@pytest.mark.parametrize(
    ("refusal", "kind", "status"),
    [
        (Refusal(Code.UNKNOWN_MODEL, "no such model"), openai.NotFoundError, 404),
        (Refusal(Code.PRICE_ABOVE_CAP, "too dear"), openai.APIStatusError, 402),
        (Refusal(Code.ORDER_REPLAYED, "seen"), openai.ConflictError, 409),
        (Unavailable(Code.NO_PROVIDER, "none"), openai.InternalServerError, 503),
        (Refusal(Code.BAD_SIGNATURE, "forged", fault=Fault.PROVIDER), openai.InternalServerError, 502),
    ],
)
async def test_openai_errors(
    sdk: openai.AsyncOpenAI, fake: FakeMarket, refusal: Refusal, kind: type[openai.APIStatusError], status: int
) -> None:
    """What the market refuses arrives as the official SDK's own exception, with our code, and says whether to retry."""
    fake.refusals = [refusal] * 3
    with pytest.raises(kind) as caught:
        await ask(sdk)
    assert (caught.value.status_code, caught.value.code) == (status, refusal.code.value)
    assert str(refusal) in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == str(refusal.retry).lower()
    assert ("retry-after" in caught.value.response.headers) == refusal.retry
    fake.refusals = []
    assert (await ask(sdk)).choices


async def test_openai_retries_by_itself(url: str, fake: FakeMarket) -> None:
    """The official SDK's own retries heal a passing refusal, and each attempt is a job of its own."""
    fake.refusals = [Unavailable(Code.NODE_BUSY, "busy")]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as client:
        assert (await ask(client)).choices[0].message.content == TEXT


async def test_dishonest_cost(sdk: openai.AsyncOpenAI, market: Market, fake: FakeMarket) -> None:
    """A node that signs a wrong cost is a 502 that is not to be retried; nothing is accepted, and the gateway lives on."""

    async def lies(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(completion("x"), last=True)
        await session.finish(cost=Amount(9), cumulative_cost=Amount(9))

    honest, fake.script = fake.script, lies
    with pytest.raises(openai.InternalServerError) as caught:
        await ask(sdk)
    assert (caught.value.status_code, caught.value.code) == (502, Code.BAD_RECEIPT.value)
    assert caught.value.response.headers["x-should-retry"] == "false"
    alice, bob = fake.providers
    assert (await market.tab(alice.address)).accepted == 0
    fake.script = honest
    raw = await sdk.chat.completions.with_raw_response.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert raw.headers["x-tally-provider"] == bob.address


async def test_error_inside_a_stream(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """A stream that fails half way ends with an error event, which the official SDK raises after the text so far."""

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half"))
        await session.chunk(b'data: {"half an ev')
        await session.fail(Unavailable(Code.NODE_GONE, "the node left", fault=Fault.PROVIDER))

    async def breaks_cleanly(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half"))
        await session.fail(Unavailable(Code.NODE_GONE, "the node left", fault=Fault.PROVIDER))

    for script, errors in ((breaks_cleanly, openai.APIError), (breaks, (openai.APIError, json.JSONDecodeError))):
        fake.script = script
        stream = await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True)
        chunks = aiter(stream)
        assert (await anext(chunks)).choices[0].delta.content == "half"
        with pytest.raises(errors):  # type: ignore[arg-type]
            await anext(chunks)


async def test_stream_that_fails_before_output_is_an_http_error(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """A streamed request that fails before its first byte gets a status of its own, not an empty stream."""

    async def fails(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.NODE_GONE, "the node left", fault=Fault.PROVIDER))

    fake.script = fails
    answer = await http.post(CHAT, json=STREAM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "node_gone")


async def test_engine_error_passes_through(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """The engine's own 4xx reaches the caller as the engine wrote it, also for a streamed request."""

    async def rejects(session: Session) -> None:
        await session.match()
        await session.answer(422)
        await session.chunk(b'{"error": {"message": "bad temperature", "code": "engine_code"}}', last=True)
        await session.finish(Usage(10, 0, 0), Outcome.UPSTREAM_ERROR)

    fake.script = rejects
    for stream in (False, True):
        with pytest.raises(openai.UnprocessableEntityError, match="bad temperature") as caught:
            await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=stream)
        assert caught.value.response.headers["x-tally-cost"] == "0"


async def test_bytes_are_untouched(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Unknown members, order and spacing of a body reach the engine as they were, and its bytes come back as they were."""
    odd = b'{ "zzz": [1, 2.50],"model":"' + MODEL.encode() + b'",  "messages": [], "tools": [{"x": "\\u00e9"}] }\n'
    answer = await http.post(CHAT, content=odd)
    assert fake.last.body == odd
    assert answer.content == completion(TEXT)
    assert answer.headers["content-type"] == "application/json"


async def test_stream_is_flushed_chunk_by_chunk(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Each chunk is with the caller before the engine has the next one."""
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
        (b'{"model": "m", "max_tokens": -1}', "max_tokens"),
        (b'{"model": "m", "n": 0}', "n:"),
        (b'{"model": "m", "n": 1e9}', "n:"),
        (b"\xff\xfe", "not JSON"),
    ],
)
async def test_bad_bodies(http: httpx.AsyncClient, fake: FakeMarket, body: bytes, text: str) -> None:
    """A body that is not what it must be is a 400 in OpenAI's shape that says what is wrong, and nothing is ordered."""
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
    """Unknown routes and wrong methods are 404s in OpenAI's shape."""
    for answer in (await http.post("/v1/images/generations", json={}), await http.get(CHAT), await http.get("/")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")


async def test_health(http: httpx.AsyncClient, wallet: Signer) -> None:
    """The gateway says that it is up, and for whom it pays."""
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["payer"]) == (200, wallet.address)


async def test_the_story_of_a_job(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """What the client knows of a job has order and receipt as typed data that an independent library recovers."""
    from eth_account import Account
    from eth_account.messages import encode_typed_data

    sent = await http.post(CHAT, json=BODY)
    story = (await http.get(f"/tally/jobs/{sent.headers['x-tally-job']}")).json()
    assert (story["state"], story["provider"], story["cost"]) == ("completed", fake.providers[0].address, "3")
    assert story["usage"] == {"inputTokens": 10, "cachedInputTokens": 0, "outputTokens": 5}
    assert [entry["state"] for entry in story["shortlist"]] == ["booked", "closed"]
    for name, who in (("order", story["payer"]), ("receipt", story["provider"])):
        signable = encode_typed_data(full_message=story[name]["typedData"])
        assert Account.recover_message(signable, signature=story[name]["signature"]).lower() == who
    assert story["receipt"]["typedData"]["message"]["orderHash"] == story["order"]["digest"]
    missing = await http.get(f"/tally/jobs/{'0' * 32}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_job")
    assert (await http.get("/tally/jobs/nonsense")).status_code == 400


async def test_a_client_that_leaves_cancels_its_job(http: httpx.AsyncClient, market: Market, fake: FakeMarket) -> None:
    """When the caller goes away in mid-stream the job is cancelled, and what was delivered is still booked."""
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
    """A caller that gives up while it waits for the first byte cancels the job too."""
    waiting = asyncio.Event()

    async def waits(session: Session) -> None:
        await session.match()
        waiting.set()
        await session.cancelled.wait()
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
    """With an API key set, only those who have it get in; health needs none."""
    async with gateway(fake, wallet, replace(config, api_key="secret")) as url, httpx.AsyncClient(base_url=url) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            answer = await http.post(CHAT, json=BODY, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthenticated")
        assert (await http.get("/health")).status_code == 200
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert (await ask(client)).choices
    assert "secret" not in repr(replace(config, api_key="secret"))


async def test_web_pages_may_not_spend(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Requests of web pages, or to a name that only points here, are refused, unless the config allows the page."""
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


def test_exposed_gateway_needs_a_key(config: ClientConfig) -> None:
    """A gateway bound beyond this machine does not start without an API key."""
    for host in ("0.0.0.0", "::", "192.168.1.5", "gateway.example"):
        with pytest.raises(BadMessage, match="api_key"):
            check_exposed(replace(config, host=host))
        check_exposed(replace(config, host=host, api_key="k"))
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposed(replace(config, host=host))


async def test_gateway_outlives_its_coordinator(wallet: Signer, config: ClientConfig) -> None:
    """Without a coordinator the gateway answers 503 with Retry-After, and works once there is one."""
    fake = FakeMarket()
    async with fake.serve():
        url = fake.url
    async with Market(url, wallet, config) as market, serving(build_app(market), "127.0.0.1", 0) as port:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            answer = await http.post(CHAT, json=BODY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "coordinator_unavailable")
            assert answer.headers["retry-after"] == "1"
            assert (await http.get("/v1/models")).status_code == 503


def test_messages_are_what_they_say() -> None:
    """The texts that the other tests rely on."""
    assert MESSAGES[0]["role"] == "user"
