"""A TCP proxy that can hold messages back, lose packets, and be killed, as seen from both sides.

It reads along. WebSocket messages (RFC 6455) of a link are recognised whole, everything else as the bytes that arrived at once. A
reader that returns a function holds these bytes back until that function has run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

READ_BYTES = 1 << 16
MAX_HEAD = 1 << 16
Hold = Callable[[Awaitable[None]], Awaitable[None]]
"""Runs with the awaitable that passes the held bytes on."""
Reader = Callable[[bool, bytes], Hold | None]
"""Sees whether a message goes to the server, and the message. Returns what must run instead of passing it on."""
MakeReader = Callable[[], Reader]
"""Makes the reader of a new connection."""


class MessageSplitter:
    """Splits one direction of a connection into messages. Masked ones are unmasked."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_websocket: bool | None = None
        self._parts = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields the messages that `data` completes."""
        if self._is_websocket is False:
            yield data
            return
        self._buffer += data
        if self._is_websocket is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0 and len(self._buffer) < MAX_HEAD:
                return
            head = bytes(self._buffer[: end + 4]).lower()
            self._is_websocket = b"\r\nupgrade: websocket" in head
            if not self._is_websocket:
                yield bytes(self._buffer)
                self._buffer.clear()
                return
            del self._buffer[: end + 4]
        yield from self._frames()

    def _frames(self) -> Iterator[bytes]:
        while (frame := self._take_frame()) is not None:
            last, opcode, payload = frame
            if opcode >= 8:  # control frames
                continue
            self._parts += payload
            if last:
                message = bytes(self._parts)
                self._parts.clear()
                yield message

    def _take_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        size, at = buffer[1] & 0x7F, 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size, at = int.from_bytes(buffer[2 : 2 + width], "big"), 2 + width
        masked = bool(buffer[1] & 0x80)
        start = at + 4 * masked
        if len(buffer) < start + size:
            return None
        payload = bytes(buffer[start : start + size])
        if masked and size:
            key = (bytes(buffer[at : at + 4]) * (size // 4 + 1))[:size]
            payload = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
        first = buffer[0]
        del buffer[: start + size]
        return bool(first & 0x80), first & 0x0F, payload


class Proxy:
    """Listens on a port of 127.0.0.1 and connects to another one, from the address `source`, which is of the loopback too."""

    def __init__(self, port: int, target: int, make_reader: MakeReader, source: str = "127.0.0.1") -> None:
        self.port, self.source = port, source
        self._target, self._make_reader = target, make_reader
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._resets = 0
        self._passing = asyncio.Event()
        self._passing.set()

    async def open(self) -> None:
        """Begins to listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=READ_BYTES)

    async def close(self) -> None:
        """Closes the port and resets all connections, as the death of the process does."""
        connections = list(self._connections)
        self.close_soon()
        await asyncio.gather(*connections, return_exceptions=True)

    def close_soon(self) -> None:
        """Closes the port at once, and resets all connections. May be called by a reader of this proxy."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()

    def reset(self) -> None:
        """Resets all connections. May be called by a reader of this proxy; a message that it holds is lost."""
        self._resets += 1
        for connection in self._connections:
            connection.cancel()

    def lose(self) -> None:
        """Lets nothing pass from now on. The connections stay open."""
        self._passing.clear()

    def heal(self) -> None:
        """Lets everything pass again, also what was sent meanwhile."""
        self._passing.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers, read = [writer], self._make_reader()
        ended = False
        try:
            await self._passing.wait()
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self._target, limit=READ_BYTES, local_addr=(self.source, 0)
            )
            writers.append(server_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, server_writer, read, to_server=True))
                pumps.create_task(self._pump(server_reader, writer, read, to_server=False))
        except* (OSError, _Ended):
            ended = True
        finally:
            for each in writers:
                if ended:
                    each.close()
                else:
                    each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, read: Reader, *, to_server: bool) -> None:
        splitter = MessageSplitter()
        while data := await reader.read(READ_BYTES):
            holds = [hold for message in splitter.feed(data) if (hold := read(to_server, message)) is not None]
            await self._passing.wait()
            if holds:
                await holds[0](self._pass_on(writer, data, self._resets))
            else:
                await _write(writer, data)
        with contextlib.suppress(OSError):
            writer.write_eof()
        raise _Ended

    async def _pass_on(self, writer: asyncio.StreamWriter, data: bytes, resets: int) -> None:
        """Passes a message on that was held, unless the connection was reset meanwhile."""
        if self._resets == resets:
            await _write(writer, data)


class _Ended(Exception):
    """One side has closed the connection, so the other one is closed too."""


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the other side has died
        writer.write(data)
        await writer.drain()
