"""An engine that sends exactly the bytes of a script, which the request's `user` member names, and keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

MODEL = "scripted"
ABORT = b"<abort>"
"""A part that resets the connection."""
Part = bytes | float
"""Bytes to send, or seconds to wait."""


def head(content_type: str | None = "text/event-stream", *lines: str, status: int = 200) -> bytes:
    """The head of an answer whose body ends with the connection."""
    kind = [] if content_type is None else [f"content-type: {content_type}"]
    return "\r\n".join([f"HTTP/1.1 {status} X", *kind, "connection: close", *lines, "", ""]).encode()


def chunked(*parts: bytes) -> tuple[bytes, ...]:
    """A stream in chunks whose last one never comes, because the connection is reset."""
    return head("text/event-stream", "transfer-encoding: chunked"), *(b"%x\r\n%s\r\n" % (len(p), p) for p in parts), ABORT


@dataclass
class ScriptedEngine:
    """Its base URL, and by script the last request's path and body."""

    url: str
    asked: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def body(self, script: str) -> dict[str, Any]:
        """The JSON that the engine got for a script."""
        members: dict[str, Any] = json.loads(self.asked[script][1])
        return members


@asynccontextmanager
async def scripted_engine(scripts: Mapping[str, tuple[Part, ...]]) -> AsyncIterator[ScriptedEngine]:
    """Serves the scripts. A request names its script in `user`, or in `metadata.user_id` (Anthropic's Messages)."""
    engine = ScriptedEngine("")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            request = await reader.readuntil(b"\r\n\r\n")
            path = request.split(b" ", 2)[1].decode()
            if request.startswith(b"GET"):
                known = path == "/v1/models"
                writer.write(head("application/json", status=200 if known else 404))
                writer.write(json.dumps({"data": [{"id": MODEL}]} if known else {}).encode())
            else:
                length = re.search(rb"content-length: (\d+)", request.lower())
                body = await reader.readexactly(int(length[1]) if length else 0)
                await _play(writer, engine, scripts, path, body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()


async def _play(
    writer: asyncio.StreamWriter, engine: ScriptedEngine, scripts: Mapping[str, tuple[Part, ...]], path: str, body: bytes
) -> None:
    members = json.loads(body)
    script = str(members.get("user") or (members.get("metadata") or {}).get("user_id"))
    if script not in scripts:  # a probe
        writer.write(head("application/json", status=404) + b'{"error":{"message":"no such script"}}')
        return
    engine.asked[script] = (path, body)
    for part in scripts[script]:
        if part == ABORT:
            writer.transport.abort()
            return
        if isinstance(part, bytes):
            writer.write(part)
            await writer.drain()
        await asyncio.sleep(0.005 if isinstance(part, bytes) else part)
