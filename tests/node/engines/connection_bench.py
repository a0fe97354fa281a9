"""A connection to an engine without a network."""

from __future__ import annotations

import asyncio
from typing import Any

from node.engines.http_connection import HttpConnection, HttpExchange

HEAD = b"GET / HTTP/1.1\r\nhost: engine\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Plain; charset=utf-8\r\ncontent-length: 4\r\n\r\nfour"


class FakeTransport(asyncio.Transport):
    """Records what happens to it. `lost` tells the connection about its end, as an event loop would."""

    def __init__(self, protocol: HttpConnection) -> None:
        super().__init__()
        self.protocol, self.written = protocol, bytearray()
        self.closed = asyncio.Event()
        self.buffered, self.closing, self.aborted, self.paused = 0, False, False, False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True
        self.closed.set()

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Bench:
    """A connection without a network."""

    def __init__(self) -> None:
        self.freed: list[HttpConnection] = []
        self.lost: list[HttpConnection] = []
        self.connection = HttpConnection(self.freed.append, self.lost.append)
        self.transport = FakeTransport(self.connection)
        self.connection.connection_made(self.transport)

    async def ask(self, *pieces: bytes, end: Exception | bool | None = None, body: bytes = b"") -> tuple[HttpExchange, bytes]:
        """Sends a request, gets these pieces, and reads the answer. `end`: the error with which the connection ends, or True."""
        asking = asyncio.create_task(self.connection.send(HEAD, body, lambda: None))
        await asyncio.sleep(0)
        for piece in pieces:
            self.connection.data_received(piece)
        if end is not None:
            self.connection.connection_lost(end if isinstance(end, Exception) else None)
        async with asyncio.timeout(60):
            exchange = await asking
            received = bytearray()
            while data := await exchange.readany():
                received += data
        return exchange, bytes(received)
