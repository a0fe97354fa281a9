from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from node.domain.requests import EngineRequest
from node.domain.upstream_models import UpstreamModel
from node.engines.engine_settings import EngineSettings
from node.engines.openai_http import OpenAIEngine
from node.ports import EngineEvent, EngineLoad, ResponseEnd, ResponsePart, ResponseStart
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.routes import CHAT, EMBEDDINGS, RESPONSES
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import dumps, loads
from tests.node.engines.raw import ConnectionHandler, Write, answers_then_hangs, answers_with, head, raw_server

STREAM = EngineRequest(CHAT, b'{"stream": true}', stream=True, strip_usage=True, rename=None)
WHOLE = EngineRequest(CHAT, b"{}", stream=False, strip_usage=False, rename=None)
SMALL = {"max_event_bytes": 1_000, "max_answer_bytes": 2_000, "connect_seconds": 1.0, "check_seconds": 0.2}
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
WORD = b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'
STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


async def ask(handler: ConnectionHandler, request: EngineRequest = STREAM) -> list[EngineEvent]:
    """All events of one answer."""
    async with raw_server(handler) as server:
        engine = OpenAIEngine(EngineSettings(server.url, **SMALL))  # type: ignore[arg-type]
        try:
            async with asyncio.timeout(60), aclosing(engine.answer(request)) as events:
                return [event async for event in events]
        finally:
            await engine.close()


async def fault(handler: ConnectionHandler, request: EngineRequest = STREAM) -> Unavailable:
    """The error with which an answer ends."""
    with pytest.raises(Unavailable) as caught:
        await ask(handler, request)
    assert caught.value.fault is Fault.ENGINE
    return caught.value


def body(events: list[EngineEvent]) -> bytes:
    """The bytes that a client would see."""
    return b"".join(e.data if isinstance(e, ResponsePart) else e.tail for e in events if not isinstance(e, ResponseStart))


async def test_a_stream_passes_through() -> None:
    """Events come out unchanged, with output marked and without the usage event that the client did not ask for."""
    events = await ask(answers_with(head(), ROLE, WORD + WORD[:20], WORD[20:] + STOP, USAGE + DONE))
    assert events[0] == ResponseStart(200, "text/event-stream")
    assert events[-1] == ResponseEnd(DONE, usage=ReportedUsage(5, 0, 2))
    assert body(events) == ROLE + WORD * 2 + STOP + DONE
    assert sum(event.text_bytes for event in events if isinstance(event, ResponsePart)) == 8


async def test_usage_stays_for_a_client_that_asked() -> None:
    """A client that asked for usage itself gets its event."""
    request = EngineRequest(CHAT, b"{}", stream=True, strip_usage=False, rename=None)
    assert USAGE in body(await ask(answers_with(head(), WORD, STOP, USAGE, DONE), request))


async def test_role_and_empty_deltas_are_no_output() -> None:
    """A part without visible output is marked as such, so that failover stays possible."""
    seen = asyncio.Event()

    async def handler(write: Write) -> None:
        await write(head() + b": ping\n\n" + ROLE + STOP[:10])
        await seen.wait()
        await write(STOP[10:] + DONE)

    async with raw_server(handler) as server:
        engine = OpenAIEngine(EngineSettings(server.url))
        async with aclosing(engine.answer(STREAM)) as events:
            await anext(events)
            first = await anext(events)
            assert isinstance(first, ResponsePart)
            assert (first.has_output, first.data) == (False, b": ping\n\n" + ROLE)
            seen.set()
            second = await anext(events)
            assert isinstance(second, ResponsePart)
            assert second.has_output
        await engine.close()


async def test_a_stream_may_end_without_done() -> None:
    """A stream that closes after its finish reason is complete."""
    events = await ask(answers_with(head(), WORD, STOP.replace(b"stop", b"length")))
    assert events[-1] == ResponseEnd(truncated=True)


async def test_model_names_are_mapped_back() -> None:
    """The client sees the model name that it ordered, in events and in whole answers."""
    request = EngineRequest(CHAT, b"{}", stream=True, strip_usage=True, rename=("org/model", "model"))
    named = b'data: {"model":"org/model","choices":[{"delta":{"content":"a"}}]}\n\n'
    events = await ask(answers_with(head(), named, STOP, DONE), request)
    assert b"org/model" not in body(events)
    whole = {"model": "org/model", "choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}
    request = EngineRequest(CHAT, b"{}", stream=False, strip_usage=False, rename=("org/model", "model"))
    events = await ask(answers_with(head(200, "application/json"), dumps(whole)), request)
    assert loads(body(events), "answer")["model"] == "model"


async def test_whole_answers() -> None:
    """A whole answer is read for its usage, its text and its finish reason; embeddings have no choices."""
    document = {
        "choices": [{"message": {"content": "four"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }
    events = await ask(answers_with(head(200, "application/json"), dumps(document)), WHOLE)
    assert events == [
        ResponseStart(200, "application/json"),
        ResponseEnd(dumps(document), 4, ReportedUsage(3, 0, 1), truncated=True),
    ]
    request = EngineRequest(EMBEDDINGS, b"{}", stream=False, strip_usage=False, rename=None)
    vectors = dumps({"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    events = await ask(answers_with(head(200, "application/json"), vectors), request)
    assert events[1] == ResponseEnd(vectors, usage=ReportedUsage(3, 0, 0))


def _other(path: str, *, stream: bool = False, rename: tuple[str, str] | None = None) -> EngineRequest:
    return EngineRequest(path, b"{}", stream=stream, strip_usage=False, rename=rename)


def _event(kind: str, **members: object) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + dumps({"type": kind} | members) + b"\n\n"


async def test_a_streamed_response() -> None:
    """OpenAI's Responses API: output starts with the first delta, the last event has the usage, and no [DONE] follows."""
    request = _other(RESPONSES, stream=True, rename=("org/model", "model"))
    created = _event("response.created", response={"model": "org/model", "status": "in_progress"})
    added = _event("response.output_item.added", item={"type": "message"})
    words = [_event("response.output_text.delta", delta=word) for word in ("four", "five")]
    usage = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 2}
    done = _event("response.completed", response={"model": "org/model", "status": "completed", "usage": usage})
    sent: list[bytes] = []

    async def handler(write: Write) -> None:
        for part in (head(), created, added, *words, done):
            await write(part)
            await asyncio.sleep(0.02)

    events = await ask(handler, request)
    sent = [event.data for event in events if isinstance(event, ResponsePart)]
    assert [(event.has_output, event.text_bytes) for event in events if isinstance(event, ResponsePart)] == [
        (False, 0), (False, 0), (True, 4), (True, 4), (True, 0)
    ]  # fmt: skip
    assert b"org/model" not in b"".join(sent)
    assert b"event: response.created\n" in sent[0]
    assert sent[2:4] == words
    assert events[-1] == ResponseEnd(usage=ReportedUsage(9, 4, 2))
    limited = _event("response.incomplete", response={"status": "incomplete", "usage": usage})
    assert (await ask(answers_with(head(), *words, limited), _other(RESPONSES, stream=True)))[-1] == ResponseEnd(
        usage=ReportedUsage(9, 4, 2), truncated=True
    )


@pytest.mark.parametrize(
    "parts",
    [
        (_event("response.output_text.delta", delta="x"),),
        (_event("error", message="x"),),
        (_event("response.failed", response={"status": "failed"}),),
        (_event("response.completed", response={"status": "completed", "error": None}, error={"message": "x"}),),
    ],
    ids=["cut off", "error", "failed", "error in an end"],
)
async def test_a_response_that_fails(parts: tuple[bytes, ...]) -> None:
    """A response that is cut off or reports a failure is a broken answer."""
    with pytest.raises(Unavailable) as caught:
        await ask(answers_with(head(), *parts), _other(RESPONSES, stream=True))
    assert caught.value.code is Code.ENGINE_UNAVAILABLE


async def test_a_response_in_one_piece() -> None:
    """Text, usage and end of a whole response are read, and the model's name is mapped back."""
    output = [{"type": "message", "content": [{"type": "output_text", "text": "four"}]}]
    document = {"model": "org/model", "status": "incomplete", "error": None, "output": output}
    usage = {"usage": {"input_tokens": 3, "output_tokens": 1}}
    request = _other(RESPONSES, rename=("org/model", "model"))
    (_, end) = await ask(answers_with(head(200, "application/json"), dumps(document | usage)), request)
    assert end == ResponseEnd(dumps(document | usage | {"model": "model"}), 4, ReportedUsage(3, 0, 1), truncated=True)


async def test_answers_that_are_not_completions() -> None:
    """Ranks report usage as a total; speech passes through as bytes, and so does a stream of unknown events."""
    ranks = dumps({"results": [{"index": 0, "relevance_score": 0.5}], "usage": {"total_tokens": 7}})
    (_, end) = await ask(answers_with(head(200, "application/json"), ranks), _other("/v1/rerank"))
    assert end == ResponseEnd(ranks, usage=ReportedUsage(7, 0, 0))
    speech = await ask(answers_with(head(200, "audio/mpeg"), b"\xff\xfb" * 500), _other("/v1/audio/speech"))
    assert speech[0] == ResponseStart(200, "audio/mpeg")
    assert (body(speech), speech[-1]) == (b"\xff\xfb" * 500, ResponseEnd())
    assert all(event.has_output for event in speech if isinstance(event, ResponsePart))
    parts = [_event("image_generation.partial_image", b64_json="aaaa"), b"data: 1\n\n"[:0]]
    streamed = await ask(answers_with(head(), *parts), _other("/v1/images/generations", stream=True))
    assert (body(streamed), streamed[-1]) == (parts[0], ResponseEnd())
    with pytest.raises(Unavailable):
        await ask(answers_with(head(200, "audio/mpeg"), bytes(3_000)), _other("/v1/audio/speech"))
    with pytest.raises(Unavailable):
        await ask(answers_with(head(200, "audio/mpeg"), b"x"), _other("/v1/images/generations", stream=True))


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_the_clients_fault_is_passed_on(status: int) -> None:
    """A request that every provider would refuse gets the engine's own status and body."""
    error = b'{"error": {"message": "context too long"}}'
    events = await ask(answers_with(head(status, "application/json"), error))
    assert events == [ResponseStart(status, "application/json"), ResponseEnd(error)]


@pytest.mark.parametrize("status", [408, 429, 503])
async def test_a_busy_engine_is_busy(status: int) -> None:
    """A busy engine is not a broken engine."""
    assert (await fault(answers_with(head(status), b"later"))).code is Code.NODE_BUSY


@pytest.mark.parametrize("status", [401, 402, 403, 404, 500, 502])
async def test_the_providers_faults_are_not_the_clients(status: int) -> None:
    """A wrong key, a missing model or a crash is the engine's fault. Only what may pass by itself is worth another try."""
    error = await fault(answers_with(head(status), b"secret details"))
    assert (error.code, error.retry) == (Code.ENGINE_UNAVAILABLE, status >= 500)
    assert "secret" not in str(error)
    assert (error.private_reason is None) is (status in (401, 402, 403)), "an API tells of the provider's key or account"


BAD_STREAMS: dict[str, ConnectionHandler] = {
    "cut off before any end": answers_with(head(), ROLE, WORD),
    "half an SSE line": answers_with(head(), WORD, b'data: {"choices":[{"del'),
    "half an SSE line after the end": answers_with(head(), WORD, STOP, b"data: [DO"),
    "invalid JSON": answers_with(head(), WORD, b"data: {broken\n\n", DONE),
    "an error in mid-stream": answers_with(head(), WORD, b'data: {"error":{"message":"oom"}}\n\n', DONE),
    "10 MB without a newline": answers_with(head(), b"data: " + b"x" * 10_000_000),
    "10 MB in one event": answers_with(head(), b"data: " + b"x" * 10_000_000 + b"\n\n"),
    "a redirect": answers_with(head(302, "text/html", "location: http://127.0.0.1:1/")),
    "the wrong content type": answers_with(head(200, "text/html"), b"<html>"),
    "JSON instead of a stream": answers_with(head(200, "application/json"), b"{}"),
    "an end without an answer": answers_with(head(), ROLE, DONE),
    "nothing": answers_with(),
    "no HTTP": answers_with(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "a broken chunk size": answers_with(head(200, "text/event-stream", "transfer-encoding: chunked"), b"zz\r\n" + WORD),
    "fewer bytes than promised": answers_with(head(200, "text/event-stream", "content-length: 1000"), WORD + STOP),
    "endless headers": answers_with(b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 100_000 + b"\r\n\r\n"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
async def test_a_misbehaving_engine_has_a_named_fault(name: str) -> None:
    """Every misbehaviour of a streaming engine becomes an unavailable engine, never a crash or an answer."""
    assert (await fault(BAD_STREAMS[name])).code is Code.ENGINE_UNAVAILABLE


BAD_ANSWERS: dict[str, ConnectionHandler] = {
    "invalid JSON": answers_with(head(200, "application/json"), b'{"choices":'),
    "no choice": answers_with(head(200, "application/json"), b'{"choices":[]}'),
    "an error with status 200": answers_with(head(200, "application/json"), b'{"error":"no"}'),
    "too long": answers_with(head(200, "application/json"), b'"' + b"x" * 3_000 + b'"'),
    "a stream that was cut off instead of JSON": answers_with(head(), WORD),
    "too long an error": answers_with(head(400, "application/json"), b"x" * 100_000),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_a_misbehaving_answer_has_a_named_fault(name: str) -> None:
    """Every misbehaviour of a whole answer becomes an unavailable engine, too."""
    assert (await fault(BAD_ANSWERS[name], WHOLE)).code is Code.ENGINE_UNAVAILABLE


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://localhost:1", "Connection refused"),
        ("http://no-such-host.invalid", "its host name has no address"),
    ],
)
async def test_an_engine_that_cannot_be_reached(url: str, cause: str) -> None:
    """It is an unavailable engine, for a reason that does not name its address to clients."""
    engine = OpenAIEngine(EngineSettings(url, connect_seconds=50.0))
    with pytest.raises(Unavailable) as caught:
        await anext(engine.answer(STREAM))
    assert str(caught.value).endswith(f"the engine cannot be reached: {cause}")
    await engine.close()


async def test_an_engine_that_closes_the_connection() -> None:
    """The reason says so."""
    assert str(await fault(answers_with())).endswith("cannot be reached: it closed the connection")


@pytest.mark.parametrize(("deaf", "answered"), [(False, True), (True, False)])
async def test_a_silently_closed_connection(deaf: bool, answered: bool) -> None:
    """A request on a connection that the engine had closed is repeated on a new one; if that fails too, it fails."""
    heard: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        if not (deaf and heard):
            heard.append(1)
            answer = b'{"choices":[{"message":{"content":"word"},"finish_reason":"stop"}]}'
            writer.write(b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer) + answer)
            await reader.read(1)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    engine = OpenAIEngine(EngineSettings(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    try:
        async with asyncio.timeout(60):
            assert isinstance([event async for event in engine.answer(WHOLE)][-1], ResponseEnd)
            if answered:
                assert isinstance([event async for event in engine.answer(WHOLE)][-1], ResponseEnd)
                assert len(heard) == 2
            else:
                with pytest.raises(Unavailable):
                    _ = [event async for event in engine.answer(WHOLE)]
    finally:
        await engine.close()
        server.close()


async def test_a_stopped_answer_stops_the_engine() -> None:
    """Closing an answer before its end closes the connection, which stops the engine."""
    async with raw_server(answers_then_hangs(head(), WORD)) as server:
        engine = OpenAIEngine(EngineSettings(server.url))
        async with aclosing(engine.answer(STREAM)) as events:
            assert await anext(events) == ResponseStart(200, "text/event-stream")
            assert isinstance(await anext(events), ResponsePart)
        async with asyncio.timeout(60):
            await server.left.wait()
        await engine.close()


async def test_on_sent_is_called_before_the_answer() -> None:
    """The callback runs once the request was sent, which may be long before the first byte of the answer."""
    heard = asyncio.Event()
    async with raw_server(answers_then_hangs()) as server:
        engine = OpenAIEngine(EngineSettings(server.url))
        answer = engine.answer(replace(STREAM, on_sent=heard.set))
        first = asyncio.create_task(anext(answer))
        async with asyncio.timeout(60):
            await heard.wait()
        assert not first.done()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await answer.aclose()
        await engine.close()


async def test_on_sent_is_not_called_without_a_connection() -> None:
    """Without a connection nothing was sent, and a client that cancels meanwhile owes nothing."""
    heard: list[bool] = []
    engine = OpenAIEngine(EngineSettings("http://127.0.0.1:1"))
    with pytest.raises(Unavailable):
        await anext(engine.answer(replace(STREAM, on_sent=lambda: heard.append(True))))
    await engine.close()
    assert not heard


async def test_done_ends_the_answer() -> None:
    """After [DONE] an answer is over, even if the engine keeps the connection open."""
    assert (await ask(answers_then_hangs(head(), WORD, STOP, DONE)))[-1] == ResponseEnd(DONE)


async def test_the_key_goes_to_the_engine_and_is_not_shown() -> None:
    """The API key is sent as a bearer token to the configured address, and appears in no representation."""
    async with raw_server(answers_with(head(), WORD, STOP, DONE)) as server:
        settings = EngineSettings(server.url + "/v1/", "s3cret")
        engine = OpenAIEngine(settings)
        async with aclosing(engine.answer(STREAM)) as events:
            assert [event async for event in events]
        await engine.close()
    request = server.requests[0]
    assert request.startswith(b"POST /v1/chat/completions HTTP/1.1")
    assert b"Bearer s3cret" in request
    assert request.endswith(STREAM.body)
    assert "s3cret" not in repr(settings)


async def test_models_are_the_health_check() -> None:
    """The model list is the health check; an endpoint without a list is healthy and has no models."""

    async def models(handler: ConnectionHandler) -> tuple[UpstreamModel, ...]:
        async with raw_server(handler) as server:
            engine = OpenAIEngine(EngineSettings(server.url, **SMALL))  # type: ignore[arg-type]
            try:
                return await engine.models()
            finally:
                await engine.close()

    listed = dumps({"data": [{"id": "a"}]})
    assert await models(answers_with(head(200, "application/json"), listed)) == (UpstreamModel("a"),)
    assert await models(answers_with(head(404), b"not found")) == ()
    for bad in (
        answers_with(head(500)),
        answers_with(head(200, "text/html"), b"<html>"),
        answers_then_hangs(),
        answers_with(head(307)),
    ):
        with pytest.raises(Unavailable):
            await models(bad)


@pytest.mark.parametrize(
    ("metrics", "load"),
    [
        (b'vllm:num_requests_waiting{model_name="m"} 3\nvllm:kv_cache_usage_perc{model_name="m"} 0.5\n', EngineLoad(3, 0.5)),
        (b"sglang:num_queue_reqs 0.0\nsglang:token_usage 0.97\n", EngineLoad(0, 0.97)),
        (b"# TYPE llamacpp:requests_deferred gauge\nllamacpp:requests_deferred 2\n", EngineLoad(2)),
        (b"tgi_queue_size 1\n", EngineLoad(1)),
        (b"process_cpu_seconds_total 1\n", None),
        (b"{}", None),
        (b"\xff\xfe", None),
    ],
)
async def test_engine_load(metrics: bytes, load: EngineLoad | None) -> None:
    """Waiting requests and KV cache use are read from the engine's metrics; other metrics give no load."""
    async with raw_server(answers_with(head(200, "text/plain"), metrics)) as server:
        engine = OpenAIEngine(EngineSettings(server.url))
        assert await engine.load() == load
        await engine.close()


async def test_an_engine_without_metrics_is_not_asked_again() -> None:
    """One refusal is final; a failure is not."""
    async with raw_server(answers_with(head(404, "text/html"), b"no")) as server:
        engine = OpenAIEngine(EngineSettings(server.url))
        assert [await engine.load(), await engine.load()] == [None, None]
        assert len(server.requests) == 1
        await engine.close()
    engine = OpenAIEngine(EngineSettings(server.url))
    assert await engine.load() is None
    await engine.close()


def test_a_crowded_engine() -> None:
    """An engine is crowded if one more request would wait."""
    assert [EngineLoad(0, 0.5).has_queue, EngineLoad(0).has_queue] == [False, False]
    assert [EngineLoad(1).has_queue, EngineLoad(0, 0.96).has_queue] == [True, True]
