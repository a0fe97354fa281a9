"""Hosted APIs in their documented formats, as a node uses them. The table in docs/how-to/add-an-engine.md lists the same."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from node.domain.requests import prepare
from node.engines.api_key import ApiKey
from node.engines.discover import NoModelList, inspect_engine
from node.engines.engine_settings import EngineSettings
from node.engines.openai_http import OpenAIEngine
from node.engines.probe import probe
from node.ports import EngineEvent, ResponseEnd, ResponseStart
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.plaintext_heads import RequestHead
from tallystick.protocol.routes import CHAT
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.runtime.serving import serving
from tests.node.engines.hosted import HOSTED, KEY, HostedApi
from tests.node.engines.test_openai_http import body
from tests.node.harness import OFFER

PAGE = Path(__file__).parents[3] / "docs/how-to/add-an-engine.md"


@asynccontextmanager
async def adapter(api: HostedApi, key: ApiKey | str | None = None) -> AsyncIterator[tuple[OpenAIEngine, str]]:
    """The node's adapter of an API, and the API's base URL."""
    async with serving(api.app(), "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}{api.base}"
        engine = OpenAIEngine(EngineSettings(url, key or ApiKey(KEY, header=api.header)))
        try:
            yield engine, url
        finally:
            await engine.close()


async def ask(engine: OpenAIEngine, api: HostedApi, *, stream: bool) -> list[EngineEvent]:
    """A chat as a node sends it for a client, with the settings that the table in the docs names."""
    offer = replace(
        OFFER,
        upstream=api.model,
        output_limit_field="max_completion_tokens" if "max_tokens" in api.refuses else "max_tokens",
        supports_stream_usage="stream_options" not in api.refuses,
    )
    messages = [{"role": "user", "content": "Say hello."}]
    sent = orjson.dumps({"model": "model", "messages": messages, "stream": stream, "max_tokens": 50})
    async with aclosing(engine.answer(prepare(RequestHead(CHAT), sent, offer, 100))) as events:
        return [event async for event in events]


@pytest.mark.parametrize("name", HOSTED)
async def test_a_hosted_api(name: str) -> None:
    """Its models are listed with their context, and a chat is answered and counted, streamed and whole."""
    api = HOSTED[name]
    async with adapter(api) as (engine, _):
        models = await engine.models()
        assert [(model.name, model.context_tokens) for model in models] == ([(api.model, api.context)] if api.models else [])
        for stream in (True, False):
            events = await ask(engine, api, stream=stream)
            assert events[0] == ResponseStart(200, "text/event-stream" if stream else "application/json")
            assert b"Hello there." in body(events)
            assert isinstance(events[-1], ResponseEnd)
            assert events[-1].usage == ReportedUsage(*api.counted)


@pytest.mark.parametrize("name", HOSTED)
async def test_init_and_doctor_know_a_hosted_api(name: str) -> None:
    """They find its list of models, or say that the config must name them; the probe finds the chat at its address."""
    api = HOSTED[name]
    key = ApiKey(KEY, header=api.header)
    async with serving(api.app(), "127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}{api.base}"
        if api.models is None:
            with pytest.raises(NoModelList, match="name the models in the config"):
                await inspect_engine(url, key, seconds=60)
        else:
            assert [model.name for model in (await inspect_engine(url, key, seconds=60)).models] == [api.model]
            with pytest.raises(Unavailable, match="answers 401: it refuses the API key"):
                await inspect_engine(url, "another", seconds=60)
        found = await probe(url, api.model, key, seconds=60)
        assert found.chat
        assert (found.output_limit_field, found.streams) == (
            "max_completion_tokens" if "max_tokens" in api.refuses else "max_tokens",
            "yes" if "stream_options" in api.refuses else "usage",
        )


async def test_a_token_that_is_renewed_in_its_file(tmp_path: Path) -> None:
    """Each request carries the token that the file has then; a file that is gone is the provider's fault, and names no path."""
    api, file = HOSTED["Vertex AI"], tmp_path / "token"
    async with adapter(api, ApiKey(file=file)) as (engine, _):
        file.write_text("expired\n")
        with pytest.raises(Unavailable, match="it refuses the provider's API key"):
            await ask(engine, api, stream=False)
        file.write_text(f"{KEY}\n")
        assert b"Hello" in body(await ask(engine, api, stream=False))
        for spoil in (lambda: file.write_text(" \n"), file.unlink):
            spoil()
            with pytest.raises(Unavailable, match="API key cannot be read") as caught:
                await ask(engine, api, stream=False)
            assert caught.value.code is Code.ENGINE_UNAVAILABLE
            assert await engine.load() is None
            assert str(tmp_path) not in str(caught.value)


def test_the_table_in_the_docs_lists_what_is_tested() -> None:
    """Each row has the API's base URL as it is tested, whether it lists its models, and the settings that it needs."""
    rows = re.findall(r"^\| ([^|]+?) \| `https://[^/`]+([^`]*)` \| ([^|]*) \| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == list(HOSTED)
    for name, path, listing, notes in rows:
        api = HOSTED[name]
        pattern = re.sub(r"[A-Z]{4,}", "[^/]+", re.escape(path.rstrip("/")))
        assert re.fullmatch(pattern, api.base.rstrip("/")), f"{name}: {path}"
        assert listing.startswith("no" if api.models is None else "yes"), name
        assert ("with context" in listing) is (api.context is not None), name
        assert ('api_key_header = "api-key"' in notes) is (api.header == "api-key"), name
        assert ("output_limit_field" in notes) is ("max_tokens" in api.refuses), name
        assert ("supports_stream_usage = false" in notes) is ("stream_options" in api.refuses), name
