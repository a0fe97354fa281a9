"""Paths as clients form them: each stands for its route, and what stands for none is explained."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import openai
import pytest
import websockets

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.paths import ABSENT_FAMILIES, SOLD_FAMILIES, Target, explain_unknown, read_target
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Amount
from tallystick.runtime.multipart import read_field
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket
from tests.client.parties import MODEL

KEY = "a-secret-0123456789"
AZURE = f"/openai/deployments/{MODEL}/chat/completions"


@pytest.fixture
async def http(market: Market) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway without keys."""
    async with (
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("path", "route", "model"),
    [
        (CHAT, CHAT, None),
        ("//v1//chat///completions//", CHAT, None),
        ("/v1/chat/completions/", CHAT, None),
        ("/chat/completions", CHAT, None),
        ("/models", "/v1/models", None),
        ("/models/a/b", "/v1/models/a/b", None),
        ("/responses/resp_1", "/v1/responses/resp_1", None),
        ("/messages/count_tokens", "/v1/messages/count_tokens", None),
        ("/audio/speech", "/v1/audio/speech", None),
        ("/openai/deployments/gpt-4o/chat/completions", CHAT, "gpt-4o"),
        ("/openai/deployments/org/name-7b/chat/completions/", CHAT, "org/name-7b"),
        ("/v1/openai/deployments/m/embeddings", "/v1/embeddings", "m"),
        ("/openai/deployments/m/audio/transcriptions", "/v1/audio/transcriptions", "m"),
        ("/openai/deployments/m/images/generations", "/v1/images/generations", "m"),
        ("/openai/deployments/chat/completions/completions", "/v1/completions", "chat/completions"),
        ("/openai/deployments", "/v1/models", None),
        ("/openai/deployments/m", "/v1/models/m", None),
        ("/openai/v1/chat/completions", CHAT, None),
        ("/openai//v1/responses/", "/v1/responses", None),
        ("/openai/v1", "/v1", None),
        ("/openai", "/v1", None),
        ("/openai/models", "/v1/models", None),
        ("/openai/responses", "/v1/responses", None),
        ("/v1/custom/route", "/v1/custom/route", None),
        ("/health", "/health", None),
        ("/health/", "/health", None),
        ("/tally/jobs/ab", "/tally/jobs/ab", None),
        ("/v1/v1/models", "/v1/v1/models", None),
        ("/api/chat", "/api/chat", None),
        ("/openaiish/models", "/openaiish/models", None),
        ("/", "/", None),
        ("", "/", None),
        ("//", "/", None),
    ],
)
def test_paths_stand_for_routes(path: str, route: str, model: str | None) -> None:
    """Slashes, versions and Azure's forms do not change what a request asks for."""
    assert read_target(path) == Target(route, model)
    assert read_target(route) == Target(route), "a route stands for itself"


@pytest.mark.parametrize("family", sorted(SOLD_FAMILIES | ABSENT_FAMILIES))
def test_every_family_is_found_without_its_version(family: str) -> None:
    """A base URL without /v1 serves whatever the one with it does."""
    assert read_target(f"/{family}/x") == Target(f"/v1/{family}/x")


@pytest.mark.parametrize(
    ("method", "path", "reason"),
    [
        ("GET", "/v1", "this is the base URL"),
        ("POST", "/v1", "this is the base URL"),
        ("POST", "/v1/v1/chat/completions", "expected /v1/chat/completions, got /v1 twice"),
        ("GET", "/v1/v1", "got /v1 twice"),
        ("GET", "/v1/files", "keeps no files (batches_mib is 0)"),
        ("POST", "/v1/batches", "keeps no files (batches_mib is 0)"),
        ("PUT", "/v1/files", "expected GET, HEAD, OPTIONS, POST, got PUT"),
        ("POST", "/v1/files/file-1", "expected DELETE, GET, HEAD, OPTIONS, got POST"),
        ("GET", "/v1/batches/batch_1/cancel", "expected OPTIONS, POST, got GET"),
        ("POST", "/v1/files/file-1/parts", "no such route"),
        ("DELETE", "/v1/assistants/a", "no provider sells OpenAI's /v1/assistants"),
        ("POST", "/v1/fine_tuning/jobs", "no provider sells OpenAI's /v1/fine_tuning"),
        ("GET", "/v1/realtime", "no provider sells OpenAI's /v1/realtime"),
        ("POST", "/v1/chat/completions/chat/completions", "contains /v1/chat/completions already"),
        ("POST", "/v1/chat/completions/v1/chat/completions", "contains /v1/chat/completions already"),
        ("GET", "/v1/chat/completions/models", "contains /v1/chat/completions already"),
        ("GET", "/v1/chat/completions", "expected POST, got GET"),
        ("POST", "/v1/models", "expected GET, got POST"),
        ("DELETE", "/v1/models/a/b", "expected GET, got DELETE"),
        ("DELETE", "/v1/rerank", "expected POST, got DELETE"),
        ("POST", "/api/chat", "Ollama's own API"),
        ("GET", "/api/tags", "Ollama's own API"),
        ("POST", "/v1beta/models/m:generateContent", "Gemini's own API"),
        ("POST", "/completion", "llama.cpp's own API"),
        ("GET", "/favicon.ico", "no such route"),
    ],
)
def test_what_is_no_route_is_explained(method: str, path: str, reason: str) -> None:
    """The explanation says what is wrong, and names the routes that there are."""
    text = explain_unknown(method, path)
    assert text is not None
    assert text.startswith(f"{method} {path}: ")
    assert reason in text
    assert all(
        route in text for route in ("GET /v1/models", CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages")
    )


@pytest.mark.parametrize("path", [CHAT, "/v1/rerank", "/v1/responses/r/cancel", "/v1/messages/count_tokens", "/v1/custom"])
def test_what_may_be_sold_is_no_error(path: str) -> None:
    """A POST to a route that a provider may sell is not refused by its path."""
    assert explain_unknown("POST", path) is None


@pytest.mark.parametrize(
    "path",
    [
        "//v1//chat/completions",
        "/v1/chat/completions/",
        "/chat/completions",
        "/openai/v1/chat/completions?api-version=2026",
        AZURE,
        "/v1/chat/completions?beta=true&api-version=x",
        "/v1/%63hat/completions",
        "/v1/chat%2Fcompletions",
    ],
)
async def test_a_request_is_served_on_every_path(http: httpx.AsyncClient, fake: FakeMarket, path: str) -> None:
    """However the path is written, the provider gets the same route and body."""
    body = json.dumps(BODY).encode()
    answer = await http.post(path, content=body)
    assert answer.status_code == 200
    assert (fake.last.head.path, fake.last.body) == (CHAT, body)


async def test_get_routes_on_every_path(http: httpx.AsyncClient) -> None:
    """Lists of models are found under each base URL, with HEAD too."""
    listed = (await http.get("/v1/models")).json()
    for path in (
        "/models",
        "/v1/models/",
        "//v1//models",
        "/openai/v1/models",
        "/openai/models?api-version=1",
        "/openai/deployments",
    ):
        assert (await http.get(path)).json() == listed
    assert (await http.get(f"/models/{MODEL}")).json()["id"] == MODEL
    assert (await http.get(f"/v1/models/{MODEL.replace('/', '%2F')}")).json()["id"] == MODEL
    head = await http.head("/v1/models")
    assert (head.status_code, head.content) == (200, b"")
    assert (await http.get("/health/")).status_code == 200


async def test_unknown_paths_are_404(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Whatever the method, a path that is no route is a 404 in OpenAI's format."""
    for method, path in (("GET", "/v1"), ("POST", "/v1/v1/chat/completions"), ("POST", "/v1/models"), ("PUT", "/v1/threads/x")):
        answer = await http.request(method, path, json=BODY if method == "POST" else None)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (404, "not_found_error", "unknown_route")
        assert error["message"] == explain_unknown(method, read_target(path).path)
    assert not fake.submissions


async def test_a_websocket_is_answered_over_http(market: Market) -> None:
    """A client of the realtime API learns that there is none, instead of a bare 403."""
    async with serving(build_app(market), "127.0.0.1", 0, ws_max_size=None) as port:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(f"ws://127.0.0.1:{port}/v1/realtime?model=m")
    assert caught.value.response.status_code == 404
    assert b"no provider sells OpenAI's /v1/realtime" in caught.value.response.body


async def test_options_tells_the_methods(http: httpx.AsyncClient) -> None:
    """OPTIONS is answered with the methods of the route."""
    for path, allow in ((CHAT, "POST"), ("/chat/completions", "POST"), ("/v1/models", "GET"), ("/health", "GET")):
        answer = await http.options(path)
        assert answer.status_code == 204
        assert allow in answer.headers["allow"].split(", ")


async def test_the_path_names_the_model(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """The model of Azure's path is taken if the body names none; all other members stay. A body's model counts."""
    without = {name: value for name, value in BODY.items() if name != "model"} | {"seed": 2**70 - 1, "x": 2.5}
    for body in (without, without | {"model": None}, without | {"model": ""}, BODY | {"seed": 2}):
        assert (await http.post(AZURE, content=json.dumps(body).encode())).status_code == 200
        assert json.loads(fake.last.body) == body | {"model": MODEL}
    refused = await http.post("/openai/deployments/other/chat/completions", json=without)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_model")
    assert (await http.post("/openai/deployments/other/chat/completions", json=BODY)).status_code == 200
    for bad in (b"", b"[]", b"no"):
        answer = await http.post(AZURE, content=bad)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_message")


async def test_the_path_names_the_model_of_a_form(http: httpx.AsyncClient) -> None:
    """A form without the field `model` gets it from the path: the route is looked for, not the model."""
    url = f"/openai/deployments/{MODEL}/audio/transcriptions"
    for data in ({"language": "en"}, {"model": MODEL}):
        answer = await http.post(url, files={"file": ("a.wav", b"\r\n--x" * 100)}, data=data)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
    empty = await http.post("/v1/audio/transcriptions", files={"file": ("a.wav", b"x")})
    assert empty.status_code == 400
    assert read_field(
        "multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--', "model"
    )


async def test_the_azure_client(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """OpenAI's client of Azure: its paths, its api-version, and its header `api-key`, whose limits hold."""
    keys = (ApiKey(label="ann", secret=KEY), ApiKey(label="poor", secret=KEY + "!", max_cost=Amount(1)))
    async with (
        Market(fake.url, wallet, replace(config, api_keys=keys)) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
    ):
        azure = {"azure_endpoint": f"http://127.0.0.1:{port}", "api_version": "2026-01-01", "max_retries": 0}
        for key, options in ((KEY, {}), (KEY, {"azure_deployment": MODEL})):
            async with openai.AsyncAzureOpenAI(api_key=key, **azure, **options) as sdk:  # type: ignore[call-overload]
                answer = await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
                assert answer.choices[0].message.content
        async with openai.AsyncAzureOpenAI(api_key=KEY + "!", **azure) as sdk:  # type: ignore[call-overload]
            with pytest.raises(openai.APIStatusError, match="allowed"):
                await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        async with openai.AsyncAzureOpenAI(api_key="wrong", **azure) as sdk:  # type: ignore[call-overload]
            with pytest.raises(openai.AuthenticationError, match="api-key"):
                await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
