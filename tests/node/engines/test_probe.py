"""Probing the capabilities of a model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.engines.demo import MODEL, build_app
from node.engines.probe import Capabilities, probe
from tallystick.protocol.routes import RESPONSES
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
        extra = request_body.keys() - {"model", "messages", "max_tokens"}
        for name in extra:
            if name not in answers:
                return JSONResponse({"error": {"message": f"unknown {name}"}}, 400)
        if request_body.get("stream"):
            counted = COUNTED if answers.get("stream_options") and "stream_options" in request_body else b""
            return Response(counted + EVENT, media_type="text/event-stream")
        logprobs = {"content": [{"token": "a"}]} if answers.get("logprobs") and "logprobs" in request_body else None
        return JSONResponse({"choices": [{"message": {"content": "a"}, "logprobs": logprobs, "finish_reason": "length"}]})

    def answer_with(document: Any) -> Any:
        async def respond(_: Request) -> Response:
            return document if isinstance(document, Response) else JSONResponse(document)

        return respond

    routes = [Route(path, answer_with(document), methods=["POST"]) for path, document in answers.items() if path.startswith("/")]
    if answers.get("chat", True):
        routes.append(Route("/v1/chat/completions", chat, methods=["POST"]))
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}/v1/"


@pytest.mark.parametrize(
    ("answers", "capabilities"),
    [
        ({}, Capabilities(True, False, "no", ())),
        ({"stream": True}, Capabilities(True, False, "yes", ())),
        ({"stream": True, "stream_options": True}, Capabilities(True, False, "usage", ())),
        ({"stream": True, "stream_options": False}, Capabilities(True, False, "yes", ())),
        ({"tools": True, "response_format": True}, Capabilities(True, False, "no", ("tools", "json_schema"))),
        ({"logprobs": True, "top_logprobs": True}, Capabilities(True, False, "no", ("logprobs",))),
        ({"logprobs": False, "top_logprobs": True}, Capabilities(True, False, "no", ())),
        ({"/v1/completions": WHOLE}, Capabilities(True, True, "no", ())),
        ({"chat": False, "/v1/embeddings": {"data": [{"embedding": [0.5]}]}}, Capabilities(False, False, "no", ("embeddings",))),
        ({"/v1/embeddings": {"data": []}, "/v1/rerank": [], RESPONSES: "text"}, Capabilities(True, False, "no", ())),
        (
            {RESPONSES: {"output": [{}]}, "/v1/rerank": {"results": [{}]}},
            Capabilities(True, False, "no", (RESPONSES, "/v1/rerank")),
        ),
        ({"/v1/audio/speech": Response(b"x", media_type="audio/mpeg")}, Capabilities(True, False, "no", ("/v1/audio/speech",))),
        ({"/v1/audio/speech": {"error": "none"}}, Capabilities(True, False, "no", ())),
        ({"chat": False, "/v1/rerank": Response(b"{", media_type="application/json")}, Capabilities(False, False, "no", ())),
    ],
)
async def test_capabilities(answers: dict[str, Any], capabilities: Capabilities) -> None:
    """Only answered options count; refused, ignored and empty ones are absent."""
    async with engine(**answers) as url:
        assert await probe(url, "model") == capabilities


async def test_an_engine_that_refuses_max_tokens() -> None:
    """The probe finds the member that limits the output, and uses it for all that follows."""

    async def chat(request: Request) -> Response:
        members = await request.json()
        if "max_tokens" in members or "stream_options" in members:
            return JSONResponse({"error": {"message": "unsupported parameter"}}, 400)
        if members.get("stream"):
            return Response(EVENT, media_type="text/plain")
        return JSONResponse(WHOLE)

    async with serving(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])]), "127.0.0.1", 0) as port:
        capabilities = await probe(f"http://127.0.0.1:{port}/v1", "model")
    assert capabilities == Capabilities(True, False, "yes", ("tools", "json_schema"), "max_completion_tokens")


async def test_the_demo_engine_and_a_dead_address() -> None:
    """The demo engine streams with usage; a dead address has no capabilities."""
    async with serving(build_app(), "127.0.0.1", 0) as port:
        capabilities = await probe(f"http://127.0.0.1:{port}", MODEL)
    assert (capabilities.chat, capabilities.streams) == (True, "usage")
    assert await probe("http://127.0.0.1:1", "model", seconds=2) == Capabilities(False, False, "no", ())
