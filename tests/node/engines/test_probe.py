"""Probing the capabilities of a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.engines.capabilities import Capabilities
from node.engines.demo import build_app
from node.engines.demo_answer import MODEL
from node.engines.discover import DiscoveredEngine
from node.engines.kinds import EngineKind
from node.engines.probe import UNKNOWN_MODEL, may_generate, model_for_routes, probe
from node.engines.route_probe import IMAGES
from tallystick.protocol.routes import CHAT, EMBEDDINGS, MESSAGES, RESPONSES
from tallystick.runtime.serving import serving

WHOLE = {
    "choices": [{"message": {"content": "a"}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'
COUNTED = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'


@asynccontextmanager
async def engine(**answers: Any) -> AsyncIterator[str]:
    """An engine that refuses unknown options; `answers` maps a member of a request, or a route, to its answer."""

    async def chat(request: Request) -> Response:
        request_body = await request.json()
        if not isinstance(request_body.get("messages"), list):
            return JSONResponse({"error": {"message": "messages must be an array"}}, 400)
        if isinstance(request_body["messages"][0]["content"], list) and not answers.get("images"):
            return JSONResponse({"error": {"message": "image input is not supported"}}, 500)
        extra = request_body.keys() - {"model", "messages", "max_tokens"}
        for name in extra:
            if name not in answers:
                return JSONResponse({"error": {"message": f"unknown {name}"}}, 400)
        if request_body.get("stream"):
            counted = COUNTED if answers.get("stream_options") and "stream_options" in request_body else b""
            return Response(counted + EVENT, media_type="text/event-stream")
        logprobs = {"content": [{"token": "a"}]} if answers.get("logprobs") and "logprobs" in request_body else None
        text = "{" if answers.get("response_format") and "response_format" in request_body else "a"
        ignored = answers.get("tools") == "ignored" or answers.get("images") == "ignored"
        usage = {"prompt_tokens": 9 + (not ignored and len(extra) > 0), "completion_tokens": 1}
        choices = [{"message": {"content": text}, "logprobs": logprobs, "finish_reason": "length"}]
        return JSONResponse({"choices": choices} | ({"usage": usage} if answers.get("counts") else {}))

    def answer_with(document: Any) -> Any:
        async def respond(_: Request) -> Response:
            return document if isinstance(document, Response) else JSONResponse(document)

        return respond

    routes = [Route(path, answer_with(document), methods=["POST"]) for path, document in answers.items() if path.startswith("/")]
    if answers.get("chat", True):
        routes.append(Route("/v1/chat/completions", chat, methods=["POST"]))
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}/v1/"


NO_ABILITIES = ("-tools", "-logprobs", "-json_schema", "-vision")
NO_OTHERS = ("-/v1/completions", "-/v1/embeddings")
BARE = Capabilities(True, False, "no", (*NO_ABILITIES, *NO_OTHERS))


def stated(*features: str) -> Capabilities:
    """BARE, with some features present instead of absent."""
    present = {f"-{feature}": feature for feature in features}
    mixed = tuple(present.get(feature, feature) for feature in NO_ABILITIES)
    return replace(BARE, features=(*mixed, *(f for f in features if f"-{f}" not in NO_ABILITIES), *NO_OTHERS))


def without(feature: str) -> Capabilities:
    """BARE, with one feature that is stated neither way."""
    return replace(BARE, features=tuple(stated for stated in BARE.features if stated != f"-{feature}"))


@pytest.mark.parametrize(
    ("answers", "capabilities"),
    [
        ({}, BARE),
        ({"stream": True}, replace(BARE, streams="yes")),
        ({"stream": True, "stream_options": True}, replace(BARE, streams="usage")),
        ({"stream": True, "stream_options": False}, replace(BARE, streams="yes")),
        ({"tools": True, "response_format": True}, stated("tools", "json_schema")),
        ({"images": True}, stated("vision")),
        ({"tools": True, "counts": True}, stated("tools")),
        ({"tools": "ignored", "counts": True}, without("tools")),
        ({"images": "ignored", "counts": True}, without("vision")),
        ({"response_format": False}, without("json_schema")),
        ({"logprobs": True, "top_logprobs": True}, stated("logprobs")),
        ({"logprobs": False, "top_logprobs": True}, without("logprobs")),
        ({"/v1/completions": WHOLE}, Capabilities(True, True, "no", (*NO_ABILITIES, "-/v1/embeddings"))),
        (
            {"chat": False, EMBEDDINGS: {"data": [{"embedding": [0.5]}]}},
            Capabilities(False, False, "no", ("embeddings", "-/v1/chat/completions", "-/v1/completions")),
        ),
        ({EMBEDDINGS: {"data": []}, "/v1/rerank": []}, BARE),
        ({RESPONSES: {"output": [{}]}, "/v1/rerank": {"results": [{}]}}, stated(RESPONSES, "/v1/rerank")),
        ({MESSAGES: Response(status_code=422), "/v1/images/generations": Response(status_code=400)}, stated(MESSAGES, IMAGES)),
        ({"/v1/audio/speech": Response(b"x", media_type="audio/mpeg")}, stated("/v1/audio/speech")),
        ({"/v1/audio/speech": {"error": "none"}}, BARE),
        ({EMBEDDINGS: JSONResponse({"error": {"message": "Start it with `--embeddings`"}}, 501)}, BARE),
        (
            {"chat": False, "/v1/audio/speech": Response(b"no such voice", 400)},
            Capabilities(False, False, "no", ("/v1/audio/speech", "-/v1/chat/completions", *NO_OTHERS)),
        ),
        ({"chat": False}, Capabilities(False, False, "no")),
    ],
)
async def test_capabilities(answers: dict[str, Any], capabilities: Capabilities) -> None:
    """Only answered options count; refused, ignored and empty ones are absent. Without any route, nothing is known."""
    async with engine(**answers) as url:
        assert await probe(url, "model") == capabilities


async def test_a_probe_that_costs_nothing() -> None:
    """Without permission to generate, every request is invalid and the routes are found all the same."""
    valid: list[object] = []

    async def refuse(request: Request) -> Response:
        body = await request.json()
        members = [body.get(name) for name in ("messages", "prompt", "input", "query", "text_1", "file", "image")]
        valid.extend(member for member in members if isinstance(member, str | list) and member)
        return JSONResponse({"error": {"message": "invalid"}}, 400)

    paths = (CHAT, RESPONSES, EMBEDDINGS, IMAGES)
    async with serving(Starlette(routes=[Route(path, refuse, methods=["POST"]) for path in paths]), "127.0.0.1", 0) as port:
        capabilities = await probe(f"http://127.0.0.1:{port}", "model", generate=False)
    assert capabilities == Capabilities(True, False, "unknown", (RESPONSES, IMAGES, "-/v1/completions"))
    assert valid == []


@pytest.mark.parametrize(("kind", "named"), [(EngineKind.LITELLM, UNKNOWN_MODEL), (EngineKind.VLLM, "model")])
async def test_no_invalid_request_pauses_a_model_of_litellm(kind: EngineKind, named: str) -> None:
    """LiteLLM counts a failed request against the model behind it, so the requests that find its routes name none of them."""
    models: set[object] = set()

    async def refuse(request: Request) -> Response:
        models.add((await request.json())["model"])
        return JSONResponse({"error": {"message": "Invalid model name"}}, 400)

    async with serving(Starlette(routes=[Route(CHAT, refuse, methods=["POST"])]), "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}"
        routes_of = model_for_routes(DiscoveredEngine(url, kind, "1", ()), "model")
        capabilities = await probe(url, "model", generate=False, routes_of=routes_of)
    assert (capabilities.chat, models) == (True, {named})


async def test_a_route_that_only_streams() -> None:
    """A route that answers 404 to a whole answer and not to a stream is served."""

    async def stream_only(request: Request) -> Response:
        return Response(status_code=422 if (await request.json()).get("stream") else 404)

    async with serving(Starlette(routes=[Route(RESPONSES, stream_only, methods=["POST"])]), "127.0.0.1", 0) as port:
        assert RESPONSES in (await probe(f"http://127.0.0.1:{port}", "model", generate=False)).features


@pytest.mark.parametrize("status", [200, 400, 401, 403, 429, 503])
async def test_a_server_that_answers_anything_alike(status: int) -> None:
    """Statuses that do not depend on the route say nothing of it, nor do a refused key and a busy engine."""

    async def answer(_: Request) -> Response:
        return JSONResponse({}, status)

    async with serving(Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])]), "127.0.0.1", 0) as port:
        assert await probe(f"http://127.0.0.1:{port}", "model", generate=False) == Capabilities(True, True, "unknown")


async def test_an_engine_that_answers_nothing_is_not_tried_out() -> None:
    """An engine that drops every connection gets no valid request, for which the node would wait long."""
    requests = []

    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.read(1 << 16))
        writer.close()

    server = await asyncio.start_server(drop, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await probe(f"http://127.0.0.1:{port}/v1", "model") == Capabilities(True, True, "unknown")
    assert not any(b"Hi" in request for request in requests)


async def test_a_busy_engine_is_not_judged() -> None:
    """An engine that has its routes and no time now loses none of them."""

    async def chat(request: Request) -> Response:
        return Response(status_code=503 if (await request.json())["messages"] == [{"role": "user", "content": "Hi"}] else 400)

    routes = [Route(CHAT, chat, methods=["POST"]), Route(RESPONSES, chat, methods=["POST"])]
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        capabilities = await probe(f"http://127.0.0.1:{port}", "model")
    assert capabilities == Capabilities(True, False, "unknown", (RESPONSES, "-/v1/completions", "-/v1/embeddings"))


@pytest.mark.parametrize(
    ("engine_found", "allowed"),
    [
        (DiscoveredEngine("http://127.0.0.1:8000", EngineKind.OTHER, "1", ()), True),
        (DiscoveredEngine("http://localhost:8000", EngineKind.VLLM, "1", (), "key"), True),
        (DiscoveredEngine("http://10.1.2.3:8000/v1", EngineKind.VLLM, "1", ()), True),
        (DiscoveredEngine("http://[fd00::1]:8000/v1", EngineKind.SGLANG, "1", ()), True),
        (DiscoveredEngine("http://vllm:8000/v1", EngineKind.VLLM, "1", ()), True),
        (DiscoveredEngine("http://gpu.local:8000/v1", EngineKind.LLAMA_CPP, "1", ()), True),
        (DiscoveredEngine("http://127.0.0.1:8000", EngineKind.OTHER, "1", (), "key"), False),
        (DiscoveredEngine("http://127.0.0.1:4000", EngineKind.LITELLM, "1", ()), False),
        (DiscoveredEngine("http://127.0.0.1:11434", EngineKind.OLLAMA, "1", ()), False),
        (DiscoveredEngine("https://api.example/v1", EngineKind.OTHER, "1", (), "key"), False),
        (DiscoveredEngine("https://api.example/v1", EngineKind.VLLM, "1", ()), False),
        (DiscoveredEngine("https://8.8.8.8/v1", EngineKind.VLLM, "1", ()), False),
    ],
)
def test_nothing_paid_is_generated_unasked(engine_found: DiscoveredEngine, allowed: bool) -> None:
    """Only an engine of the provider's own, which has its model loaded, is asked to generate."""
    assert may_generate(engine_found) is allowed


async def test_an_engine_that_refuses_max_tokens() -> None:
    """The probe finds the member that limits the output, and uses it for all that follows."""

    async def chat(request: Request) -> Response:
        members = await request.json()
        if not isinstance(members.get("messages"), list):
            return Response(status_code=400)
        if "max_tokens" in members or "stream_options" in members:
            return JSONResponse({"error": {"message": "unsupported parameter"}}, 400)
        if members.get("stream"):
            return Response(EVENT, media_type="text/plain")
        return JSONResponse(WHOLE)

    async with serving(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])]), "127.0.0.1", 0) as port:
        capabilities = await probe(f"http://127.0.0.1:{port}/v1", "model")
    assert capabilities == Capabilities(True, False, "yes", NO_OTHERS, "max_completion_tokens")


async def test_the_demo_engine_and_a_dead_address() -> None:
    """The demo engine streams with usage; nothing is known of a dead address."""
    async with serving(build_app(), "127.0.0.1", 0) as port:
        capabilities = await probe(f"http://127.0.0.1:{port}", MODEL)
    assert (capabilities.chat, capabilities.streams) == (True, "usage")
    assert await probe("http://127.0.0.1:1", "model", seconds=2) == Capabilities(True, True, "unknown")
