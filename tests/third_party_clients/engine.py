"""An engine with fixed answers that records its requests: words, parallel tool calls, JSON, several choices, logprobs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "bench"
WORDS = ("Hello ", "from ", "the ", "market")
TEXT = "".join(WORDS)
CITIES = ("Paris", "Rome")
DOCUMENT = '{"name": "Ada", "age": 36}'
USAGE = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
VECTOR = [0.5, -0.25]


class Engine:
    """An ASGI app. `asked`: the bodies of all requests, oldest first."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/embeddings", self._embed, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "us"}]})

    async def _embed(self, request: Request) -> Response:
        request_body = await request.json()
        self.asked.append(request_body)
        count = len(request_body["input"]) if isinstance(request_body["input"], list) else 1
        data = [{"object": "embedding", "index": at, "embedding": VECTOR} for at in range(count)]
        return JSONResponse({"object": "list", "model": MODEL, "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}})

    async def _chat(self, request: Request) -> Response:
        request_body = await request.json()
        self.asked.append(request_body)
        if request_body.get("user") == "wrong":
            return JSONResponse({"error": {"message": "no such user", "type": "invalid_request_error", "code": None}}, 400)
        message = _message(request_body)
        if request_body.get("stream"):
            usage = bool((request_body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_stream(message, usage=usage), media_type="text/event-stream")
        reason = "tool_calls" if "tool_calls" in message else "stop"
        logprobs = {"content": [{"token": TEXT, "logprob": -0.5, "bytes": None, "top_logprobs": []}]}
        choices = [
            {"index": at, "message": message, "finish_reason": reason}
            | ({"logprobs": logprobs} if request_body.get("logprobs") else {})
            for at in range(request_body.get("n") or 1)
        ]
        return JSONResponse(_envelope("chat.completion") | {"choices": choices, "usage": USAGE})


def _message(request_body: dict[str, Any]) -> dict[str, Any]:
    wants_tool = request_body.get("tools") and request_body["messages"][-1]["role"] == "user"
    if wants_tool:
        name = request_body["tools"][0]["function"]["name"]
        calls = [
            {"id": f"call_{at}", "type": "function", "function": {"name": name, "arguments": json.dumps({"city": city})}}
            for at, city in enumerate(CITIES)
        ]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": "assistant", "content": DOCUMENT if request_body.get("response_format") else TEXT}


def _envelope(kind: str) -> dict[str, Any]:
    return {"id": "c", "object": kind, "created": 1, "model": MODEL}


async def _stream(message: dict[str, Any], *, usage: bool) -> AsyncIterator[bytes]:
    if calls := message.get("tool_calls"):
        deltas: list[dict[str, Any]] = [{"tool_calls": [{"index": at} | call]} for at, call in enumerate(calls)]
    else:
        deltas = [{"content": word} for word in (WORDS if message["content"] == TEXT else [message["content"]])]
    for delta in ({"role": "assistant", "content": None}, *deltas):
        yield _event([{"index": 0, "delta": delta, "finish_reason": None}])
    yield _event([{"index": 0, "delta": {}, "finish_reason": "tool_calls" if calls else "stop"}])
    if usage:
        yield _event([], usage=USAGE)
    yield b"data: [DONE]\n\n"


def _event(choices: list[dict[str, Any]], **members: object) -> bytes:
    return b"data: " + json.dumps(_envelope("chat.completion.chunk") | {"choices": choices} | members).encode() + b"\n\n"
