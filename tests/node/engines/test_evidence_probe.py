"""Whether an engine gives log-probabilities with the ids of tokens, and what its answers say without them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.domain.logprob_request import EvidenceSupport, TokenIds
from node.engines.engine_settings import EngineSettings
from node.engines.evidence_probe import gives_evidence
from node.engines.openai_http import OpenAIEngine
from node.engines.probe import probe
from tallystick.protocol.routes import CHAT, COMPLETIONS
from tallystick.runtime.serving import serving
from tests.node.harness import OFFER

Body = dict[str, Any]
Choice = Callable[[str, Body], Body]
"""Adds an engine's members of log-probabilities to the choice of an answer: on this route, to this request."""


def entries(token: Callable[[int], Body]) -> Body:
    """OpenAI's form, in which `token` names a token."""
    best = [token(n) | {"logprob": -0.5 - n} for n in range(5)]
    return {"content": [best[0] | {"top_logprobs": best}]}


def llama_cpp(path: str, body: Body) -> Body:
    """The member `id` on both routes; null without, on completions alone."""
    if body.get("logprobs"):
        return {"logprobs": entries(lambda n: {"id": n, "token": "a", "bytes": [97]})}
    return {} if path == CHAT else {"logprobs": None}


def vllm(path: str, body: Body) -> Body:
    """Texts, or "token_id:N" on request; null without."""
    if not body.get("logprobs"):
        return {"logprobs": None}
    named = body.get("return_tokens_as_token_ids")
    if path == CHAT:
        return {"logprobs": entries(lambda n: {"token": f"token_id:{n}" if named else "a", "bytes": [97]})}
    names = [f"token_id:{n}" if named else "abcde"[n] for n in range(5)]
    best = [dict(zip(names, (-0.5, -1.0, -1.5, -2.0, -2.5), strict=True))]
    return {"logprobs": {"text_offset": [0], "tokens": names[:1], "token_logprobs": [-0.5], "top_logprobs": best}}


def ollama(path: str, body: Body) -> Body:
    """Texts, whatever is asked for."""
    return {"logprobs": entries(lambda _: {"token": "a", "bytes": [97]})} if path == CHAT and body.get("logprobs") else {}


def few(path: str, body: Body) -> Body:
    """Ids without any other token."""
    answer = llama_cpp(path, body)
    if answer.get("logprobs"):
        answer["logprobs"]["content"][0]["top_logprobs"] = []
    return answer


def ignoring(_path: str, _body: Body) -> Body:
    """An engine that ignores the request."""
    return {"logprobs": None}


@asynccontextmanager
async def engine(choice: Choice, *, refuses: str = "") -> AsyncIterator[str]:
    """An engine; `refuses`: the member that it answers 400 to."""

    async def answer(request: Request) -> Response:
        body, path = await request.json(), request.url.path
        if not isinstance(body.get("messages" if path == CHAT else "prompt"), list | str):
            return JSONResponse({"error": {"message": "invalid"}}, 400)
        if refuses and refuses in body:
            return JSONResponse({"error": {"message": f"unknown {refuses}"}}, 400)
        member = "delta" if body.get("stream") else "message"
        text: Body = {member: {"content": "a"}} if path == CHAT else {"text": "a"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        document = {"choices": [{"index": 0, **text, **choice(path, body), "finish_reason": "length"}], "usage": usage}
        if not body.get("stream"):
            return JSONResponse(document)
        return Response(b"data: " + orjson.dumps(document) + b"\n\ndata: [DONE]\n\n", media_type="text/event-stream")

    routes = [Route(path, answer, methods=["POST"]) for path in (CHAT, COMPLETIONS)]
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("choice", "refuses", "support"),
    [
        (llama_cpp, "", EvidenceSupport(TokenIds.MEMBER, TokenIds.MEMBER, null_in_completions=True)),
        (vllm, "", EvidenceSupport(TokenIds.TEXT, TokenIds.TEXT, True, True, True)),
        (ollama, "", None),
        (few, "", None),
        (ignoring, "", None),
        (llama_cpp, "logprobs", None),
        (vllm, "return_tokens_as_token_ids", None),
        (llama_cpp, "top_logprobs", EvidenceSupport(None, TokenIds.MEMBER, null_in_completions=True)),
    ],
)
async def test_engines(choice: Choice, refuses: str, support: EvidenceSupport | None) -> None:
    """Known by what they answer, and not by what they say they are. A doctor's smaller trial agrees on chats."""
    async with engine(choice, refuses=refuses) as url:
        assert (await probe(url, "model")).evidence == support
        adapter = OpenAIEngine(EngineSettings(url))
        try:
            assert await gives_evidence(adapter, replace(OFFER, upstream="model")) is bool(support and support.chat)
        finally:
            await adapter.close()


async def test_an_engine_that_is_not_tried_out() -> None:
    """A hosted API charges for each answer, so nothing is known of its log-probabilities."""
    async with engine(llama_cpp) as url:
        assert (await probe(url, "model", generate=False)).evidence is None


async def test_an_engine_that_is_down() -> None:
    """A doctor's trial of an engine that answers nothing says no."""
    adapter = OpenAIEngine(EngineSettings("http://127.0.0.1:1"))
    try:
        assert not await gives_evidence(adapter, OFFER)
    finally:
        await adapter.close()
