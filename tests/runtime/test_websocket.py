from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from tallystick.runtime import connection_limiter
from tallystick.runtime.connection_limiter import ConnectionLimits
from tallystick.runtime.http_protocol import HttpProtocol
from tallystick.runtime.serving import serving
from tallystick.runtime.websocket import (
    DIRECT_EXTENSION,
    FILTER_EXTENSION,
    FRAME_LIMIT_EXTENSION,
    MAX_FRAGMENTS,
    WRITE_EXTENSION,
    FastPathWebSocket,
)

MAX_MESSAGE = 200_000


class Listener:
    """An ASGI app that stores messages and answers the text "count" with their number."""

    def __init__(self) -> None:
        self.heard: list[bytes | str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serves one connection."""
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            text = event.get("bytes") if event.get("bytes") is not None else event["text"]
            if isinstance(text, str) and text.startswith("limit "):
                scope["extensions"][FRAME_LIMIT_EXTENSION](int(text.split()[1]))
                await send({"type": "websocket.send", "text": "set"})
            elif text == "count":
                await send({"type": "websocket.send", "text": str(len(self.heard))})
            else:
                self.heard.append(text)


@pytest.fixture
async def listener() -> AsyncIterator[tuple[Listener, ClientConnection]]:
    """A listener and a connection to it."""
    app = Listener()
    async with (
        serving(app, "127.0.0.1", 0, ws_max_size=MAX_MESSAGE) as port,
        connect(f"ws://127.0.0.1:{port}", compression=None, ping_interval=None) as socket,
    ):
        yield app, socket


def _frame(data: bytes, opcode: Opcode = Opcode.BINARY, *, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)


@pytest.mark.parametrize("seed", range(12))
async def test_frames_however_they_are_mixed_and_cut(listener: tuple[Listener, ClientConnection], seed: int) -> None:
    """Whole, fragmented, empty and long messages, mixed with pings, arrive unchanged wherever TCP splits the stream."""
    app, socket = listener
    rng, sent, wire = random.Random(seed), list[bytes | str](), bytearray()
    for number in range(200):
        size = rng.choice((0, 1, 10, 125, 126, 127, 300, 65_535, 65_536, 70_000) if number % 20 == 0 else (0, 1, 125, 126, 400))
        data = rng.randbytes(size)
        kind = rng.random()
        if kind < 0.7:
            wire += _frame(data)
            sent.append(data)
        elif kind < 0.8:
            cut = rng.randint(0, size)
            wire += _frame(data[:cut], fin=False) + _frame(b"ping", Opcode.PING) + _frame(data[cut:], Opcode.CONT)
            sent.append(data)
        elif kind < 0.9:
            wire += _frame(b"ping", Opcode.PING)
        else:
            wire += _frame(data.hex().encode(), Opcode.TEXT)
            sent.append(data.hex())
    while wire:
        cut = rng.choice((1, 5, 100, 1_000, 50_000))
        socket.transport.write(bytes(wire[:cut]))
        del wire[:cut]
        if rng.random() < 0.2:
            await asyncio.sleep(0)
    await socket.send("count")
    async with asyncio.timeout(60):
        assert await socket.recv() == str(len(sent))
    assert app.heard == sent


@pytest.mark.parametrize(
    "bad",
    [
        b"\x82\x05hello",  # not masked
        b"\xc2\x80\x00\x00\x00\x00",  # an extension bit that was not negotiated
        b"\x82\xff" + (MAX_MESSAGE + 1).to_bytes(8, "big") + bytes(4),  # too long
        _frame(b"x", Opcode.CONT),  # a continuation without a message
        b"\x83\x80\x00\x00\x00\x00",  # unknown opcode
    ],
    ids=["not masked", "an extension", "too long", "of no message", "no such kind"],
)
async def test_protocol_violations(listener: tuple[Listener, ClientConnection], bad: bytes) -> None:
    """Protocol violations close the connection, also after valid messages in the same packet."""
    app, socket = listener
    socket.transport.write(_frame(b"good") + bad)
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(60):
            await socket.recv()
    assert app.heard == [b"good"]


async def test_the_longest_message(listener: tuple[Listener, ClientConnection]) -> None:
    """A message of the largest permitted size passes."""
    app, socket = listener
    await socket.send(bytes(MAX_MESSAGE))
    await socket.send("count")
    assert await socket.recv() == "1"
    assert app.heard == [bytes(MAX_MESSAGE)]


@pytest.mark.parametrize("piece", [b"", b"x"])
async def test_a_message_does_not_come_in_endless_fragments(listener: tuple[Listener, ClientConnection], piece: bytes) -> None:
    """The number of fragments is limited, since empty ones use memory without adding to the message's size."""
    app, socket = listener
    whole = _frame(b"begin", fin=False) + _frame(b"", Opcode.CONT, fin=False) * (MAX_FRAGMENTS - 2) + _frame(b"end", Opcode.CONT)
    socket.transport.write(whole)
    await socket.send("count")
    assert await socket.recv() == "1"
    socket.transport.write(_frame(b"begin", fin=False) + _frame(piece, Opcode.CONT, fin=False) * 10_000)
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(60):
            await socket.recv()
    assert socket.close_code == 1009
    assert app.heard == [b"beginend"]


@pytest.mark.parametrize("fragmented", [False, True])
async def test_an_app_sets_the_limit_of_a_connection(listener: tuple[Listener, ClientConnection], fragmented: bool) -> None:
    """An app's limit for a connection holds from its next message on, whole or fragmented."""
    app, socket = listener
    for limit in (100, 1_000):
        await socket.send(f"limit {limit}")
        assert await socket.recv() == "set"
        if fragmented:
            half = _frame(bytes(limit // 2), fin=False) + _frame(bytes(limit // 2), Opcode.CONT)
            socket.transport.write(half)
        else:
            await socket.send(bytes(limit))
    await socket.send("count")
    assert await socket.recv() == "2"
    if fragmented:
        socket.transport.write(_frame(bytes(900), fin=False) + _frame(bytes(101), Opcode.CONT))
    else:
        await socket.send(bytes(1_001))
    with pytest.raises(ConnectionClosed):
        async with asyncio.timeout(60):
            await socket.recv()
    assert socket.close_code == 1009
    assert [len(frame) for frame in app.heard] == [100, 1_000]


async def test_unread_pongs_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends pings without reading the answers gets a limited number, and is disconnected after a while."""
    held: list[int] = []
    plain = connection_limiter._WebSocket.handle_ping

    def watched(protocol: Any) -> None:
        plain(protocol)
        held.append(protocol.transport.get_write_buffer_size())

    monkeypatch.setattr(connection_limiter._WebSocket, "handle_ping", watched)
    async with (
        serving(Listener(), "127.0.0.1", 0, limits=ConnectionLimits(stall_seconds=0.5)) as port,
        connect(f"ws://127.0.0.1:{port}", compression=None, ping_interval=None, close_timeout=1) as socket,
    ):
        socket.transport.pause_reading()
        ping = _frame(b"p" * 125, Opcode.PING) * 1_000
        async with asyncio.timeout(60):
            while not (socket.transport.is_closing() or (held and len(held) > 400_000)):
                socket.transport.write(ping)
                await asyncio.sleep(0)
                if socket.transport.get_write_buffer_size() > 1 << 20:
                    await asyncio.sleep(0.05)
        socket.transport.abort()
    assert max(held) <= connection_limiter.MAX_UNREAD_PONG_BYTES + (256 << 10) + 128, "and the answers to what is read at once"


async def test_a_filter_takes_messages_before_they_are_events() -> None:
    """The app sees what the filter leaves, in order; fragments are shown to it whole, text and what follows a close are not."""
    taken: list[bytes] = []
    left: list[bytes | str] = []

    def take(messages: Sequence[bytes]) -> Sequence[bytes]:
        taken.extend(message for message in messages if message.startswith(b"fast"))
        return [message for message in messages if not message.startswith(b"fast")]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        scope["extensions"][FILTER_EXTENSION](take)
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            left.append(event.get("bytes") or event["text"])
            if event.get("text") == "end":
                await send({"type": "websocket.send", "text": "done"})

    async with (
        serving(app, "127.0.0.1", 0, ws_max_size=MAX_MESSAGE) as port,
        connect(f"ws://127.0.0.1:{port}", compression=None, ping_interval=None) as socket,
    ):
        for message in (b"fast 1", b"slow 1", [b"fast", b" 2"], [b"slow", b" 2"], "fast text", b"fast 3", "end"):
            await socket.send(message)
        assert await socket.recv() == "done"
    assert taken == [b"fast 1", b"fast 2", b"fast 3"]
    assert left == [b"slow 1", b"slow 2", "fast text", "end"]


async def test_messages_are_sent_at_once_as_long_as_the_peer_reads() -> None:
    """Then they precede what the app sends afterwards. To a peer that does not read, and after a close, none is sent at once."""
    size, results, full, finished = 32 << 10, list[bool](), asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        write = scope["extensions"][WRITE_EXTENSION]
        await send({"type": "websocket.accept"})
        results.append(write(b"at once"))
        await send({"type": "websocket.send", "bytes": b"then"})
        await receive()  # from now on, the client does not read
        count = 0
        while write(bytes(size)):
            count += 1
            assert count * size < 64 << 20, "the connection never seemed full"
            await asyncio.sleep(0)
        full.set()
        await send({"type": "websocket.send", "bytes": b"full"})  # waits until it reads again
        results.append(write(b"again"))
        await send({"type": "websocket.close", "code": 1000})
        results.append(write(b"beyond"))
        finished.set()

    async with (
        serving(app, "127.0.0.1", 0, ws_max_size=MAX_MESSAGE) as port,
        connect(f"ws://127.0.0.1:{port}", compression=None, ping_interval=None) as socket,
    ):
        assert [await socket.recv(), await socket.recv()] == [b"at once", b"then"]
        socket.transport.pause_reading()
        await socket.send(b"paused")
        await full.wait()
        socket.transport.resume_reading()
        got = [message async for message in socket]
        await finished.wait()
    assert [message for message in got if len(message) != size] == [b"full", b"again"]
    assert got[-2:] == [b"full", b"again"]
    assert results == [True, True, False]


class Direct:
    """A handler that answers each message with its bytes doubled, in parts."""

    def __init__(self) -> None:
        self.socket: Any = None
        self.events: list[object] = []

    def message_received(self, message: bytes | str) -> None:
        self.events.append(message)
        if isinstance(message, bytes):
            self.socket.send_parts([message, b"", message])

    def pause_writing(self) -> None:
        self.events.append("paused")
        self.socket.pause_reading()

    def resume_writing(self) -> None:
        self.events.append("resumed")
        self.socket.resume_reading()


@pytest.mark.parametrize("size", [0, 1, 62, 63, 32_767, 32_768, 90_000])
async def test_messages_as_calls(size: int) -> None:
    """A direct handler gets messages and answers them at once, whatever their length; the app's `receive` has the end alone."""
    handler, ended = Direct(), list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        handler.socket = scope["extensions"][DIRECT_EXTENSION](handler)
        await send({"type": "websocket.accept"})
        ended.append((await receive())["type"])

    async with serving(app, "127.0.0.1", 0, ws_max_size=MAX_MESSAGE) as port:
        async with connect(f"ws://127.0.0.1:{port}", compression=None, ping_interval=None) as socket:
            data = random.Random(size).randbytes(size)
            await socket.send(data)
            assert await socket.recv() == data + data
            await socket.send([data[: size // 2], data[size // 2 :]])
            assert await socket.recv() == data + data
            await socket.send("text")
            await (await socket.ping())
        assert handler.events == [data, data, "text"]
    assert ended == ["websocket.disconnect"]


async def test_a_peer_that_reads_nothing_pauses_the_handler() -> None:
    """The handler is told when the peer's connection is full, and when it has read again; nothing is lost."""
    handler = Direct()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        handler.socket = scope["extensions"][DIRECT_EXTENSION](handler)
        await send({"type": "websocket.accept"})
        await receive()

    async with (
        serving(app, "127.0.0.1", 0, ws_max_size=MAX_MESSAGE) as port,
        connect(f"ws://127.0.0.1:{port}", compression=None, ping_interval=None, max_size=None, max_queue=None) as socket,
    ):
        socket.transport.pause_reading()
        sender = asyncio.create_task(_send_many(socket, 300))
        async with asyncio.timeout(60):
            while "paused" not in handler.events:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)
        socket.transport.resume_reading()
        for _ in range(300):
            assert len(await socket.recv()) == 200_000
        await sender
        assert handler.events.count("paused") == handler.events.count("resumed")


async def _send_many(socket: ClientConnection, count: int) -> None:
    for _ in range(count):
        await socket.send(bytes(100_000))


def _alive(kind: type) -> list[Any]:
    return [entry for entry in gc.get_objects() if issubclass(type(entry), kind)]  # isinstance would look through weak proxies


async def test_an_open_connection_holds_no_handshake() -> None:
    """Neither its headers nor the HTTP connection that it began as, and it has no dictionary of its own."""
    gc.collect()
    gc.disable()
    try:
        former = {id(entry) for entry in (*_alive(FastPathWebSocket), *_alive(HttpProtocol))}
        async with serving(Listener(), "127.0.0.1", 0) as port, connect(f"ws://127.0.0.1:{port}") as socket:
            await socket.send("count")
            await socket.recv()
            [connection] = [entry for entry in _alive(FastPathWebSocket) if id(entry) not in former]
            assert not [entry for entry in _alive(HttpProtocol) if id(entry) not in former]
            assert (len(connection.request.headers), len(connection.response.headers)) == (0, 0)
            assert len(vars(connection)) <= 30, "CPython shares the keys of so many members among all instances"
    finally:
        gc.enable()
