"""Callers that stream learn their place in the queue, in headers and in comments that come before the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from tallystick.client.config import Alias, ClientConfig
from tallystick.client.gateway import early_stream
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.early_stream import whole_as_stream
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.routes import MESSAGES as MESSAGES_ROUTE
from tallystick.protocol.routes import RESPONSES
from tallystick.protocol.wire import Kind
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import CHAT, JSON, STREAM, WORDS, FakeMarket, Script, Session, completion, honest
from tests.client.parties import MODEL, Provider

TEXT = "".join(WORDS)
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def _no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued stream begins at once."""
    monkeypatch.setattr(early_stream, "NOTICE_AFTER", 0.0)


@pytest.fixture
async def url(market: Market) -> AsyncIterator[str]:
    """A gateway over the market's client."""
    async with serving(build_app(market), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


class Queue:
    """Scripts a job that waits at two places until `release` is set, and then goes on with another script."""

    def __init__(self, then: Script = honest) -> None:
        self.release, self.then = asyncio.Event(), then

    async def __call__(self, session: Session) -> None:
        for place in (QueuePlace(3), QueuePlace(1, 5_200)):
            await session.send(Kind.BEAT, place.dumps())
        await self.release.wait()
        await self.then(session)


@asynccontextmanager
async def _queued(fake: FakeMarket, url: str, queue: Queue, path: str = CHAT, body: Any = STREAM) -> AsyncIterator[Any]:
    """A raw streaming request whose answer has begun with the place of its job, which still waits."""
    fake.script = queue
    async with (
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as http,
        http.stream("POST", path, json=body) as answer,
    ):
        yield answer


async def _rest(answer: httpx.Response, queue: Queue) -> str:
    """Reads up to the first comment while the job still waits, then releases it and reads to the end."""
    parts: list[str] = []
    async for text in answer.aiter_text():
        parts.append(text)
        if "queued" in text:
            queue.release.set()
    return "".join(parts)


async def test_a_stream_begins_while_its_job_waits(fake: FakeMarket, url: str) -> None:
    """Status, headers and a comment come while the job waits; the answer follows, and nothing else is changed."""
    async with _queued(fake, url, queue := Queue()) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        assert int(answer.headers["x-tally-queue-position"]) in (1, 3)
        assert answer.headers["x-tally-job"] == next(iter(fake.sessions)).hex()
        assert answer.headers["cache-control"] == "no-store"
        text = await _rest(answer, queue)
    comments = [line for line in text.splitlines() if line.startswith(":")]
    assert comments[0] in (": queued 3", ": queued 1, about 5 s")
    data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in data) == TEXT
    assert all(line == "" or line.startswith((":", "data: ")) for line in text.splitlines())


async def test_the_official_sdk_reads_through_the_comments(fake: FakeMarket, url: str) -> None:
    """OpenAI's client reads the answer of a job that waited as any other."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as sdk:
        fake.script = queue = Queue()
        stream = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        queue.release.set()
        assert int(stream.response.headers["x-tally-queue-position"]) in (1, 3)
        assert [chunk.choices[0].delta.content async for chunk in stream] == list(WORDS)


@pytest.mark.parametrize("path", [MESSAGES_ROUTE, RESPONSES])
async def test_other_dialects(fake: FakeMarket, url: str, path: str) -> None:
    """Streams of Anthropic's API and of Responses begin early too; every event is of their API."""
    member = "messages" if path == MESSAGES_ROUTE else "input"
    body = {"model": MODEL, member: MESSAGES, "stream": True, "max_tokens": 50}
    async with _queued(fake, url, queue := Queue(), path, body) as answer:
        assert int(answer.headers["x-tally-queue-position"]) in (1, 3)
        queue.release.set()
        text = await _rest(answer, queue)
    kinds = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert (kinds[0], kinds[-1]) in {("message_start", "message_stop"), ("response.created", "response.completed")}
    assert "error" not in kinds


async def test_a_whole_answer_shows_nothing_of_the_queue(fake: FakeMarket, url: str) -> None:
    """A caller that does not stream waits, and gets status, headers and body as without a queue."""
    fake.script = queue = Queue()
    queue.release.set()
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as http:
        answer = await http.post(CHAT, json={name: value for name, value in STREAM.items() if name != "stream"})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == TEXT
    assert "x-tally-queue-position" not in answer.headers


def _fails(error: TallyError) -> Script:
    async def script(session: Session) -> None:
        await session.fail(error)

    return script


async def test_a_failure_after_the_headers_is_an_event(fake: FakeMarket, url: str) -> None:
    """A wait that ends without a slot ends the stream with OpenAI's error event, which the SDK raises."""
    error = Unavailable(Code.NODE_BUSY, "no slot became free within 3 s", fault=Fault.PROVIDER)
    async with _queued(fake, url, queue := Queue(_fails(error))) as answer:
        text = await _rest(answer, queue)
    event = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["error"]
    assert (event["code"], event["retry"]) == ("node_busy", True)
    fake.script = queue = Queue(_fails(error))
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as sdk:
        stream = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        queue.release.set()
        with pytest.raises(openai.APIError, match="no slot became free"):
            await anext(aiter(stream))


async def test_a_failure_before_the_headers_keeps_its_status(fake: FakeMarket, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails soon after the job was queued is an HTTP error with its own status, so that SDKs retry it."""
    monkeypatch.setattr(early_stream, "NOTICE_AFTER", 600.0)
    fake.script = queue = Queue(_fails(Unavailable(Code.NODE_BUSY, "no slot", fault=Fault.PROVIDER)))
    queue.release.set()
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as http:
        answer = await http.post(CHAT, json=STREAM)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true")


@pytest.mark.parametrize("status", [200, 422, 500])
async def test_an_engine_that_does_not_stream(fake: FakeMarket, url: str, status: int) -> None:
    """A whole answer, or an engine's own error, after the headers comes as an event that clients read."""

    async def whole(session: Session) -> None:
        await session.match()
        await session.answer(status, JSON)
        body = completion("hello") if status == 200 else b'{"error": {"message": "too hot", "type": "x", "code": "y"}}'
        await session.chunk(body, last=True)
        await session.finish()

    fake.script = queue = Queue(whole)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as sdk:
        stream = await sdk.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        queue.release.set()
        if status == 200:
            assert [chunk.choices[0].delta.content async for chunk in stream] == ["hello"]
        else:
            with pytest.raises(openai.APIError, match="too hot"):
                await anext(aiter(stream))


async def test_another_model_answers_in_the_same_stream(wallet: Signer, config: ClientConfig) -> None:
    """After the headers, a fallback still answers: no byte of an answer was sent before."""
    first, second = Provider.make("first", model="a"), Provider.make("second", model="b")
    async with FakeMarket(first, second).serve() as fake:

        async def script(session: Session) -> None:
            if session.candidate.terms.model == "a":
                queue = Queue(_fails(Refusal(Code.UNKNOWN_MODEL, "gone", fault=Fault.PROVIDER)))
                queue.release.set()
                await queue(session)
            else:
                await honest(session)

        fake.script = script
        aliases = (Alias(name="either", models=("a", "b")),)
        async with (
            Market(fake.url, wallet, replace(config, aliases=aliases)) as market,
            serving(build_app(market), "127.0.0.1", 0) as port,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as sdk,
        ):
            stream = await sdk.chat.completions.create(model="either", messages=MESSAGES, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == TEXT


async def test_a_caller_that_leaves_ends_its_job(fake: FakeMarket, url: str) -> None:
    """A caller that disconnects while its job waits has the job cancelled."""
    cancelled = asyncio.Event()

    async def script(session: Session) -> None:
        await session.send(Kind.BEAT, QueuePlace(1).dumps())
        await session.cancelled.wait()
        cancelled.set()

    fake.script = script
    async with (
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as http,
        http.stream("POST", CHAT, json=STREAM) as answer,
    ):
        assert answer.status_code == 200
    async with asyncio.timeout(60):
        await cancelled.wait()


def test_documents_that_are_no_completion_pass() -> None:
    """Whatever an engine sent is one event."""
    assert whole_as_stream(b'{"a":\n1}') == b'data: {"a": 1}\n\ndata: [DONE]\n\n'
    assert whole_as_stream(b"no json") == b"data: no json\n\ndata: [DONE]\n\n"
