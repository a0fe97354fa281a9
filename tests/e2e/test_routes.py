"""Every kind of route through the whole market, with the official OpenAI SDK against an engine that has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from scripts.relay import processes
from tallystick.protocol.wire import dumps
from tallystick.runtime.multipart import read_field
from tallystick.runtime.serving import serving
from tests.e2e.extra_node import node_beside

SPEECH = bytes(range(256)) * 300
USAGE = {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13}


def _response(text: str, status: str = "completed") -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    output = [{"type": "message", "id": "m", "status": status, "role": "assistant", "content": content}]
    return {
        "id": "resp", "object": "response", "created_at": 1, "model": "engine/all", "status": status, "error": None,
        "output": output, "usage": USAGE, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
    }  # fmt: skip


def _engine() -> Starlette:
    """An engine with every kind of route, which names its model engine/all."""

    async def models(_: Request) -> Response:
        return JSONResponse({"data": [{"id": "engine/all"}]})

    async def responses(request: Request) -> Response:
        asked = await request.json()
        assert (asked["model"], asked["max_output_tokens"]) == ("engine/all", 50)
        if not asked.get("stream"):
            return JSONResponse(_response(f"heard {asked['input']}"))
        words = ["heard ", *asked["input"].split()]
        events: list[dict[str, Any]] = [{"type": "response.created", "response": _response("", "in_progress")}]
        events += [{"type": "response.output_text.delta", "delta": word, "item_id": "m"} for word in words]
        events.append({"type": "response.completed", "response": _response("".join(words))})
        lines = [f"event: {e['type']}\n".encode() + b"data: " + dumps(e | {"sequence_number": 0}) + b"\n\n" for e in events]
        return StreamingResponse(_paced(lines), media_type="text/event-stream")

    async def rerank(request: Request) -> Response:
        asked = await request.json()
        ranks = [{"index": i, "relevance_score": 1 / (i + 1)} for i in range(len(asked["documents"]))]
        return JSONResponse({"results": ranks, "usage": {"total_tokens": 7}})

    async def speech(request: Request) -> Response:
        assert (await request.json())["voice"] == "alloy"
        return Response(SPEECH, media_type="audio/mpeg")

    async def transcriptions(request: Request) -> Response:
        kind, body = request.headers["content-type"], await request.body()
        assert read_field(kind, body, "model") == "engine/all"
        assert SPEECH in body
        return JSONResponse({"text": "a long tone", "usage": {"type": "tokens", **USAGE}})

    async def images(request: Request) -> Response:
        asked = await request.json()
        return JSONResponse({"created": 1, "data": [{"b64_json": "aGk="}] * asked["n"], "usage": USAGE})

    post = {
        "/v1/responses": responses,
        "/v1/rerank": rerank,
        "/v1/audio/speech": speech,
        "/v1/audio/transcriptions": transcriptions,
        "/v1/images/generations": images,
    }
    return Starlette(routes=[Route("/v1/models", models), *(Route(path, to, methods=["POST"]) for path, to in post.items())])


async def _paced(lines: list[bytes]) -> AsyncIterator[bytes]:
    for line in lines:
        yield line
        await asyncio.sleep(0.01)


ENGINES = """
[[engines]]
url = "URL"
[[engines.models]]
name = "engine/all"
sell_as = "all"
input_price = "1"
output_price = "1"
"""


async def test_every_kind_of_route(tmp_path: Path) -> None:
    """Responses (also streamed), rankings, speech, transcriptions and images are sold without being named in the settings. They
    reach the engine, come back as they are, and are billed by the engine's count or by the stated rule.
    """
    folder = tmp_path / "market"
    async with (
        processes.upstream() as mock,
        processes.market(folder, mock) as site,
        serving(_engine(), "127.0.0.1", 0) as port,
        node_beside(folder, site, ENGINES.replace("URL", f"http://127.0.0.1:{port}"), model="all"),
        AsyncOpenAI(base_url=f"{site.gateway}/v1", api_key="unused", max_retries=0) as client,
        httpx.AsyncClient(base_url=site.gateway, trust_env=False) as http,
    ):
        raw = await client.responses.with_raw_response.create(model="all", input="you", max_output_tokens=50)
        assert (raw.parse().output_text, raw.parse().model) == ("heard you", "all")
        assert raw.headers["x-tally-cost"] == "13"
        deltas, final = [], None
        async for event in await client.responses.create(model="all", input="me too", max_output_tokens=50, stream=True):
            if event.type == "response.output_text.delta":
                deltas.append(event.delta)
            elif event.type == "response.completed":
                final = event.response
        assert deltas == ["heard ", "me", "too"]
        assert final is not None
        assert (final.model, final.usage and final.usage.output_tokens) == ("all", 4)

        ranks = await http.post("/v1/rerank", json={"model": "all", "query": "q", "documents": ["a", "b"]})
        assert ([rank["index"] for rank in ranks.json()["results"]], ranks.headers["x-tally-cost"]) == ([0, 1], "7")
        speech = await client.audio.speech.create(model="all", input="hello", voice="alloy")
        assert (speech.content, speech.response.headers["content-type"]) == (SPEECH, "audio/mpeg")
        heard = await client.audio.transcriptions.with_raw_response.create(model="all", file=("a.mp3", SPEECH))
        assert (heard.parse().text, heard.headers["x-tally-cost"]) == ("a long tone", "13")
        drawn = await client.images.generate(model="all", prompt="a stick", n=2)
        assert [picture.b64_json for picture in drawn.data or []] == ["aGk="] * 2

        for absent in ("chat/completions", "embeddings"):
            request = {"model": "all", "input": "x", "messages": [{"role": "user", "content": "x"}]}
            assert (await http.post(f"/v1/{absent}", json=request)).status_code == 404
        refused = await http.post("/v1/moderations", json={"model": "all", "input": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_route")
        assert "serves /v1/moderations" in refused.text
