from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from node.answers import UpstreamModel
from node.engines.demo import MODEL, build_app
from node.engines.discover import Finding, Kind, discover, look
from node.engines.openai_http import EngineSettings
from tallystick.protocol.errors import Unavailable
from tallystick.runtime.serving import serving
from tests.node.engines.raw import head, raw_server, says, then_hangs

Serve = Callable[..., AbstractAsyncContextManager[str]]
NOWHERE = "http://127.0.0.1:1"


@asynccontextmanager
async def engine(owner: str = "me", key: str | None = None, **endpoints: dict[str, Any]) -> AsyncIterator[str]:
    """A server that lists one model, owned by `owner`, and answers these endpoints (slashes as underscores)."""

    def answer(document: dict[str, Any]) -> Callable[[Request], Any]:
        async def respond(request: Request) -> JSONResponse:
            allowed = key is None or request.headers.get("authorization") == f"Bearer {key}"
            return JSONResponse(document if allowed else {}, 200 if allowed else 401)

        return respond

    models = {"data": [{"id": "model", "owned_by": owner, "max_model_len": 4_096}]}
    routes = [Route("/v1/models", answer(models))]
    routes += [Route("/" + path.replace("__", "/"), answer(document)) for path, document in endpoints.items()]
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("owner", "endpoints", "kind", "version"),
    [
        ("vllm", {"version": {"version": "0.11.2"}}, Kind.VLLM, "0.11.2"),
        ("sglang", {}, Kind.SGLANG, "unknown"),
        ("org", {"get_model_info": {"model_path": "org/model"}}, Kind.SGLANG, "unknown"),
        ("llamacpp", {}, Kind.LLAMA_CPP, "unknown"),
        ("me", {"props": {"default_generation_settings": {}, "build_info": "b7000"}}, Kind.LLAMA_CPP, "b7000"),
        ("library", {"api__version": {"version": "0.12.0"}}, Kind.OLLAMA, "0.12.0"),
        ("me", {}, Kind.OTHER, "unknown"),
    ],
)
async def test_engines_are_told_apart(owner: str, endpoints: dict[str, Any], kind: Kind, version: str) -> None:
    """Each kind of engine is known by what it says of itself, or by an endpoint that only it has."""
    async with engine(owner, **endpoints) as url:
        assert await look(url) == Finding(url, kind, version, (UpstreamModel("model", 4_096, owner),))


async def test_only_what_answers_is_found() -> None:
    """Of the usual addresses those count that list a model; silence, refusals and other web servers are passed over."""
    async with (
        serving(build_app(), "127.0.0.1", 0) as port,
        raw_server(then_hangs()) as silent,
        raw_server(says(head(200, "text/html"), b"<html>")) as website,
        raw_server(says(head(200, "application/json"), b'{"data": []}')) as empty,
    ):
        urls = (NOWHERE, silent.url, f"http://127.0.0.1:{port}", website.url, empty.url)
        found = await discover({}, urls)
    assert [(finding.kind, finding.models[0].name) for finding in found] == [(Kind.DEMO, MODEL)]


async def test_what_was_named_is_what_is_used() -> None:
    """OPENAI_BASE_URL, with its key, is looked at instead of the usual ports; the key is not shown."""
    async with engine(key="s3cret") as url:
        (found,) = await discover({"OPENAI_BASE_URL": url + "/v1/", "OPENAI_API_KEY": "s3cret"}, (NOWHERE,))
    assert (found.api_key, found.models[0].name) == ("s3cret", "model")
    assert EngineSettings(found.url).at("/v1/models") == url + "/v1/models"
    assert "s3cret" not in repr(found)


async def test_nothing_takes_the_place_of_what_was_named() -> None:
    """If the named engine does not answer, that is said; an engine on a usual port is not used instead."""
    async with engine() as url:
        with pytest.raises(Unavailable):
            await discover({"OPENAI_BASE_URL": NOWHERE}, (url,))
