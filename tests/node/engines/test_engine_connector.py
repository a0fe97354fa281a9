"""What the connector tells of a connection, and the body of when it was sent."""

from __future__ import annotations

import asyncio
from functools import partial

import aiohttp

from node.engines.engine_connector import EngineConnector, RequestBody


async def test_a_reused_connection_is_told_from_a_new_one() -> None:
    """Only a connection that served another request is a reused one, and each body is sent once."""
    sent: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                await reader.readuntil(b"\r\n\r\n{}")
            except asyncio.IncompleteReadError:
                break
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    bodies = [RequestBody(b"{}", partial(sent.append, number)) for number in range(3)]
    connector = EngineConnector(limit=0, keepalive_timeout=60)
    try:
        async with asyncio.timeout(60), aiohttp.ClientSession(connector=connector) as session:
            for body in bodies:
                async with session.post(address, data=body) as response:
                    assert await response.read() == b"ok"
    finally:
        server.close()
    assert sent == [0, 1, 2]
    assert [body.reused_connection for body in bodies] == [False, True, True]
