"""Real engines behind a real market: identified, sold, counted, cancelled and killed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAIError

from node.domain.logprob_request import EvidenceSupport, TokenIds
from node.engines.discover import inspect_engine
from node.engines.kinds import EngineKind
from node.engines.probe import model_for_routes, probe
from scripts.relay import processes
from tallystick.protocol.routes import SCORES
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse
from tests.e2e.extra_node import node_beside, sells
from tests.real_engines.conftest import WANTED
from tests.real_engines.real import LARGE, QUICK, Engine

ENGINES = QUICK | (LARGE if WANTED == "all" else {})
SAY: Any = [{"role": "user", "content": "def "}]


def _toml(engine: Engine) -> str:
    extra = f'[[engines]]\nname = "vectors"\nurl = "{engine.embeddings}"\n' if engine.embeddings else ""
    extra += f'[[engines.models]]\nname = "{engine.model}"\nsell_as = "vectors"\n' if engine.embeddings else ""
    features = sorted(engine.features)
    usage = "" if engine.streams == "usage" else "supports_stream_usage = false\n"
    return (
        f'[[engines]]\nname = "main"\nurl = "{engine.process.url}/v1"\nslots = 2\n{usage}[engines.spec]\nfeatures = {features}\n'
        f'[[engines.models]]\nname = "{engine.model}"\nsell_as = "tinycode"\ninput_price = "1"\noutput_price = "1"\n'
        f'max_output_tokens = 450\nscore_price = "3"\n{extra}'
    )


@pytest.mark.parametrize("name", ENGINES)
async def test_a_real_engine(name: str, tmp_path: Path) -> None:
    """Discovery, chat, stream, cancel and embeddings work; receipts have the engine's counts; a killed engine comes back."""
    async with ENGINES[name](tmp_path) as engine:
        await _check_discovery(engine)
        folder = tmp_path / "market"
        async with (
            processes.upstream() as mock,
            processes.market(folder, mock) as site,
            node_beside(folder, site, _toml(engine), model="tinycode") as node,
            AsyncOpenAI(base_url=f"{site.gateway}/v1", api_key="unused", max_retries=0, timeout=120) as client,
            httpx.AsyncClient(base_url=site.gateway, trust_env=False, timeout=120) as http,
        ):
            await _chats(client, http, engine)
            await _streams(client, http, engine)
            if engine.kind is EngineKind.LLAMA_CPP:
                await _has_evidence(http)
            if SCORES in engine.features:
                await _scores(http, engine)
            await _is_cancelled(site, http, engine)
            if engine.embeddings:
                await _embeds(site, client)
            await _is_killed(site, client, http, engine)
            assert node.returncode is None


async def _check_discovery(engine: Engine) -> None:
    """The engine is identified and probed as `tally node init` does it."""
    discovered = await inspect_engine(engine.process.url, seconds=30)
    capabilities = await probe(engine.process.url, engine.model, routes_of=model_for_routes(discovered, engine.model))
    contexts = [model.context_tokens for model in discovered.models]
    print(discovered.kind.value, discovered.version, discovered.slots, contexts, capabilities)  # noqa: T201
    assert discovered.kind is engine.kind
    assert (capabilities.chat, capabilities.completions, capabilities.streams) == (True, True, engine.streams)
    assert engine.features <= set(capabilities.features)
    assert engine.kind is not EngineKind.LLAMA_CPP or capabilities.evidence == EvidenceSupport(
        TokenIds.MEMBER, TokenIds.MEMBER, null_in_completions=True
    )
    if engine.context:
        assert [model.context_tokens for model in discovered.models] == [engine.context]
    # LiteLLM pauses a model for seconds after a request that it cannot serve.
    async with httpx.AsyncClient(trust_env=False, timeout=120) as direct:
        request = {"model": engine.model, "messages": SAY, "max_tokens": 1}
        for _ in range(60):
            if (await direct.post(f"{engine.process.url}/v1/chat/completions", json=request)).status_code == 200:
                break
            await asyncio.sleep(0.5)


async def _has_evidence(http: httpx.AsyncClient) -> None:
    """Receipts of whole and streamed answers commit to their rows, and callers see no log-probabilities."""
    for stream in (False, True):
        request = {"model": "tinycode", "messages": SAY, "max_tokens": 8, "temperature": 0, "stream": stream}
        answer = await http.post("/v1/chat/completions", json=request)
        assert answer.status_code == 200
        assert "logprobs" not in answer.text
        receipt = await _receipt(http, answer.headers["x-tally-job"])
        assert int(receipt["evidenceRoot"], 16) != 0


async def _receipt(http: httpx.AsyncClient, job: str) -> dict[str, Any]:
    """The content of the job's receipt, once the client has it."""
    for _ in range(200):
        story = (await http.get(f"/tally/jobs/{job}")).json()
        if story.get("receipt"):
            return dict(story["receipt"]["typedData"]["message"])
        await asyncio.sleep(0.05)
    raise AssertionError(f"no receipt: {story}")


def _billed(receipt: dict[str, Any]) -> tuple[int, int]:
    return receipt["inputTokens"], receipt["outputTokens"]


async def _chats(client: AsyncOpenAI, http: httpx.AsyncClient, engine: Engine) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="tinycode", messages=SAY, max_tokens=20)
    answer, receipt = raw.parse(), await _receipt(http, raw.headers["x-tally-job"])
    assert answer.usage is not None
    assert _billed(receipt) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert answer.choices[0].finish_reason in {"length", "stop"}  # the model decides
    assert answer.model == "tinycode"
    assert raw.headers["x-tally-cost"] == str(answer.usage.total_tokens)
    assert engine.model == "tinycode" or engine.model not in raw.text


async def _streams(client: AsyncOpenAI, http: httpx.AsyncClient, engine: Engine) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if engine.streams == "usage" else {}
    stream: Any = await client.chat.completions.create(model="tinycode", messages=SAY, max_tokens=30, stream=True, **options)
    job, text, usage = stream.response.headers["x-tally-job"], "", None
    async for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    receipt = await _receipt(http, job)
    assert text
    if engine.streams == "usage":
        assert usage is not None
        assert _billed(receipt) == (usage.prompt_tokens, usage.completion_tokens)
    else:
        assert 0 < receipt["outputTokens"] <= len(text)


async def _scores(http: httpx.AsyncClient, engine: Engine) -> None:
    """An answer at temperature 0 is scored: each of its tokens is the likeliest. Scoring has a price of its own."""
    body = {"model": "tinycode", "messages": SAY, "max_tokens": 12, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = (await http.post("/v1/chat/completions", json=body)).json()
    given = answer["choices"][0]["logprobs"]["content"]
    tokens = [entry["id"] for entry in given] if "id" in given[0] else answer["choices"][0]["message"]["content"]
    request = ScoreRequest.of(body, tokens, range(len(given)))
    raw = await http.post(SCORES, json=request.to_json())
    assert raw.status_code == 200, raw.text
    response = ScoreResponse.from_json(raw.json(), request)
    assert len(response.tokens) == len(given)
    for row, entry in zip(response.rows, given, strict=True):
        assert row is not None
        assert row.logprob == pytest.approx(entry["logprob"], abs=0.05)
        assert row.logprob == pytest.approx(row.top[0][1], abs=0.05)
    receipt = await _receipt(http, raw.headers["x-tally-job"])
    assert _billed(receipt) == (response.prompt_tokens + len(tokens), 0)
    assert int(receipt["cost"]) == 3 * receipt["inputTokens"]
    refused = await http.post(SCORES, json={**request.to_json(), "positions": [10_000]})
    assert refused.status_code == 400, refused.text


async def _is_cancelled(site: processes.Site, http: httpx.AsyncClient, engine: Engine) -> None:
    """A client that disconnects stops the engine and pays for what it got."""
    body = {"model": "tinycode", "messages": SAY, "max_tokens": 440, "stream": True} | engine.slow
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        job = response.headers["x-tally-job"]
        async for line in response.aiter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if any(choice["delta"].get("content") for choice in event.get("choices", [])):
                break
    receipt = await _receipt(http, job)
    if receipt["outcome"] == 0 or receipt["outcome"] == 1:
        pytest.skip("the engine was faster than the client could leave")
    assert receipt["outcome"] == 2, "client_cancelled"
    assert 0 < receipt["outputTokens"] < 440
    async with httpx.AsyncClient(trust_env=False) as direct:
        for _ in range(20):
            slots = (await direct.get(f"{engine.process.url}/slots")).json() if engine.kind.value == "llama.cpp" else []
            if not any(slot["is_processing"] for slot in slots):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"the engine goes on: {slots}")


async def _embeds(site: processes.Site, client: AsyncOpenAI) -> None:
    await sells(site, "vectors")
    raw = await client.embeddings.with_raw_response.create(model="vectors", input="def add(a, b):", encoding_format="float")
    vectors = raw.parse()
    assert len(vectors.data[0].embedding) == 256
    assert (vectors.usage.prompt_tokens, vectors.model) == (vectors.usage.total_tokens, "vectors")
    assert vectors.usage.prompt_tokens > 0


async def _read_until_killed(stream: AsyncIterator[Any], engine: Engine) -> None:
    async for _ in stream:
        await engine.process.kill()


async def _is_killed(site: processes.Site, client: AsyncOpenAI, http: httpx.AsyncClient, engine: Engine) -> None:
    """If an engine dies in mid-answer, the client gets an error, nothing is charged, and the next request is sold."""
    stream: Any = await client.chat.completions.create(
        model="tinycode", messages=SAY, max_tokens=440, stream=True, extra_body=engine.slow
    )
    job = stream.response.headers["x-tally-job"]
    with pytest.raises((OpenAIError, httpx.HTTPError)):
        await _read_until_killed(stream, engine)
    receipt = await _receipt(http, job)
    assert (receipt["outcome"], receipt["cost"]) == (3, "0"), "provider_error"
    await sells(site, "tinycode", yes=False)
    refused = await http.post("/v1/chat/completions", json={"model": "tinycode", "messages": SAY})
    assert refused.status_code in (404, 503), refused.text
    await engine.process.start()
    await sells(site, "tinycode")
    await _chats(client.with_options(max_retries=10), http, engine)  # LiteLLM answers 429 for some seconds after a failure
