"""Misbehaving engines behind a real market: the client gets an error with a code, nobody pays for a broken answer, and the node
continues.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from scripts.relay import processes
from tests.e2e.extra_node import node_beside

EVENTS, JSON = "text/event-stream", "application/json"
WORD = b'data: {"choices":[{"delta":{"content":"word "}}]}\n\n'
STOP = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1000000000,"completion_tokens":1000000000}}\n\n'
DONE = b"data: [DONE]\n\n"
HANG = b"<hang>"


def _head(status: int = 200, kind: str = EVENTS, *more: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", f"content-type: {kind}", "connection: close", *more, "", ""]).encode()


BEHAVIOURS: dict[str, tuple[bytes, ...]] = {
    "good": (_head(), WORD, STOP, DONE),
    "hangs": (HANG,),
    "hangs after its head": (_head(), HANG),
    "half a line": (_head(), WORD, b'data: {"choi'),
    "no end": (_head(), WORD),
    "bad JSON first": (_head(), b"data: {nope}\n\n"),
    "bad JSON later": (_head(), WORD, b"data: {nope}\n\n"),
    "wrong usage": (_head(), WORD, STOP, USAGE, DONE),
    "error first": (_head(), b'data: {"error":{"message":"no"}}\n\n'),
    "error later": (_head(), WORD, b'data: {"error":{"message":"no"}}\n\n'),
    "500": (_head(500, JSON), b'{"error":{"message":"secret trace"}}'),
    "no newline": (_head(), b"data: " + b"x" * (10 << 20)),
    "redirect": (_head(302, JSON, "location: http://127.0.0.1:1/"), b""),
    "web page": (_head(200, "text/html"), b"<html>"),
    "no body": (_head(),),
    "silence": (_head(), WORD, HANG),
    "bad request": (_head(400, JSON), b'{"error":{"message":"too long"}}'),
    "busy": (_head(429, JSON), b"{}"),
}
EXPECTED: dict[str, tuple[int, str | None]] = {
    "good": (200, "completed"),
    "hangs": (504, None),
    "hangs after its head": (504, None),
    "half a line": (200, "provider_error"),
    "no end": (200, "provider_error"),
    "bad JSON first": (502, None),
    "bad JSON later": (200, "provider_error"),
    "wrong usage": (200, "completed"),
    "error first": (502, None),
    "error later": (200, "provider_error"),
    "500": (502, None),
    "no newline": (502, None),
    "redirect": (502, None),
    "web page": (502, None),
    "no body": (502, None),
    "silence": (200, "timed_out"),
    "bad request": (400, "upstream_error"),
    "busy": (503, None),
}
"""By behaviour: the status that the client gets, and the receipt's outcome, if there is one."""


@asynccontextmanager
async def _engine() -> AsyncIterator[str]:
    """An engine that lists one model and answers each request as its `user` member says; requests of a probe are refused."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            request = await reader.readuntil(b"\r\n\r\n")
            if request.startswith(b"GET"):
                known = request.startswith(b"GET /v1/models ")
                writer.write(_head(200 if known else 404, JSON) + (b'{"data":[{"id":"bad"}]}' if known else b"{}"))
            else:
                length_header = re.search(rb"content-length: (\d+)", request.lower())
                body = json.loads(await reader.readexactly(int(length_header[1]) if length_header else 0))
                for part in BEHAVIOURS[body.get("user", "bad request")]:
                    if part is HANG:
                        await asyncio.sleep(60)
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.02)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def _toml(url: str, usage: str = "") -> str:
    return (
        f'[[engines]]\nurl = "{url}"\ninput_price = "1"\noutput_price = "1"\n{usage}'
        "[deadlines]\nfirst_token = 5.0\nbetween_tokens = 5.0\n"
    )


async def _ask(site: processes.Site, behaviour: str) -> tuple[int, str, str | None]:
    """Returns the status and text that a client of the gateway gets, and the job if an answer began."""
    body = {"model": "bad", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True, "user": behaviour}
    async with httpx.AsyncClient(base_url=site.gateway, trust_env=False, timeout=120) as http:
        answer = await http.post("/v1/chat/completions", json=body)
        return answer.status_code, answer.text, answer.headers.get("x-tally-job")


async def _outcome(site: processes.Site, job: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=site.gateway, trust_env=False) as http:
        for _ in range(2_000):
            record: dict[str, Any] = (await http.get(f"/tally/jobs/{job}")).json()
            if record.get("state") not in ("open", "running"):
                return record
            await asyncio.sleep(0.05)
    raise AssertionError(f"{job} does not end: {record}")


async def test_misbehaving_engines(tmp_path: Path) -> None:
    """Each misbehaviour in turn on one node; a good answer at the end shows that the node still works."""
    folder = tmp_path / "market"
    async with (
        processes.upstream() as mock,
        processes.market(folder, mock) as site,
        _engine() as url,
        node_beside(folder, site, _toml(url), model="bad") as node,
    ):
        outcomes: dict[str, tuple[int, str | None]] = {}
        for behaviour in (*(name for name in BEHAVIOURS if name != "good"), "good"):
            status, text, job = await _ask(site, behaviour)
            assert ("secret trace" in text) is (behaviour == "500"), "the engine's own words are for its client"
            record: dict[str, Any] = await _outcome(site, job) if job else {"outcome": None, "cost": "0"}
            outcomes[behaviour] = (status, record["outcome"])
            if record["outcome"] == "completed":
                assert "[DONE]" in text
                assert 0 < int(record["cost"]) < 1_000, f"{behaviour}: billed {record['cost']}"
            else:
                assert record["cost"] == "0", f"{behaviour}: billed {record['cost']}"
                assert '"code"' in text or status == 400, f"{behaviour}: the client was told nothing: {text[-300:]}"
        assert outcomes == {name: EXPECTED[name] for name in outcomes}
        assert node.returncode is None
    written = [file for file in folder.rglob("*") if file.is_file() and b"secret trace" in file.read_bytes()]
    assert not written, "and for nobody else: no log, ledger or database has them"
