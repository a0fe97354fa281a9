"""No daemon logs a prompt, an answer, a password, a key or a token at the level debug, whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.relay import processes
from tallystick.cli.local.processes import free_port
from tallystick.protocol.routes import CHAT
from tests.e2e.scripted_engine import ABORT, MODEL, Part, head, scripted_engine
from tests.e2e.test_secrecy import _forms

PROMPT = "zebra-crossing-4711 in the prompt"
ANSWER = "quagga-herd-2302 in the answer"
RPC_KEY = "rpckey0a1b2c3d4e5f60718293a4b5c6d7e8f9"
API_KEY = "gatewaykey-77aa88bb99cc00dd11ee22ff33"
WRONG_KEY = "wrongkey-00ff11ee22dd33cc44bb55aa66"
ENGINE_KEY = "enginekey-5e6f7a8b9c0d1e2f3a4b5c6d7e8f"
PASSWORD = "bench-password-1f2e3d4c5b6a"
TRACES_KEY = "traceskey-2b3c4d5e6f708192a3b4"
QUERY = "querytoken-9a8b7c6d5e4f3a2b1c0d"
SECRETS = (PROMPT, ANSWER, RPC_KEY, API_KEY, WRONG_KEY, ENGINE_KEY, PASSWORD, TRACES_KEY, QUERY)
SECONDS = 120

_WORDS = json.dumps({"choices": [{"delta": {"content": ANSWER}}]}).encode()
_ERROR = {"message": f"cannot answer: {PROMPT} with key {ENGINE_KEY}", "type": PROMPT, "code": PROMPT}
_ECHO = json.dumps({"error": _ERROR}).encode()
_STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
SCRIPTS: dict[str, tuple[Part, ...]] = {
    "good": (head(), b"data: " + _WORDS + b"\n\n", _STOP, b"data: [DONE]\n\n"),
    "bad request": (head("application/json", status=400), _ECHO),
    "forbidden": (head("application/json", status=401), _ECHO),
    "server error": (head("application/json", status=500), _ECHO),
    "plain text": (head("text/plain", status=500), f"Traceback: {PROMPT}".encode()),
    "error event": (head(), b"data: " + _WORDS + b"\n\n", b"data: " + _ECHO + b"\n\n"),
    "no JSON": (head(), f"data: {PROMPT} {ANSWER}\n\n".encode()),
    "no stream": (head("text/html"), f"<p>{PROMPT}".encode()),
    "content type": (head(f"text/{PROMPT.replace(' ', '-')}"), b"x"),
    "odd content type": (head("Text/HTML; charset=" + ENGINE_KEY), b"x"),
    "redirect": (head("text/html", f"location: http://127.0.0.1:1/?q={QUERY}&{PROMPT.replace(' ', '+')}", status=302), b""),
    "broken header": (head("text/event-stream", f"x-{PROMPT}: {PROMPT}"), b"data: " + _WORDS + b"\n\n"),
    "reset": (head(), b"data: " + _WORDS + b"\n\n", ABORT),
}


@contextlib.asynccontextmanager
async def _keyed_endpoint(port: int, folder: Path) -> AsyncIterator[None]:
    """Passes on to the market's chain what comes to `port`, whatever the path, as an RPC provider with a key in its URLs does."""
    open_writers = set[asyncio.StreamWriter]()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            rpc = json.loads((folder / "deployment.json").read_text())["rpc"]
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(rpc.rpartition(":")[2]))
            open_writers.update((writer, far_writer))

            async def answers() -> None:
                while data := await far_reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()

            back = asyncio.create_task(answers())
            while data := await reader.read(1 << 16):
                far_writer.write(data.replace(f"/{RPC_KEY}".encode(), b"/"))
                await far_writer.drain()
            back.cancel()
            far_writer.close()
        writer.close()

    server = await asyncio.start_server(pass_on, "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()
        for writer in open_writers:
            writer.transport.abort()


async def _misuse(http: httpx.AsyncClient) -> None:
    """Requests that are refused for a member, a header or a path that has a secret."""
    key = {"authorization": f"Bearer {API_KEY}"}
    asked = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    requests: list[dict[str, Any]] = [
        {"content": f'{{"model": "{PROMPT}'.encode(), "headers": key},
        {"json": asked, "headers": {"authorization": f"Bearer {WRONG_KEY}"}},
        {"json": asked, "headers": {"x-api-key": WRONG_KEY}},
        {"json": asked, "params": {"key": QUERY}, "headers": key},
        {"json": asked | {"model": "no-such-model"}, "headers": key},
        {"json": asked | {"messages": PROMPT}, "headers": key},
        {"json": asked | {"max_tokens": PROMPT, "user": "good"}, "headers": key},
        {"json": asked | {"tools": [PROMPT], "user": "good"}, "headers": key},
        {"json": asked | {"user": "good"}, "headers": key | {"x-tally-options": f'{{"label": 3, "{WRONG_KEY}": "{PROMPT}"}}'}},
        {"json": asked | {"user": "good"}, "headers": key | {"x-tally-options": PROMPT}},
        {"content": PROMPT.encode(), "headers": key | {"content-encoding": "gzip"}},
        {"content": PROMPT.encode(), "headers": key | {"content-type": "multipart/form-data; boundary=x"}},
    ]
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"):
        for request in requests:
            with contextlib.suppress(httpx.HTTPError):
                await http.post(path, **request)
    lines = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": PROMPT})
    upload = {"file": ("b.jsonl", f"{lines}\n{PROMPT}\n".encode())}
    answer = await http.post("/v1/files", files=upload, data={"purpose": "batch"}, headers=key)
    if answer.status_code == 200:
        batch = {"input_file_id": answer.json()["id"], "endpoint": CHAT, "completion_window": "1h"}
        await http.post("/v1/batches", json=batch, headers=key)


async def _scripts(http: httpx.AsyncClient) -> None:
    for script in SCRIPTS:
        for stream in (True, False):
            body = {"model": MODEL, "user": script, "stream": stream, "messages": [{"role": "user", "content": PROMPT}]}
            with contextlib.suppress(httpx.HTTPError):
                await http.post(CHAT, json=body, headers={"authorization": f"Bearer {API_KEY}"})


def _leaks(folder: Path) -> list[str]:
    """Each line of a log that has a secret in any form."""
    leaks = []
    for log in sorted(folder.glob("*.log")):
        for line in log.read_bytes().splitlines():
            text = re.sub(rb"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)).encode("utf-8", "replace"), line)
            leaks += [f"{log.name}: {text[:600]!r}" for secret in SECRETS if any(form in text for form in _forms(secret))]
    return leaks


async def test_no_log_has_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that echo the prompt in whatever they answer, refused requests, and a chain that goes away, at the level debug."""
    port, folder = free_port(0), tmp_path / "market"
    for daemon in ("COORDINATOR", "NODE", "GATEWAY"):
        monkeypatch.setenv(f"TALLY_{daemon}_LOG_LEVEL", "debug")
        monkeypatch.setenv(f"TALLY_{daemon}_RPC", f"http://127.0.0.1:{port}/{RPC_KEY}")
    monkeypatch.setenv("TALLY_GATEWAY_API_KEY", API_KEY)
    monkeypatch.setenv("ENGINE_KEY", ENGINE_KEY)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:1/{TRACES_KEY}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization=Bearer {TRACES_KEY}")
    async with scripted_engine(SCRIPTS) as engine, contextlib.AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(contextlib.AsyncExitStack())
        await endpoint.enter_async_context(_keyed_endpoint(port, folder))
        table = 'api_key_env = "ENGINE_KEY"\n'
        market = processes.market(folder, engine.url, model=MODEL, engine_table=table)
        site = await stack.enter_async_context(market)
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=site.gateway, trust_env=False, timeout=SECONDS))
        await _scripts(http)
        await _misuse(http)
        await endpoint.aclose()
        async with asyncio.timeout(SECONDS):
            while (await http.get(f"{site.coordinator}/readyz")).status_code == 200:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.5)
        await http.get("/readyz", headers={"authorization": f"Bearer {API_KEY}"})
        await _scripts(http)
    logs = {log.name: log.read_text() for log in folder.glob("*.log")}
    assert {"coordinator.log", "node.log", "gateway.log"} <= logs.keys()
    for name in ("coordinator.log", "gateway.log"):
        assert '"level":"debug"' in logs[name].replace('": "', '":"'), name
    assert "engine fault" in logs["node.log"]
    assert "completed" in logs["gateway.log"]
    assert "does not answer" in logs["coordinator.log"], "the chain went away"
    assert _leaks(folder) == []


def test_the_search_finds_them(tmp_path: Path) -> None:
    """It finds a secret where it is."""
    (tmp_path / "a.log").write_text(json.dumps({"reason": f"no: {PROMPT}"}) + "\nnothing\n")
    assert len(_leaks(tmp_path)) == 1
