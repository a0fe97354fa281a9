from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from node.domain.requests import EngineRequest
from node.engines.addresses import base_addresses
from node.engines.demo import build_app
from node.engines.demo_answer import MODEL
from node.engines.discover import discover, inspect_engine
from node.engines.engine_settings import EngineSettings
from node.engines.kinds import DEFAULT_URLS, OLLAMA_CONTEXT, EngineKind, slots_in_environment
from node.engines.openai_http import OpenAIEngine
from node.engines.probe import probe
from node.ports import ResponseStart
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.routes import CHAT
from tallystick.runtime.serving import serving
from tests.node.engines.raw import answers_then_hangs, answers_with, head, raw_server

Serve = Callable[..., AbstractAsyncContextManager[str]]
NOWHERE = "http://127.0.0.1:1"


@asynccontextmanager
async def engine(owner: str = "me", key: str | None = None, said: dict[str, Any] | None = None) -> AsyncIterator[str]:
    """A server that lists one model, owned by `owner`, and answers these paths."""

    def answer(document: Any) -> Callable[[Request], Any]:
        async def respond(request: Request) -> JSONResponse:
            allowed = key is None or request.headers.get("authorization") == f"Bearer {key}"
            return JSONResponse(document if allowed else {}, 200 if allowed else 401)

        return respond

    models = {"data": [{"id": "model", "owned_by": owner, "max_model_len": 4_096}]}
    routes = [Route("/v1/models", answer(models))]
    routes += [
        Route(path, answer(document), methods=["POST" if path == "/api/show" else "GET"])
        for path, document in (said or {}).items()
    ]
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


OLLAMA = {"/api/version": {"version": "0.12.0"}}
VLLM = {"/version": {"version": "0.11.2"}}
LOADED = {"/api/ps": {"models": [{"name": "model", "context_length": 32_768}]}}
LLAMA = {"/props": {"default_generation_settings": {"n_ctx": 2_048}, "total_slots": 3, "build_info": "b7000"}}
STUDIO = {"id": "model", "type": "llm", "quantization": "Q4_K_M", "state": "loaded", "max_context_length": 131_072}
INFO = {"model_id": "m", "model_sha": "abc", "model_dtype": "bfloat16", "max_concurrent_requests": 128, "version": "3.3.6"}
SGLANG = {"model_path": "org/model"}


@pytest.mark.parametrize(
    ("owner", "said", "kind", "version"),
    [
        ("vllm", VLLM, EngineKind.VLLM, "0.11.2"),
        ("sglang", {}, EngineKind.SGLANG, "unknown"),
        ("org", {"/get_model_info": SGLANG}, EngineKind.SGLANG, "unknown"),
        ("llamacpp", {}, EngineKind.LLAMA_CPP, "unknown"),
        ("me", LLAMA, EngineKind.LLAMA_CPP, "b7000"),
        ("library", OLLAMA, EngineKind.OLLAMA, "0.12.0"),
        ("organization_owner", {"/api/v0/models": {"data": [STUDIO]}}, EngineKind.LM_STUDIO, "unknown"),
        ("org/model", {"/info": INFO | {"max_total_tokens": 8_192}}, EngineKind.TGI, "3.3.6"),
        ("tensorrt_llm", {"/version": {"version": "1.1.0"}}, EngineKind.TENSORRT_LLM, "1.1.0"),
        ("Triton Inference Server", {}, EngineKind.TRITON, "unknown"),
        ("vllm", VLLM | {"/v1/metadata": {"modelInfo": [], "version": "2.0.1"}}, EngineKind.NIM, "2.0.1"),
        ("openai", {"/health/readiness": {"status": "healthy", "db": "Not connected"}}, EngineKind.LITELLM, "unknown"),
        ("openai", {"/health/readiness": {"db": "connected", "litellm_version": "1.106.2"}}, EngineKind.LITELLM, "1.106.2"),
        ("", OLLAMA | {"/system": {"backends": []}, "/version": {"version": "v3.8.0"}}, EngineKind.LOCALAI, "v3.8.0"),
        ("user", {"/v1/internal/model/info": {"model_name": "m", "loader": "ExLlamav3"}}, EngineKind.WEBUI, "unknown"),
        ("vllm", VLLM | {"/schema.json": {"name": "llm", "routes": []}}, EngineKind.BENTOML, "0.11.2"),
        ("vllm", VLLM | {"/-/routes": {"/": "llm"}}, EngineKind.RAY_SERVE, "0.11.2"),
        ("me", {}, EngineKind.OTHER, "unknown"),
        ("me", {"/props": [], "/info": "text", "/api/version": {}}, EngineKind.OTHER, "unknown"),
    ],
)
async def test_engines_are_identified(owner: str, said: dict[str, Any], kind: EngineKind, version: str) -> None:
    """Each kind of engine is identified by its model owner or by an endpoint that only it has."""
    async with engine(owner, said=said) as url:
        discovered = await inspect_engine(url)
    assert (discovered.url, discovered.kind, discovered.version) == (url, kind, version)
    assert [(model.name, model.owner) for model in discovered.models] == [("model", owner)]
    assert (discovered.spec("model").engine, discovered.spec("model").engine_version) == (kind.value, version)


@pytest.mark.parametrize(
    ("said", "slots", "context", "precision"),
    [
        (LLAMA, 3, 2_048, "unknown"),
        (LLAMA | {"/props": LLAMA["/props"] | {"model_path": "/models/tiny-Q8_0.gguf"}}, 3, 2_048, "q8_0"),
        (LLAMA | {"/props": LLAMA["/props"] | {"model_path": 7}}, 3, 2_048, "unknown"),
        (OLLAMA, None, OLLAMA_CONTEXT, "unknown"),
        (OLLAMA | {"/api/show": {"details": {"quantization_level": "Q4_K_M"}}}, None, OLLAMA_CONTEXT, "q4_k_m"),
        (OLLAMA | {"/api/show": {"details": ["Q4_K_M"]}}, None, OLLAMA_CONTEXT, "unknown"),
        (OLLAMA | LOADED, None, 32_768, "unknown"),
        ({"/api/v0/models": {"data": [STUDIO]}}, None, 131_072, "q4_k_m"),
        ({"/api/v0/models": {"data": [STUDIO | {"loaded_context_length": 8_192}, 7]}}, None, 8_192, "q4_k_m"),
        ({"/info": INFO | {"max_total_tokens": 8_192}}, 128, 8_192, "bf16"),
        ({"/get_model_info": SGLANG, "/get_server_info": {"max_running_requests": 64, "dtype": "fp8"}}, 64, 4_096, "fp8"),
        ({"/get_model_info": SGLANG, "/get_server_info": {"max_running_requests": True}}, None, 4_096, "unknown"),
        ({"/get_model_info": SGLANG, "/get_server_info": {"dtype": "auto", "quantization": None}}, None, 4_096, "unknown"),
        ({"/get_model_info": SGLANG, "/get_server_info": {"dtype": "bfloat16", "quantization": None}}, None, 4_096, "bf16"),
        ({"/get_model_info": SGLANG, "/get_server_info": {"dtype": "bfloat16", "quantization": "fp8"}}, None, 4_096, "fp8"),
    ],
)
async def test_engine_settings(said: dict[str, Any], slots: int | None, context: int, precision: str) -> None:
    """Concurrent requests, context lengths and precision are read if the engine tells them, and never guessed."""
    async with engine(said=said) as url:
        discovered = await inspect_engine(url)
    assert (discovered.slots, discovered.models[0].context_tokens, discovered.spec("model").precision) == (
        slots,
        context,
        precision,
    )


@pytest.mark.parametrize(
    ("said", "features"),
    [
        (OLLAMA, ()),
        (OLLAMA | {"/api/show": {"capabilities": ["completion", "tools", "thinking"]}}, ("tools", "-vision", "json_schema")),
        (OLLAMA | {"/api/show": {"capabilities": ["completion", "vision"]}}, ("-tools", "vision", "json_schema")),
        (OLLAMA | {"/api/show": {"capabilities": ["embedding"]}}, ("embeddings", "-/v1/chat/completions", "-/v1/completions")),
        (OLLAMA | {"/api/show": {"capabilities": []}}, ()),
        (OLLAMA | {"/api/show": []}, ()),
        (LLAMA, ()),
        ({"/props": LLAMA["/props"] | {"modalities": {"vision": True, "audio": False}}}, ("vision", "-audio_input")),
        ({"/props": LLAMA["/props"] | {"modalities": {"vision": 1}}}, ()),
        ({"/api/v0/models": {"data": [STUDIO]}}, ("-vision", "-/v1/embeddings")),
        (
            {"/api/v0/models": {"data": [STUDIO | {"type": "vlm", "capabilities": ["tool_use"]}]}},
            ("vision", "tools", "-/v1/embeddings"),
        ),
        (
            {"/api/v0/models": {"data": [STUDIO | {"type": "embeddings"}]}},
            ("embeddings", "-/v1/chat/completions", "-/v1/completions"),
        ),
        ({"/api/v0/models": {"data": [STUDIO | {"type": None}]}}, ()),
    ],
)
async def test_features_that_an_engine_tells(said: dict[str, Any], features: tuple[str, ...]) -> None:
    """What an engine says of its models is believed: features, and routes that a model does not have."""
    async with engine(said=said) as url:
        assert (await inspect_engine(url)).spec("model").features == features


def test_default_ports() -> None:
    """The default port of every identifiable engine is probed."""
    assert {url.rpartition(":")[2] for url in DEFAULT_URLS} == {
        "11434", "8000", "30000", "8080", "1234", "3000", "4000", "5000", "9000",
    }  # fmt: skip


async def test_only_engines_with_models_are_discovered() -> None:
    """Only addresses with a model list count; silence, refusals and other web servers are skipped."""
    async with (
        serving(build_app(), "127.0.0.1", 0) as port,
        raw_server(answers_then_hangs()) as silent,
        raw_server(answers_with(head(200, "text/html"), b"<html>")) as website,
        raw_server(answers_with(head(200, "application/json"), b'{"data": []}')) as empty,
    ):
        urls = (NOWHERE, silent.url, f"http://127.0.0.1:{port}", website.url, empty.url)
        discovered = await discover({}, urls)
    assert [(engine_found.kind, engine_found.models[0].name) for engine_found in discovered] == [(EngineKind.DEMO, MODEL)]


async def test_a_configured_engine_is_used() -> None:
    """OPENAI_BASE_URL, with its key, replaces the default ports; the key is not shown."""
    async with engine(key="s3cret") as url:
        (discovered,) = await discover({"OPENAI_BASE_URL": url + "/v1/", "OPENAI_API_KEY": "s3cret"}, (NOWHERE,))
    assert (discovered.api_key, discovered.models[0].name) == ("s3cret", "model")
    assert base_addresses(discovered.url)[0].route("/v1/models") == url + "/v1/models"
    assert "s3cret" not in repr(discovered)


async def test_a_configured_engine_is_not_replaced() -> None:
    """If the configured engine does not answer, discovery fails, and no engine on a default port takes its place."""
    async with engine() as url:
        with pytest.raises(Unavailable):
            await discover({"OPENAI_BASE_URL": NOWHERE}, (url,))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (head(401, "application/json") + b"{}", "API key"),
        (head(403, "application/json") + b"{}", "API key"),
        (head(404, "text/html") + b"no", "base URL"),
        (head(301, "text/html", "location: https://elsewhere.example/v1"), "redirects to 'https://elsewhere.example/v1'"),
        (head(503, "text/html") + b"loading", "busy or still loads"),
        (head(500, "text/html") + b"no", "answers 500"),
        (head(200, "text/html") + b"<html>", "no model list"),
        (head(200, "application/json") + b'{"object": "list"}', "no model list"),
    ],
)
async def test_what_is_wrong_with_an_address_is_told_apart(answer: bytes, words: str) -> None:
    """A wrong key, a wrong path, a redirect and a busy engine each have a text that says what to do."""
    async with raw_server(answers_with(answer)) as server:
        with pytest.raises(Unavailable, match=words):
            await inspect_engine(server.url)


async def test_nothing_and_silence_are_told_apart() -> None:
    """A refused connection and an engine that does not answer are different faults."""
    with pytest.raises(Unavailable, match=r"nothing answers at http://127\.0\.0\.1:1/v1/models"):
        await inspect_engine(NOWHERE)
    async with raw_server(answers_then_hangs()) as server:
        with pytest.raises(Unavailable, match=r"no answer from .* within 0.2 s"):
            await inspect_engine(server.url, seconds=0.2)


@pytest.mark.parametrize("path", ["/api/paas/v4", "/v1/openai", "/api/v3", "/inference", "/v1beta/openai"])
async def test_engines_behind_any_base_url_work(path: str) -> None:
    """Discovery, the health check and a job use the base URL as OpenAI's SDKs do."""

    async def models(_: Request) -> JSONResponse:
        return JSONResponse([{"id": "model"}])

    async def chat(_: Request) -> JSONResponse:
        return JSONResponse({"choices": [{"message": {"content": "four"}, "finish_reason": "stop"}]})

    routes = [Route(f"{path}/models", models), Route(f"{path}/chat/completions", chat, methods=["POST"])]
    async with serving(Starlette(routes=routes), "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}{path}"
        assert [model.name for model in (await inspect_engine(url)).models] == ["model"]
        assert (await probe(url, "model")).chat
        adapter = OpenAIEngine(EngineSettings(url))
        assert [model.name for model in await adapter.models()] == ["model"]
        request = EngineRequest(CHAT, b"{}", stream=False, strip_usage=False, rename=None)
        async with aclosing(adapter.answer(request)) as events:
            assert await anext(events) == ResponseStart(200, "application/json")
        await adapter.close()


@pytest.mark.parametrize(
    ("kind", "environment", "slots"),
    [
        (EngineKind.OLLAMA, {"OLLAMA_NUM_PARALLEL": "6"}, 6),
        (EngineKind.LLAMA_CPP, {"LLAMA_ARG_N_PARALLEL": " 2 "}, 2),
        (EngineKind.OLLAMA, {"LLAMA_ARG_N_PARALLEL": "2"}, None),
        (EngineKind.VLLM, {"OLLAMA_NUM_PARALLEL": "6", "": "3"}, None),
        *((EngineKind.OLLAMA, {"OLLAMA_NUM_PARALLEL": text}, None) for text in ("", "0", "-1", "four", "1e3", "65536", "\u0663")),
    ],
)
def test_slots_that_a_variable_of_this_machine_sets(kind: EngineKind, environment: dict[str, str], slots: int | None) -> None:
    """Ollama does not tell its slots over HTTP; a value that is no number of slots is ignored."""
    assert slots_in_environment(kind, environment) == slots
