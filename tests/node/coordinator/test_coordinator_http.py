from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from node.coordinator.coordinator_http import CoordinatorHttp
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.replicas import Reach


@asynccontextmanager
async def _service() -> AsyncIterator[tuple[int, list[bytes]]]:
    """A service of this machine, and the first lines of what it got."""
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readline())
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], got


async def test_a_name_that_leads_to_this_machine_gets_no_request() -> None:
    """A coordinator elsewhere cannot have its nodes ask a service of their own machine, whatever its replicas' names lead to."""
    async with asyncio.timeout(60), _service() as (port, got):
        url = f"http://localhost:{port}/v1/providers/x/why"
        for limit in (Reach.ANYWHERE, Reach.NETWORK, Reach.LINK):
            limits = {url: limit}
            with pytest.raises(Unavailable, match="nearer to this machine"):
                await CoordinatorHttp(limits.__getitem__).fetch_json(url)
        assert not got
        assert await CoordinatorHttp(lambda _url: Reach.MACHINE).fetch_json(url) == {}
