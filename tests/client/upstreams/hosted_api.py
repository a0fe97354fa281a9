"""A hosted API that is compatible with OpenAI's, as tests need it: it answers what it is told to, and keeps what it got."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

USAGE = {"prompt_tokens": 1_000, "completion_tokens": 100, "total_tokens": 1_100}
ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "big",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "from the cloud"}, "finish_reason": "stop"}],
    "usage": USAGE,
}


def event(document: object) -> bytes:
    """An event of a stream."""
    return b"data: " + (document if isinstance(document, bytes) else orjson.dumps(document)) + b"\n\n"


def delta(text: str | None, finish: str | None = None) -> dict[str, Any]:
    """The document of one event of a chat."""
    return {"choices": [{"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}]}


STREAM = [event(delta("from ")), event(delta("the cloud")), event(delta(None, "stop")), event({"choices": [], "usage": USAGE})]


@dataclass
class HostedApi:
    """The API. `status`, `body` and `headers`: its answer to whole requests; `events`: to streams, `[DONE]` included if whole."""

    url: str = ""
    status: int = 200
    body: bytes = field(default_factory=lambda: orjson.dumps(ANSWER))
    headers: dict[str, str] = field(default_factory=dict)
    events: list[bytes] = field(default_factory=lambda: [*STREAM, event(b"[DONE]")])
    paths: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[HostedApi]:
        """Serves on a free port."""
        app = web.Application()
        app.add_routes([web.post("/{path:.*}", self._answer)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/v1"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        document = orjson.loads(await request.read())
        self.paths.append(request.path)
        self.authorizations.append(request.headers.get("authorization"))
        self.requests.append(document)
        if not document.get("stream") or self.status != 200:
            headers = {"content-type": "application/json"} | self.headers
            return web.Response(status=self.status, body=self.body, headers=headers)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"} | self.headers)
        await response.prepare(request)
        for part in self.events:
            await response.write(part)
        return response
