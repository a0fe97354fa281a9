"""An HTTP server that sends exactly the bytes that it is told, for engines that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

Write = Callable[[bytes], Awaitable[None]]
Behaviour = Callable[[Write], Awaitable[None]]


def head(status: int = 200, content_type: str = "text/event-stream", *extra: str) -> bytes:
    """A response head; the body ends with the connection."""
    lines = [f"HTTP/1.1 {status} X", f"content-type: {content_type}", "connection: close", *extra]
    return "\r\n".join([*lines, "", ""]).encode()


def says(*parts: bytes) -> Behaviour:
    """Sends these parts and closes the connection."""

    async def behave(write: Write) -> None:
        for part in parts:
            await write(part)

    return behave


def then_hangs(*parts: bytes) -> Behaviour:
    """Sends these parts and keeps the connection, silently."""

    async def behave(write: Write) -> None:
        for part in parts:
            await write(part)
        await asyncio.Event().wait()

    return behave


@dataclass
class RawServer:
    """What came in, and whether a client has closed its connection."""

    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def raw_server(behave: Behaviour) -> AsyncIterator[RawServer]:
    """Serves every connection the same behaviour."""
    state = RawServer()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        length = next((int(line[15:]) for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        state.requests.append(request + await reader.readexactly(length))

        async def write(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        work = asyncio.create_task(_quietly(behave(write)))
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
