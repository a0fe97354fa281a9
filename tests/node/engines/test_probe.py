"""Asking a model what it can do."""

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
async def engine(**can: Any) -> AsyncIterator[str]:
    """An engine that refuses what it is not told it can do; `can` maps a member of a request, or a route, to its answer."""

    async def chat(request: Request) -> Response:
        asked = await request.json()
        extra = asked.keys() - {"model", "messages", "max_tokens"}
        for name in extra:
            if name not in can:
                return JSONResponse({"error": {"message": f"unknown {name}"}}, 400)
        if asked.get("stream"):
            counted = COUNTED if can.get("stream_options") and "stream_options" in asked else b""
            return Response(counted + EVENT, media_type="text/event-stream")
        logprobs = {"content": [{"token": "a"}]} if can.get("logprobs") and "logprobs" in asked else None
        return JSONResponse({"choices": [{"message": {"content": "a"}, "logprobs": logprobs, "finish_reason": "length"}]})

    def says(document: Any) -> Any:
        async def respond(_: Request) -> Response:
            return document if isinstance(document, Response) else JSONResponse(document)

        return respond

    routes = [Route(path, says(document), methods=["POST"]) for path, document in can.items() if path.startswith("/")]
    if can.get("chat", True):
        routes.append(Route("/v1/chat/completions", chat, methods=["POST"]))
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}/v1/"


@pytest.mark.parametrize(
    ("can", "found"),
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
async def test_abilities(can: dict[str, Any], found: Capabilities) -> None:
    """Only what was asked for and came counts: an option that is refused, ignored or answered with nothing is not there."""
    async with engine(**can) as url:
        assert await probe(url, "model") == found


async def test_the_stand_in_and_nobody() -> None:
    """The demo's engine streams with usage; where nobody answers nothing is there."""
    async with serving(build_app(), "127.0.0.1", 0) as port:
        found = await probe(f"http://127.0.0.1:{port}", MODEL)
    assert (found.chat, found.streams) == (True, "usage")
    assert await probe("http://127.0.0.1:1", "model", seconds=2) == Capabilities(False, False, "no", ())
