"""uvicorn's WebSocket protocol with a fast path for binary messages that arrive whole in one frame, as our peers send them.

The websockets library, which is written in Python, parses all other frames, and every frame while one of its own is incomplete.
So the library alone handles fragments, pings, closes and errors. The fast path takes a third of the time per relayed chunk.

An app may take a connection's messages as calls (DIRECT_EXTENSION) instead of as ASGI events. A message then costs no event, no
queue and no turn of a task.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

from tallystick.runtime.lean_event import LeanEvent
from tallystick.runtime.lean_queue import LeanQueue

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without the compiled part
    from websockets.utils import apply_mask

_WHOLE_BINARY = 0x82
"""FIN and opcode 2, no extension bits (RFC 6455, 5.2)."""
_MASKED = 0x80
_HEAD, _SHORTEST = struct.Struct(">HH"), 6
_SHORT, _MEDIUM, _LONG = 0x8280, 0x82FE, 0x82FF
"""The first two bytes of a whole, masked, binary message: without a payload, and with a length of 2 or of 8 bytes after them."""
MAX_FRAGMENTS = 64
"""Fragments of one message. Our clients send none. Empty fragments count for no size limit, so their number is limited."""
FRAME_LIMIT_EXTENSION = "tallystick.frame_limit"
"""The ASGI extension that sets the maximum message size of one connection: a function that takes the number of bytes."""
FILTER_EXTENSION = "tallystick.filter"
"""The ASGI extension that shows whole binary messages to the app before they are events. It is a function that takes a
MessageFilter.
"""
WRITE_EXTENSION = "tallystick.write"
"""The ASGI extension that sends a binary message at once: a function that takes it and returns whether it was sent. It is not if
the peer reads more slowly than it is written to, or the connection is closing; then only the app's `send` may send it.
"""
MessageFilter = Callable[[Sequence[bytes]], Sequence[bytes]]
"""Gets the messages that came together. Returns those that it did not take, which become events. It must not raise."""
DIRECT_EXTENSION = "tallystick.direct"
"""The ASGI extension that gives a connection's messages to a MessageHandler: a function that takes it and returns a DirectSocket.
From then on, the app's `receive` returns nothing but the disconnect.
"""


class MessageHandler(Protocol):
    """Takes the messages of a connection. Its methods must not raise."""

    def message_received(self, message: bytes | str) -> None:
        """A whole message came."""
        ...

    def pause_writing(self) -> None:
        """The peer reads more slowly than it is written to."""
        ...

    def resume_writing(self) -> None:
        """The peer has read again."""
        ...


class DirectSocket(Protocol):
    """A connection whose messages a MessageHandler takes."""

    def send_parts(self, parts: Sequence[bytes]) -> None:
        """Sends one binary message, whose parts are joined. Does nothing once the connection is closing."""
        ...

    def pause_reading(self) -> None:
        """Takes no more from the peer until `resume_reading`. Messages that are here already are handled all the same."""
        ...

    def resume_reading(self) -> None:
        """See `pause_reading`."""
        ...


def message_head(size: int, mask: int = 0) -> bytes:
    """What precedes the payload of a whole binary message, and its masking key (RFC 6455, 5.2). `mask`: 0x80 from a client."""
    if size < 126:
        return bytes((_WHOLE_BINARY, mask | size))
    if size < 1 << 16:
        return bytes((_WHOLE_BINARY, mask | 126)) + size.to_bytes(2, "big")
    return bytes((_WHOLE_BINARY, mask | 127)) + size.to_bytes(8, "big")


class PartialFrame:
    """The beginning of a whole message's frame, until its rest has come. It holds no more than that frame has bytes."""

    __slots__ = ("_held", "_needed")

    def __init__(self) -> None:
        self._held, self._needed = bytearray(), 0

    def __bool__(self) -> bool:
        return bool(self._held)

    def join(self, data: bytes) -> bytes:
        """Returns what is to be parsed now that `data` came; nothing as long as the frame is not complete."""
        if not self._held:
            return data
        self._held += data
        return b"" if len(self._held) < self._needed else self.take()

    def take(self) -> bytes:
        """Returns what is held, and holds it no longer."""
        data, self._held = bytes(self._held), bytearray()
        return data

    def hold(self, data: bytes, size: int) -> None:
        """Holds the beginning of a frame of `size` bytes."""
        self._held, self._needed = bytearray(data), size


_UVICORN_MEMBERS = (
    "app", "app_state", "asgi_version", "client", "close_sent", "close_timer", "close_timeout", "config", "conn", "connections",
    "curr_msg_data_type", "default_headers", "disconnected", "frames", "handshake_complete", "handshake_initiated",
    "initial_response", "last_ping_rtt", "logger", "loop", "pending_ping_payload", "ping_interval", "ping_sent_at",
    "ping_timeout", "ping_timer", "pong_timer", "queue", "read_paused", "request", "response", "root_path", "scheme", "scope",
    "server", "tasks", "transport", "writable",
)  # fmt: skip


class FastPathWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol with the fast path.

    Its members are slots, those that uvicorn sets too: with more than 30 others, each instance would have a whole dictionary of
    its own (CPython's limit for shared keys), which takes 2 KB more.
    """

    __slots__ = (*_UVICORN_MEMBERS, "_filter", "_handler", "_limit", "_partial")

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._limit = 0
        self._handler: MessageHandler | None = None
        self._filter: MessageFilter | None = None
        self._partial = PartialFrame()
        self.queue = LeanQueue[Any]()  # type: ignore[assignment]  # has what uvicorn uses of it
        self.writable = LeanEvent()  # type: ignore[assignment]  # likewise
        self.writable.set()

    def handle_connect(self, event: Any) -> None:
        """Lets the app set this connection's maximum message size. Before that the server's maximum applies."""
        super().handle_connect(event)
        self._limit = self.config.ws_max_size
        if self.response.status_code == 101:
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[FRAME_LIMIT_EXTENSION] = self._set_limit
            extensions[DIRECT_EXTENSION], extensions[FILTER_EXTENSION] = self._set_handler, self._set_filter
            extensions[WRITE_EXTENSION] = self._try_send

    def start_keepalive(self) -> None:
        """Begins to send pings, as the last step of the handshake, whose messages are not held any longer."""
        super().start_keepalive()
        self.request.headers.clear()  # the library's parser holds the request as long as the connection lasts
        self.response.headers.clear()

    def _set_limit(self, size: int) -> None:
        conn: Any = self.conn
        self._limit = conn.max_message_size = size

    def _set_handler(self, handler: MessageHandler) -> DirectSocket:
        self._handler = handler
        return self

    def _set_filter(self, message_filter: MessageFilter) -> None:
        self._filter = message_filter

    def _try_send(self, message: bytes) -> bool:
        if not self.writable.is_set() or self.conn.state is not OPEN or self.close_sent or self.transport.is_closing():
            return False
        self.transport.write(message_head(len(message)) + message)
        return True

    # DirectSocket

    def send_parts(self, parts: Sequence[bytes]) -> None:
        """See DirectSocket."""
        if self.conn.state is OPEN and not self.close_sent and not self.transport.is_closing():
            self.transport.write(b"".join((message_head(sum(map(len, parts))), *parts)))

    def pause_reading(self) -> None:
        """See DirectSocket."""
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """See DirectSocket."""
        if self.read_paused:
            self.read_paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def pause_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        super().pause_writing()
        if self._handler is not None:
            self._handler.pause_writing()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        super().resume_writing()
        if self._handler is not None:
            self._handler.resume_writing()

    # Messages

    def handle_cont(self, event: Any) -> None:
        """Counts a fragment and closes the connection if there are too many."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self.conn.fail(1009, f"more than {MAX_FRAGMENTS} fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        """Gives a message that the library parsed to the app."""
        handler = self._handler
        if handler is None:
            if self._filter is not None and self.curr_msg_data_type == "bytes" and not self.close_sent:
                self.frames = [b"".join(self.frames)]
                if not self._filter(self.frames):
                    self.frames = []
                    return
            super().send_receive_event_to_app()
            return
        data, self.frames = b"".join(self.frames), []
        if not self.close_sent:
            text = self.curr_msg_data_type == "text"
            handler.message_received(data.decode(errors="replace") if text else data)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        conn: Any = self.conn
        if conn.state is OPEN and not self.close_sent and conn.current_size is None and not conn.reader.buffer:
            data = self._take_messages(self._partial.join(data))
            if not data:
                return
        elif self._partial:
            data = self._partial.take() + data
        super().data_received(data)

    def _take_messages(self, data: bytes) -> bytes:
        """Takes the whole binary messages at the start of the data. Returns the rest, unless it only lacks the end of one."""
        at, end, limit = 0, len(data), self._limit
        messages = list[bytes]()
        while end - at >= _SHORTEST:
            first, size = _HEAD.unpack_from(data, at)
            if first == _MEDIUM:
                start = at + 8
            elif _SHORT <= first < _MEDIUM:
                size, start = first - _SHORT, at + 6
            elif first == _LONG:
                size, start = int.from_bytes(data[at + 2 : at + 10], "big"), at + 14
            else:
                break
            stop = start + size
            if size > limit or stop > end:
                break
            messages.append(apply_mask(data[start:stop], data[start - 4 : start]))
            at = stop
        if messages:
            self._pass_on(messages)
        rest = data[at:] if at else data
        return b"" if self._hold(rest) else rest

    def _hold(self, data: bytes) -> bool:
        """Holds the data if it is the incomplete frame of a whole binary message."""
        if len(data) < 2 or data[0] != _WHOLE_BINARY or not data[1] & _MASKED:
            return False
        size, head = data[1] & 0x7F, 2
        if size >= 126:
            head = 4 if size == 126 else 10
            size = 0 if len(data) < head else int.from_bytes(data[2:head], "big")
        if size > self._limit:
            return False
        self._partial.hold(data, head + 4 + size)
        return True

    def _pass_on(self, messages: Sequence[bytes]) -> None:
        """Gives messages to the app. While any of them are events that it has not received, no more is read."""
        if self._handler is not None:
            for message in messages:
                if not self.close_sent:
                    self._handler.message_received(message)
            return
        if self._filter is not None:
            messages = self._filter(messages)
        for message in messages:
            self.queue.put_nowait({"type": "websocket.receive", "bytes": message})
        if messages and not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
