"""An HTTP server that sends exactly the given bytes, for engines that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

Write = Callable[[bytes], Awaitable[None]]
ConnectionHandler = Callable[[Write], Awaitable[None]]


def head(status: int = 200, content_type: str = "text/event-stream", *extra: str) -> bytes:
    """A response head; the body ends with the connection."""
    lines = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", "connection: close", *extra]
    return "\r\n".join([*lines, "", ""]).encode()


def answers_with(*parts: bytes) -> ConnectionHandler:
    """Sends these parts and closes the connection."""

    async def handler(write: Write) -> None:
        for part in parts:
            await write(part)

    return handler


def answers_then_hangs(*parts: bytes) -> ConnectionHandler:
    """Sends these parts and keeps the connection, silently."""

    async def handler(write: Write) -> None:
        for part in parts:
            await write(part)
        await asyncio.Event().wait()

    return handler


@dataclass
class RawServer:
    """The received bytes, and whether a client has closed its connection."""

    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def raw_server(handler: ConnectionHandler) -> AsyncIterator[RawServer]:
    """Handles every connection with the same handler."""
    state = RawServer()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        length = next((int(line[15:]) for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        state.requests.append(request + await reader.readexactly(length))

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        work = asyncio.create_task(_quietly(handler(write)))
        gone = asyncio.create_task(_until_gone(reader))
        tasks.update((work, gone))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            state.left.set()
        work.cancel()
        gone.cancel()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield state
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_gone(reader: asyncio.StreamReader) -> None:
    while await reader.read(1_024):
        pass


async def _quietly(work: Awaitable[None]) -> None:
    with suppress(OSError):
        await work
