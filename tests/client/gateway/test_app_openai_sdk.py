"""The gateway through the unmodified official SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import orjson
import pytest
from openai.types.chat import ChatCompletion

from tallystick.client.config import Alias, Budget, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount, JobId
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import EVENTS, WORDS, FakeMarket, Session, completion, event
from tests.client.parties import MODEL

TEXT = "".join(WORDS)


@pytest.fixture
async def url(market: Market) -> AsyncIterator[str]:
    """A gateway over the market's client."""
    async with serving(build_app(market), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client with only its base URL changed."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def ask(sdk: openai.AsyncOpenAI) -> ChatCompletion:
    """Sends one plain question."""
    return await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])


async def _parse(raw: Any) -> ChatCompletion:
    parsed = raw.parse()
    return await parsed if asyncio.iscoroutine(parsed) else parsed  # type: ignore[no-any-return]


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
    """The synchronous SDK works, streamed and not."""

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


async def test_openai_models(sdk: openai.AsyncOpenAI) -> None:
    """Models are listed and found by name, also names with a slash; an unknown one gets 404."""
    listed = [model async for model in sdk.models.list()]
    assert [model.id for model in listed] == [MODEL]
    assert (await sdk.models.retrieve(MODEL)).owned_by == "tallystick"
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("nothing")


async def test_openai_completions_and_embeddings(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """Completions and embeddings work like chats."""

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
    """The market's refusals arrive as the official SDK's own exceptions, with our code and whether to retry."""
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
    """The official SDK's own retries recover from a temporary refusal, and each attempt is a job of its own."""
    fake.refusals = [Unavailable(Code.NODE_BUSY, "busy")]
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2) as client:
        assert (await ask(client)).choices[0].message.content == TEXT


async def test_dishonest_cost(sdk: openai.AsyncOpenAI, market: Market, fake: FakeMarket) -> None:
    """A receipt with a wrong cost gets status 502 without retry; nothing is accepted, and the gateway keeps working."""

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
        with pytest.raises(errors):
            await anext(chunks)


async def test_engine_error_passes_through(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """The engine's own 4xx answer reaches the caller unchanged, also for a streamed request."""

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


async def test_a_budget_stops_a_workload(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A request beyond its budget is refused as an exhausted quota, which the SDK does not retry; other workloads go on."""
    bounded = replace(config, budgets=(Budget(per_day=Amount(0), label="research"),))
    async with (
        Market(fake.url, wallet, bounded) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=3) as sdk,
    ):
        with pytest.raises(openai.APIStatusError, match="the day's budget of 'research' has 0 dollars left") as caught:
            await ask(sdk.with_options(default_headers={"x-tally-options": '{"label": "research"}'}))
        assert (caught.value.status_code, caught.value.code, caught.value.type) == (402, "over_budget", "insufficient_quota")
        assert not fake.sessions
        assert (await ask(sdk)).choices[0].message.content == TEXT


async def test_another_model_answers(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """If a model is not available, the next one of the alias or of the request's fallbacks answers under its own name."""
    named = replace(
        config, aliases=(Alias(name="best", models=("missing", MODEL)), Alias(name="none", models=("missing", "too")))
    )
    async with (
        Market(fake.url, wallet, named) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as sdk,
    ):

        async def answers(model: str, **headers: str) -> str | None:
            completion = await sdk.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "hi"}], extra_headers=dict(headers)
            )
            return completion.choices[0].message.content

        assert await answers("best") == TEXT
        assert fake.last.request["model"] == MODEL
        stream = await sdk.chat.completions.create(model="best", messages=[{"role": "user", "content": "hi"}], stream=True)
        assert [chunk.choices[0].delta.content async for chunk in stream] == list(WORDS)
        assert await answers("missing", **{"x-tally-options": json.dumps({"fallbacks": ["too", MODEL]})}) == TEXT
        for name in ("none", "missing"):
            with pytest.raises(openai.NotFoundError, match="'too'" if name == "none" else "'missing'"):
                await answers(name)
        key = {"idempotency-key": "k"}
        assert await answers("best", **key) == TEXT
        with pytest.raises(openai.ConflictError, match="ended as completed"):  # the same job, whose answer is no longer stored
            await answers("best", **key)
        assert len(fake.sessions) == 4
        assert [model.id async for model in sdk.models.list()][-2:] == ["best", "none"]
        assert (await sdk.models.retrieve("best")).id == "best"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Unavailable(Code.ENGINE_UNAVAILABLE, "gone", fault=Fault.ENGINE), "no provider offers the model 'never'"),
        (Refusal(Code.ORDER_TERMS, "not so"), "not so"),
    ],
)
async def test_a_submitted_job_that_fails(
    failure: TallyError, message: str, fake: FakeMarket, wallet: Signer, config: ClientConfig
) -> None:
    """Another model is tried if nothing came yet, but not after an error that it would return too."""

    async def fail(session: Session) -> None:
        await session.match()
        await session.fail(failure)

    fake.script = fail
    async with Market(fake.url, wallet, config) as market, serving(build_app(market), "127.0.0.1", 0) as port:
        headers = {"x-tally-options": json.dumps({"fallbacks": [MODEL, "never"]})}
        async with openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0, default_headers=headers
        ) as sdk:
            with pytest.raises(openai.APIStatusError, match=message):
                await ask(sdk)
    assert len(fake.sessions) == 1
