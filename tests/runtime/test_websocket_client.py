"""The client's end of a WebSocket, against a server that cuts, fragments and interrupts what it sends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from tallystick.runtime.websocket import MAX_FRAGMENTS
from tallystick.runtime.websocket_client import CheckPeer, FastPathConnection, open_websocket

MAX_MESSAGE = 200_000
TIMEOUT_SECONDS = 60


@asynccontextmanager
async def _connected(script: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[FastPathConnection]:
    """A connection to a server that follows a script."""
    async with asyncio.timeout(TIMEOUT_SECONDS), serve(script, "127.0.0.1", 0, compression=None, max_size=None) as server:
        connection = await _open(server.sockets[0].getsockname()[1])
        try:
            yield connection
        finally:
            await connection.close()


async def _open(port: int, check_peer: CheckPeer | None = None) -> FastPathConnection:
    return await open_websocket(
        f"ws://127.0.0.1:{port}",
        max_size=MAX_MESSAGE,
        open_seconds=TIMEOUT_SECONDS,
        ping_seconds=TIMEOUT_SECONDS,
        close_seconds=1,
        user_agent="test",
        use_proxy=False,
        check_peer=check_peer,
    )


async def _until_closed(socket: ServerConnection) -> None:
    await socket.wait_closed()


@pytest.mark.parametrize("seed", range(8))
async def test_messages_however_they_are_mixed_and_cut(seed: int) -> None:
    """Whole, fragmented, empty and long messages, mixed with pings, arrive unchanged wherever TCP splits the stream."""
    rng, sent, wire = random.Random(seed), list[bytes | str](), bytearray()
    for number in range(200):
        size = rng.choice((0, 1, 125, 126, 127, 65_535, 65_536, 70_000) if number % 20 == 0 else (0, 1, 125, 126, 400))
        data, kind = rng.randbytes(size), rng.random()
        if kind < 0.7:
            wire += Frame(Opcode.BINARY, data).serialize(mask=False)
            sent.append(data)
        elif kind < 0.8:
            cut = rng.randint(0, size)
            wire += Frame(Opcode.BINARY, data[:cut], fin=False).serialize(mask=False)
            wire += Frame(Opcode.PING, b"ping").serialize(mask=False)
            wire += Frame(Opcode.CONT, data[cut:]).serialize(mask=False)
            sent.append(data)
        elif kind < 0.9:
            wire += Frame(Opcode.PING, b"ping").serialize(mask=False)
        else:
            wire += Frame(Opcode.TEXT, data.hex().encode()).serialize(mask=False)
            sent.append(data.hex())

    async def script(socket: ServerConnection) -> None:
        await socket.recv()
        while wire:
            cut = rng.choice((1, 5, 100, 1_000, 50_000))
            socket.transport.write(bytes(wire[:cut]))
            del wire[:cut]
            await asyncio.sleep(0)
        await socket.close()

    received: list[bytes | str] = []
    async with _connected(script) as connection:
        connection.on_message = received.append
        assert connection.send_parts([b"go"])
        await connection.wait_closed()
    assert received == sent


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 100_000])
async def test_sent_messages(size: int) -> None:
    """Messages of any length arrive masked and whole; nothing is sent once the connection is closing."""
    got: list[bytes | str] = []

    async def script(socket: ServerConnection) -> None:
        got.extend([await socket.recv() for _ in range(3)])

    data, lost = random.Random(size).randbytes(size), asyncio.Event()
    async with _connected(script) as connection:
        connection.on_lost = lost.set
        for _ in range(3):
            assert connection.send_parts([data[: size // 3], data[size // 3 :]])
        await lost.wait()
        assert not connection.send_parts([b"late"])
    assert got == [data] * 3


async def test_masking_keys_are_used_once() -> None:
    """Each message has a key of its own, which nobody can predict."""

    async def script(socket: ServerConnection) -> None:
        await _until_closed(socket)

    async with _connected(script) as connection:
        keys = [connection._next_key() for _ in range(3_000)]
    assert len(set(keys)) > 2_990
    assert {len(key) for key in keys} == {4}


@pytest.mark.parametrize("frame", [Frame(Opcode.BINARY, bytes(MAX_MESSAGE + 1)), Frame(Opcode.BINARY, b"masked")])
async def test_what_a_server_may_not_send(frame: Frame) -> None:
    """A message that is too long, or masked, ends the connection and reaches nobody."""

    async def script(socket: ServerConnection) -> None:
        await socket.recv()
        socket.transport.write(frame.serialize(mask=len(frame.data) < 10))
        await _until_closed(socket)

    received: list[bytes | str] = []
    async with _connected(script) as connection:
        connection.on_message = received.append
        connection.send_parts([b"go"])
        await connection.wait_closed()
        assert connection.protocol.close_sent is not None
        assert connection.protocol.close_sent.code in (1002, 1009)
    assert received == []


async def test_fragments_are_counted() -> None:
    """A message in too many fragments ends the connection: empty ones count for no size limit."""

    async def script(socket: ServerConnection) -> None:
        await socket.recv()
        wire = Frame(Opcode.BINARY, b"", fin=False).serialize(mask=False)
        wire += Frame(Opcode.CONT, b"", fin=False).serialize(mask=False) * MAX_FRAGMENTS
        socket.transport.write(wire)
        await _until_closed(socket)

    received: list[bytes | str] = []
    async with _connected(script) as connection:
        connection.on_message = received.append
        connection.send_parts([b"go"])
        await connection.wait_closed()
    assert received == []


async def test_messages_before_the_handler_wait_for_recv() -> None:
    """Until a handler is set, messages are read as with the library."""

    async def script(socket: ServerConnection) -> None:
        await socket.send(b"early")
        await _until_closed(socket)

    async with _connected(script) as connection:
        assert await connection.recv() == b"early"


async def test_a_server_that_opens_no_websocket() -> None:
    """Its answer is raised, a redirect too, which is not followed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 307 Moved\r\nlocation: ws://elsewhere.example/\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, asyncio.timeout(TIMEOUT_SECONDS):
        with pytest.raises(InvalidStatus):
            await _open(server.sockets[0].getsockname()[1])


async def test_a_connection_that_is_lost() -> None:
    """`on_lost` is called once, and `recv` says that the connection is closed."""
    lost: list[None] = []

    async def script(socket: ServerConnection) -> None:
        socket.transport.abort()

    async with _connected(script) as connection:
        connection.on_lost = lambda: lost.append(None)
        with pytest.raises(ConnectionClosed):
            await connection.recv()
    assert lost == [None]


async def test_a_refused_address_gets_nothing() -> None:
    """The address is checked before the handshake: a server at a refused one sees a connection without a byte."""
    received: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            received.put_nowait(await reader.read(1))
        except ConnectionError:
            received.put_nowait(b"")
        writer.close()

    def refuse(address: str) -> None:
        raise OSError(f"not {address}")

    async with asyncio.timeout(TIMEOUT_SECONDS), await asyncio.start_server(take, "127.0.0.1", 0) as server:
        with pytest.raises(OSError, match=r"not 127\.0\.0\.1"):
            await _open(server.sockets[0].getsockname()[1], refuse)
        assert await received.get() == b""
