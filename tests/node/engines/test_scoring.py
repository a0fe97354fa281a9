from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest

from node.domain.requests import EngineRequest, prepare
from node.engines.engine_settings import EngineSettings
from node.engines.openai_http import OpenAIEngine
from node.engines.probe import probe
from node.ports import EngineEvent, ResponseEnd, ResponseStart
from tallystick.client.openai.requests import summarise
from tallystick.protocol.errors import BadMessage, Code, Refusal, Unavailable
from tallystick.protocol.messages import Spec
from tallystick.protocol.plaintext_heads import RequestHead
from tallystick.protocol.routes import SCORES
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse
from tests.node.harness import OFFER
from tests.scoring.engines import END, ENGINES, FakeEngine, llama_cpp, refused, serving, template, text_only, tokens_of

MESSAGES = [{"role": "user", "content": "Say hi"}]
REQUEST = ScoreRequest("toy", {"messages": MESSAGES}, tuple(tokens_of("hello")), (0, 3, 5))
SELLS = replace(OFFER, model="toy", upstream="org/toy", spec=Spec(features=(SCORES,)))


def prepared(request: dict[str, Any] | ScoreRequest, **sent: Any) -> EngineRequest:
    """The engine's request for a scoring job that orders no output."""
    body = request.to_json() if isinstance(request, ScoreRequest) else request
    return replace(prepare(RequestHead(SCORES), orjson.dumps(body), SELLS, 0), **sent)


@asynccontextmanager
async def connected(engine: FakeEngine) -> AsyncIterator[OpenAIEngine]:
    """The node's connection to an engine."""
    async with serving(engine) as url:
        connection = OpenAIEngine(EngineSettings(f"{url}/v1", "the-key"))
        try:
            yield connection
        finally:
            await connection.close()


async def events_of(engine: FakeEngine, request: EngineRequest) -> list[EngineEvent]:
    """All events of an answer."""
    async with connected(engine) as connection, aclosing(connection.answer(request)) as events:
        return [event async for event in events]


@pytest.mark.parametrize("name", ENGINES)
async def test_a_scoring_job_is_answered_and_counted(name: str) -> None:
    """The answer is what the client reads, under the name that it bought, and every token that was read is input."""
    sent: list[bool] = []
    start, end = await events_of(ENGINES[name](), prepared(REQUEST, on_sent=lambda: sent.append(True)))
    assert start == ResponseStart(200, "application/json")
    assert isinstance(end, ResponseEnd)
    response = ScoreResponse.from_json(orjson.loads(end.tail), REQUEST)
    assert response.model == "toy"
    assert all(response.rows)
    assert end.usage is not None
    read = len(tokens_of(template(MESSAGES))) + len(REQUEST.completion)
    assert (end.usage.input, end.usage.cached, end.usage.output) == (read, 0, 0)
    assert sent == [True]


async def test_the_engine_gets_its_own_name_of_the_model() -> None:
    """Every call to the engine names the model as the engine does."""
    engine = llama_cpp()
    await events_of(engine, prepared(REQUEST))
    assert {body["model"] for path, body in engine.asked if path != "/props"} == {"org/toy"}


async def test_a_refused_text_is_answered_as_the_requests_fault() -> None:
    """A text with tokens that the model lacks is refused in words that quote nothing of it, and costs nothing."""
    start, end = await events_of(llama_cpp(), prepared(replace(REQUEST, completion=(END + 9,), positions=(1,))))
    assert start == ResponseStart(400, "application/json")
    assert isinstance(end, ResponseEnd)
    assert b"secret" not in end.tail
    assert b"engine refused" in end.tail


@pytest.mark.parametrize(
    ("engine", "code"),
    [
        (text_only, Code.ENGINE_UNAVAILABLE),
        (lambda: FakeEngine({"/tokenize": lambda _: refused(503), "/apply-template": lambda _: refused(503)}), Code.NODE_BUSY),
        (lambda: FakeEngine(dict.fromkeys(("/tokenize", "/apply-template"), lambda _: refused(500))), Code.ENGINE_UNAVAILABLE),
    ],
)
async def test_an_engine_that_cannot_score_now_is_the_providers_fault(engine: Callable[[], FakeEngine], code: Code) -> None:
    """The client tries another referee."""
    with pytest.raises(Unavailable) as unavailable:
        await events_of(engine(), prepared(REQUEST))
    assert unavailable.value.code is code


async def test_an_engine_that_changed_is_looked_at_again() -> None:
    """An engine that was replaced by one of another kind behind the same address gets the adapter of that one."""
    engine = llama_cpp()
    async with connected(engine) as connection:
        for attempt in range(3):
            if attempt == 1:
                engine.endpoints = ENGINES["SGLang"]().endpoints
            async with aclosing(connection.answer(prepared(REQUEST))) as events:
                if attempt == 1:
                    with pytest.raises(Unavailable):
                        await anext(events)
                else:
                    assert isinstance(await anext(events), ResponseStart)


async def test_a_cancelled_job_stops_the_engines_work() -> None:
    """Closing the answer ends the call under way, and no position is asked for after it."""
    asked, gone = asyncio.Event(), asyncio.Event()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        while await reader.read(1 << 16):
            pass
        gone.set()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    connection = OpenAIEngine(EngineSettings(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    async with server, asyncio.timeout(60):

        async def read() -> None:
            async with aclosing(connection.answer(prepared(REQUEST))) as events:
                await anext(events)

        job = asyncio.create_task(read())
        await asked.wait()
        job.cancel()
        await gone.wait()
        await connection.close()


@pytest.mark.parametrize(
    "changes", [{"positions": [9]}, {"stream": True}, {"top": 50}, {"completion": None}, {"n": 3}, {"messages": None}]
)
def test_requests_out_of_bounds_reach_no_engine(changes: dict[str, Any]) -> None:
    """The node refuses them before any work."""
    with pytest.raises(BadMessage):
        prepared({**REQUEST.to_json(), **changes})


def test_scoring_is_sold_only_where_it_is_declared() -> None:
    """An ask without the feature refuses the route."""
    with pytest.raises(Refusal):
        prepare(RequestHead(SCORES), orjson.dumps(REQUEST.to_json()), OFFER, 0)


def test_what_the_client_orders() -> None:
    """No output is ordered, and the bytes of the request bound its tokens, so that its cap is the price of reading it."""
    summary = summarise(SCORES, orjson.dumps(REQUEST.to_json()))
    assert (summary.output_tokens, summary.bounded, summary.stream) == (0, True, False)
    assert prepared(REQUEST).bounded


@pytest.mark.parametrize("name", ENGINES)
async def test_scoring_is_probed(name: str) -> None:
    """An engine that can score is found out without any setting."""
    engine = ENGINES[name]()
    engine.endpoints["/v1/chat/completions"] = _chat(engine)
    async with serving(engine) as url:
        assert SCORES in (await probe(url, "toy")).features


async def test_an_engine_that_cannot_score_does_not_sell_it() -> None:
    """What the probe did not see is not declared."""
    engine = text_only()
    engine.endpoints["/v1/chat/completions"] = _chat(engine)
    async with serving(engine) as url:
        assert SCORES not in (await probe(url, "toy")).features


def _chat(engine: FakeEngine) -> Callable[[dict[str, Any]], Any]:
    """Chats as engines answer a probe: without messages they are refused."""
    inner = engine.endpoints.get("/v1/chat/completions")

    def chat(body: dict[str, Any]) -> Any:
        if not isinstance(body.get("messages"), list):
            return refused(400)
        document = inner(body) if inner is not None else {"choices": [{"message": {"content": "x"}}]}
        return {**document, "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}

    return chat
