from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from node.engines.demo import DemoEngine
from node.engines.demo_answer import FINGERPRINT, MODEL
from tallystick.runtime.serving import serving

ASK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is a tally stick"}]


@pytest.fixture
def engine() -> DemoEngine:
    """The demo engine."""
    return DemoEngine()


@pytest.fixture
async def url(engine: DemoEngine) -> AsyncIterator[str]:
    """Its base URL."""
    async with serving(engine.app, "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def client(url: str) -> AsyncIterator[AsyncOpenAI]:
    """The official SDK."""
    async with AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def simulate(url: str, **behaviour: Any) -> AsyncIterator[dict[str, Any]]:
    """Sets what the engine simulates; yields the state that it reports."""
    async with aiohttp.ClientSession() as session, session.post(url + "/demo/behaviour", json=behaviour) as response:
        yield await response.json()


async def test_it_declares_itself_a_stand_in(client: AsyncOpenAI) -> None:
    """Model name, answer and fingerprint say that this is a stand-in; the answer repeats the prompt."""
    assert [model.id async for model in client.models.list()] == [MODEL]
    answer = await client.chat.completions.create(model=MODEL, messages=ASK)
    text = answer.choices[0].message.content or ""
    assert "stand-in and not a model" in text
    assert "what is a tally stick" in text
    assert (answer.system_fingerprint, answer.choices[0].finish_reason) == (FINGERPRINT, "stop")


async def test_tokens_are_words(client: AsyncOpenAI) -> None:
    """Usage counts words between white space, in the prompt and in the answer."""
    answer = await client.chat.completions.create(model=MODEL, messages=ASK)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 + 5
    assert answer.usage.completion_tokens == len((answer.choices[0].message.content or "").split())


async def test_streams_add_up_to_the_answer(client: AsyncOpenAI) -> None:
    """Streamed or not, the text is the same; usage comes last, if it was asked for."""
    whole = await client.chat.completions.create(model=MODEL, messages=ASK)
    stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    plain = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    assert all([chunk.usage is None and bool(chunk.choices) async for chunk in plain])


async def test_the_limit_is_kept(client: AsyncOpenAI) -> None:
    """An answer cut at max_tokens has exactly that many tokens and the finish reason "length"."""
    answer = await client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=3)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


async def test_completions_and_embeddings(client: AsyncOpenAI) -> None:
    """The completions route and embeddings work too; equal texts have equal embeddings."""
    answer = await client.completions.create(model=MODEL, prompt="once upon", max_tokens=4)
    assert len(answer.choices[0].text.split()) == 4
    stream = await client.completions.create(model=MODEL, prompt="once upon", max_tokens=4, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == answer.choices[0].text
    vectors = await client.embeddings.create(model=MODEL, input=["a b", "a b", "c"], encoding_format="float")
    assert vectors.data[0].embedding == vectors.data[1].embedding != vectors.data[2].embedding
    assert vectors.usage.prompt_tokens == 5


async def test_simulated_failures(client: AsyncOpenAI, url: str) -> None:
    """Each simulated failure has its effect for the given number of requests; then the engine answers again."""
    for fail, error in (
        ("bad_request", openai.BadRequestError),
        ("busy", openai.RateLimitError),
        ("error", openai.InternalServerError),
    ):
        async with simulate(url, fail=fail, times=1):
            with pytest.raises(error):
                await client.chat.completions.create(model=MODEL, messages=ASK)
        await client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=1)
    for fail in ("die", "garbage"):
        async with simulate(url, fail=fail, after=2, times=1):
            stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
            with pytest.raises(Exception, match=r".*"):  # the SDK has no error class of its own for either
                [chunk async for chunk in stream]
    async with simulate(url, fail="no_usage", times=1):
        assert (await client.chat.completions.create(model=MODEL, messages=ASK)).usage is None


async def test_simulated_silence(client: AsyncOpenAI, url: str, engine: DemoEngine) -> None:
    """The engine can hang before or during an answer until its client disconnects."""
    async with simulate(url, fail="hang", times=1):
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.2).chat.completions.create(model=MODEL, messages=ASK)
    async with simulate(url, fail="stall", after=3, times=1):
        stream = await client.with_options(timeout=0.2).chat.completions.create(model=MODEL, messages=ASK, stream=True)
        with pytest.raises(openai.APITimeoutError):
            [chunk async for chunk in stream]
    assert engine.seen == 2


async def test_bad_requests(url: str) -> None:
    """Malformed bodies and unknown simulations get an error in OpenAI's format."""
    async with aiohttp.ClientSession() as session:
        for path, body in (
            ("/v1/chat/completions", b"{"),
            ("/v1/chat/completions", b'{"messages": []}'),
            ("/v1/completions", b'{"prompt": 3}'),
            ("/v1/embeddings", b'{"input": [3]}'),
            ("/demo/behaviour", b'{"fail": "explode"}'),
            ("/demo/behaviour", b"[]"),
        ):
            async with session.post(url + path, data=body) as response:
                assert response.status == 400
                assert (await response.json())["error"]["message"]
    async with simulate(url, token_seconds=0.001) as state:
        assert state["usual"]["token_seconds"] == 0.001
