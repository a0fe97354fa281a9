"""Anthropic's Messages through the gateway: as they are where a provider has the route, else translated."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tallystick.client.config import Alias, ApiKey, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.messages import Spec
from tallystick.protocol.routes import CHAT, MESSAGES
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import EVENTS, WORDS, FakeMarket, Session
from tests.client.parties import MODEL, Provider

TEXT = "".join(WORDS)
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "What is a tally?"}]}
SERVER_TOOL = {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}
NATIVE_ANSWER = b'{"id":"msg_native","type":"message","role":"assistant","content":[{"type":"text","text":"native"}]}'
NATIVE_STREAM = b'event: message_start\ndata: {"type":"message_start"}\n\nevent: message_stop\ndata: {"type":"message_stop"}\n\n'


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway with these settings."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http,
    ):
        yield http


@pytest.fixture
async def http(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway to a market whose providers have chat completions only."""
    async with gateway(fake, wallet, config) as http:
        yield http


def provider(name: str, *features: str, **changes: Any) -> Provider:
    """A provider that sells these routes besides those that all sell."""
    return Provider.make(name, spec=Spec(features=features), **changes)


def answering(status: int, content_type: str, body: bytes) -> Callable[[Session], Awaitable[None]]:
    """An engine that answers so."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer(status, content_type)
        await session.chunk(body, last=True)
        await session.finish()

    return script


async def native(session: Session) -> None:
    """An engine that has the route."""
    await session.match()
    assert session.head.path == MESSAGES
    stream = session.request.get("stream")
    await session.answer(200, EVENTS if stream else "application/json")
    await session.chunk(NATIVE_STREAM if stream else NATIVE_ANSWER, last=True)
    await session.finish()


def kinds(answer: httpx.Response) -> list[str]:
    """The names of the events of a stream."""
    return [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer in Anthropic's form, whose id is in the header too."""
    document = answer.json()
    assert document["type"] == "error"
    assert document["request_id"] == answer.headers["request-id"]
    error: dict[str, Any] = document["error"]
    return error


async def test_a_whole_answer(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """The provider gets a chat completion, and the caller a message with the market's headers."""
    answer = await http.post(
        f"{MESSAGES}?beta=true", json=BODY, headers={"anthropic-version": "2023-06-01", "anthropic-beta": "x"}
    )
    message = answer.json()
    assert (answer.status_code, message["content"], message["stop_reason"]) == (200, [{"type": "text", "text": TEXT}], "end_turn")
    assert (message["usage"]["input_tokens"], message["usage"]["output_tokens"]) == (10, 5)
    assert fake.last.head.path == CHAT
    assert fake.last.request == {"model": MODEL, "messages": BODY["messages"], "max_tokens": 100}
    job = answer.headers["x-tally-job"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"] == job
    assert message["id"] == f"msg_{job}"
    assert (answer.headers["x-tally-cost"], answer.headers["content-type"]) == ("3", "application/json")
    assert answer.headers["x-tally-receipt"].startswith("0x")


async def test_a_stream(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Usage is asked for; an engine that does not report it has what it billed told."""
    answer = await http.post(MESSAGES, json=BODY | {"stream": True})
    assert answer.headers["content-type"] == EVENTS
    assert answer.headers["request-id"] == answer.headers["x-tally-job"]
    assert kinds(answer) == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * len(WORDS),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert fake.last.request["stream_options"] == {"include_usage": True}
    last = json.loads(answer.text.split("event: message_delta\ndata: ")[1].splitlines()[0])
    assert last["usage"]["output_tokens"] == 5


async def test_an_engine_that_does_not_stream(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """A whole answer to a request for a stream becomes one."""
    whole = json.dumps({"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]}, indent=1).encode()
    fake.script = answering(200, "application/json", whole)
    answer = await http.post(MESSAGES, json=BODY | {"stream": True})
    assert (answer.headers["content-type"], kinds(answer)[-1]) == (EVENTS, "message_stop")
    assert '"text":"a"' in answer.text


async def test_a_provider_with_the_route_gets_the_request_as_it_is(wallet: Signer, config: ClientConfig) -> None:
    """Byte for byte in both directions, and before cheaper ones without the route; also what cannot be translated."""
    fake = FakeMarket(Provider.make("alice", input_price=1, output_price=1), provider("bob", MESSAGES))
    fake.script = native
    async with fake.serve(), gateway(fake, wallet, config) as http:
        for members, expected in (({}, NATIVE_ANSWER), ({"stream": True}, NATIVE_STREAM), (SERVER_TOOL, NATIVE_ANSWER)):
            body = json.dumps(BODY | members, indent=2).encode()
            answer = await http.post(MESSAGES, content=body, headers={"content-type": "application/json"})
            assert (answer.content, answer.headers["x-tally-provider"]) == (expected, fake.providers[1].address)
            assert fake.last.body == body


@pytest.mark.parametrize(
    "refused", [Unavailable(Code.NODE_BUSY, "busy", fault=Fault.PROVIDER), Refusal(Code.NO_PROVIDER, "none fits")]
)
async def test_translated_if_no_provider_with_the_route_is_free(
    refused: Refusal | Unavailable, wallet: Signer, config: ClientConfig
) -> None:
    """Others answer meanwhile. A request that cannot be translated gets the first refusal."""
    fake = FakeMarket(Provider.make("alice"), provider("bob", MESSAGES))
    async with fake.serve(), gateway(fake, wallet, config) as http:
        fake.refusals.append(refused)
        answer = await http.post(MESSAGES, json=BODY)
        assert (answer.status_code, fake.last.head.path) == (200, CHAT)
    async with fake.serve(), gateway(fake, wallet, config) as http:
        fake.refusals.append(refused)
        answer = await http.post(MESSAGES, json=BODY | SERVER_TOOL)
        assert (answer.status_code, error_of(answer)["code"]) == (503, refused.code.value)


async def test_a_limit_above_what_is_sold(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Clients of Messages must set a limit and set it high: the order has the most that is sold, the request stays."""
    answer = await http.post(MESSAGES, json=BODY | {"max_tokens": 64_000})
    assert answer.status_code == 200
    assert fake.last.request["max_tokens"] == 64_000
    assert fake.last.candidate.terms.max_output_tokens == fake.providers[0].ask.message.max_output_tokens
    chat = await http.post(CHAT, json=BODY | {"max_tokens": 64_000})
    assert chat.status_code == 400


async def test_a_repeated_key_is_the_same_job(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Also after a provider with the route came, which would get the request as it is; another request is refused."""
    headers = {"idempotency-key": "k"}
    first = await http.post(MESSAGES, json=BODY, headers=headers)
    fake.providers.append(provider("carol", MESSAGES))
    second = await http.post(MESSAGES, json=BODY, headers=headers)
    assert (first.status_code, second.status_code, len(fake.sessions)) == (200, 409, 1)
    assert "no longer has its answer" in error_of(second)["message"]
    assert first.headers["x-tally-job"] in error_of(second)["message"]
    other = await http.post(MESSAGES, json=BODY | {"max_tokens": 5}, headers=headers)
    assert (other.status_code, "another request" in error_of(other)["message"]) == (409, True)


async def test_a_repeated_request_is_cached(fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path) -> None:
    """The cache has what the caller got: translated, whole and streamed."""
    async with gateway(fake, wallet, replace(config, cache_folder=tmp_path / "cache")) as http:
        for members in ({"temperature": 0}, {"temperature": 0, "stream": True}):
            first, second = [await http.post(MESSAGES, json=BODY | members) for _ in range(2)]
            assert [answer.headers["x-tally-cache"] for answer in (first, second)] == ["miss", "hit"]
            assert (second.content, second.headers["content-type"]) == (first.content, first.headers["content-type"])
            assert second.headers["request-id"] == first.headers["request-id"]
    assert len(fake.sessions) == 2


async def test_a_failed_stream_is_not_cached(fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path) -> None:
    """An error that the engine sent within its stream ends it, and the next request is answered anew."""
    fake.script = answering(200, EVENTS, b'data: {"error":{"message":"lost","code":500}}\n\ndata: [DONE]\n\n')
    async with gateway(fake, wallet, replace(config, cache_folder=tmp_path / "cache")) as http:
        for _ in range(2):
            answer = await http.post(MESSAGES, json=BODY | {"temperature": 0, "stream": True})
            assert (kinds(answer), answer.headers["x-tally-cache"]) == (["error"], "miss")
            assert json.loads(answer.text.split("data: ")[1])["error"]["message"] == "lost"


async def test_an_alias_and_its_fallback(wallet: Signer, config: ClientConfig) -> None:
    """Names such as Claude Code sends can stand for any models; the answer names the model that answered."""
    named = replace(config, aliases=(Alias(name="claude-sonnet-4-5", models=("absent", "small")),))
    async with FakeMarket(Provider.make("alice", model="small")).serve() as fake, gateway(fake, wallet, named) as http:
        answer = await http.post(MESSAGES, json=BODY | {"model": "claude-sonnet-4-5"})
        assert (answer.status_code, fake.last.request["model"]) == (200, "small")


async def test_a_rule_judges_the_chat_completion(wallet: Signer, config: ClientConfig) -> None:
    """A small model's empty answer goes to the larger one, whose answer is translated."""
    fake = FakeMarket(Provider.make("alice", model="small"), Provider.make("bob", model="large"))

    async def script(session: Session) -> None:
        await session.match()
        text = "" if session.request["model"] == "small" else "better"
        choice = {"index": 0, "message": {"content": text}, "finish_reason": "stop"}
        await session.answer()
        await session.chunk(json.dumps({"choices": [choice]}).encode(), last=True)
        await session.finish()

    fake.script = script
    rules = replace(config, aliases=(Alias(name="thrifty", models=("small", "large"), rule="small-model-first"),))
    async with fake.serve(), gateway(fake, wallet, rules) as http:
        answer = await http.post(MESSAGES, json=BODY | {"model": "thrifty"})
        assert answer.json()["content"] == [{"type": "text", "text": "better"}]
        assert answer.headers["x-tally-escalated"].startswith("small;")


async def test_a_rule_accepts_a_message(wallet: Signer, config: ClientConfig) -> None:
    """An answer that was not translated is no chat completion, which the rule could judge."""
    fake = FakeMarket(provider("alice", MESSAGES, model="small"), provider("bob", MESSAGES, model="large"))
    fake.script = native
    rules = replace(config, aliases=(Alias(name="thrifty", models=("small", "large"), rule="small-model-first"),))
    async with fake.serve(), gateway(fake, wallet, rules) as http:
        answer = await http.post(MESSAGES, json=BODY | {"model": "thrifty"})
        assert (answer.content, len(fake.sessions)) == (NATIVE_ANSWER, 1)


# Errors


@pytest.mark.parametrize(
    ("members", "expected", "words"),
    [
        ({"model": "absent"}, (404, "not_found_error"), "absent"),
        ({"model": 3}, (400, "invalid_request_error"), "model"),
        ({"max_tokens": None}, (400, "invalid_request_error"), "max_tokens"),
        ({"messages": []}, (400, "invalid_request_error"), "messages"),
        (SERVER_TOOL, (400, "invalid_request_error"), "tools[0].type"),
    ],
)
async def test_refused_requests(
    members: dict[str, Any], expected: tuple[int, str], words: str, http: httpx.AsyncClient, fake: FakeMarket
) -> None:
    """In Anthropic's form, with the member's name; nothing is ordered."""
    answer = await http.post(MESSAGES, json=BODY | members)
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == expected
    assert words in error["message"]
    assert not fake.submissions


async def test_other_errors_have_the_form_too(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """No key, a body that is too long or no JSON, another method, another route, a model that nobody has."""
    key = ApiKey(label="ann", secret="ann-0123456789abcdef")
    settings = replace(config, api_keys=(key,), max_body_bytes=1_000, max_total_body_bytes=1_000)
    version = {"anthropic-version": "2023-06-01"}
    async with gateway(fake, wallet, settings) as http:
        answer = await http.post(MESSAGES, json=BODY)
        assert (answer.status_code, error_of(answer)["type"]) == (401, "authentication_error")
        http.headers["authorization"] = f"Bearer {key.value}"
        answer = await http.post(MESSAGES, content=b" " * 1_001)
        assert (answer.status_code, error_of(answer)["type"]) == (413, "request_too_large")
        for content in (b"{", b"[]"):
            answer = await http.post(MESSAGES, content=content)
            assert (answer.status_code, error_of(answer)["type"]) == (400, "invalid_request_error")
        for answer in (
            await http.get(MESSAGES),
            await http.post("/v1/messages/batches", json=BODY),
            await http.get("/v1/models/absent", headers=version),
            await http.get("/v2/unknown", headers=version),
        ):
            assert (answer.status_code, error_of(answer)["type"]) == (404, "not_found_error")


async def test_no_provider(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """A market without a free provider is overloaded, and says when to come again."""
    fake.refusals += [Unavailable(Code.NODE_BUSY, "busy", fault=Fault.PROVIDER) for _ in range(4)]
    answer = await http.post(MESSAGES, json=BODY)
    assert (answer.status_code, error_of(answer)["type"]) == (503, "overloaded_error")
    assert (answer.headers["x-should-retry"], "retry-after" in answer.headers) == ("true", True)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error(stream: bool, http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Keeps its status and its words."""
    fake.script = answering(400, "application/json", b'{"error":{"message":"no such user","type":"x"}}')
    answer = await http.post(MESSAGES, json=BODY | {"stream": stream})
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["message"]) == (400, "invalid_request_error", "no such user")
    assert answer.headers["x-tally-job"]


async def test_an_answer_that_is_no_chat_completion(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """The engine is at fault, and the caller does not pay for it twice."""
    fake.script = answering(200, "application/json", b'{"data": []}')
    answer = await http.post(MESSAGES, json=BODY)
    assert (answer.status_code, error_of(answer)["type"], error_of(answer)["fault"]) == (502, "api_error", "engine")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("features", [(), (MESSAGES,)])
async def test_a_stream_that_breaks(features: tuple[str, ...], wallet: Signer, config: ClientConfig) -> None:
    """The last event is the error, translated or not."""
    fake = FakeMarket(provider("alice", *features))

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        chat = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
        await session.chunk(chat if session.head.path == CHAT else NATIVE_STREAM[:59])
        await session.fail(Unavailable(Code.NODE_GONE, "the provider went away", fault=Fault.PROVIDER))

    fake.script = breaks
    async with fake.serve(), gateway(fake, wallet, config) as http:
        answer = await http.post(MESSAGES, json=BODY | {"stream": True})
        assert (answer.status_code, kinds(answer)[0], kinds(answer)[-1]) == (200, "message_start", "error")
        error = json.loads(answer.text.split("event: error\ndata: ")[1])
        assert (error["type"], error["error"]["type"]) == ("error", "overloaded_error")
        assert error["request_id"] == answer.headers["request-id"]


# Routes that the gateway answers by itself


async def test_counted_tokens(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """An estimate that no provider is asked for."""
    answer = await http.post("/v1/messages/count_tokens?beta=true", json={"model": "any", "messages": BODY["messages"]})
    assert (answer.status_code, answer.json()["input_tokens"] > 0, fake.shortlists) == (200, True, [])
    answer = await http.post("/v1/messages/count_tokens", json={"model": "any"})
    assert (answer.status_code, "messages" in error_of(answer)["message"]) == (400, True)


async def test_listed_models(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """In Anthropic's form for its clients, and in OpenAI's for all others."""
    named = replace(config, aliases=(Alias(name="claude-sonnet-4-5", models=(MODEL,)),))
    version = {"anthropic-version": "2023-06-01"}
    async with gateway(fake, wallet, named) as http:
        page = (await http.get("/v1/models?limit=1", headers=version)).json()
        assert (page["has_more"], page["first_id"], page["last_id"], page["data"][0]["type"]) == (True, MODEL, MODEL, "model")
        rest = (await http.get("/v1/models", params={"after_id": MODEL}, headers=version)).json()
        assert [entry["id"] for entry in rest["data"]] == ["claude-sonnet-4-5"]
        assert (await http.get(f"/v1/models/{MODEL}", headers=version)).json()["display_name"] == MODEL
        assert (await http.get("/v1/models")).json()["object"] == "list"
        assert (await http.get("/v1/models?limit=x", headers=version)).status_code == 400
