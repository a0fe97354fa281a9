"""The client's end of a WebSocket, with a fast path for binary messages that arrive whole in one frame.

The websockets library connects (through TLS and proxies), and parses all other frames, as it does for the server
(runtime/websocket.py). Messages come as calls, so they cost no queue and no turn of a task. Messages of one turn of the event
loop leave in one write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.frames import Opcode
from websockets.protocol import CLOSED, OPEN
from websockets.proxy import get_proxy

from tallystick.runtime.buffered_transport import buffered
from tallystick.runtime.websocket import MAX_FRAGMENTS, PartialFrame, message_head

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without the compiled part
    from websockets.utils import apply_mask

_WHOLE_BINARY = 0x82
_MASKED = 0x80
_DATA = (Opcode.BINARY, Opcode.TEXT, Opcode.CONT)
_KEYS = 1_024
"""Masking keys that are drawn at once. A draw is a system call."""


class FastPathConnection(ClientConnection):
    """A client's connection.

    `on_message` gets each whole message and must not raise; it is None until the app sets it, and messages wait for `recv` until
    then. `on_writable` is called when the peer reads again after `paused` was true, `on_lost` when the connection has ended.
    """

    on_message: Callable[[bytes | str], None] | None = None
    on_writable: Callable[[], None] | None = None
    on_lost: Callable[[], None] | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._fragments: list[bytes] = []
        self._partial = PartialFrame()
        self._is_text = False
        self._keys, self._key_at = b"", 0

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(buffered(transport))

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def resume_writing(self) -> None:
        """See asyncio.BaseProtocol."""
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()

    def send_parts(self, parts: Sequence[bytes]) -> bool:
        """Sends one binary message, whose parts are joined. Returns False once the connection is closing."""
        if self.protocol.state is not OPEN or self.transport.is_closing():
            return False
        payload, key = b"".join(parts), self._next_key()
        self.transport.write(b"".join((message_head(len(payload), _MASKED), key, apply_mask(payload, key))))
        return True

    def _next_key(self) -> bytes:
        """A masking key that nobody can predict (RFC 6455, 5.3)."""
        if self._key_at == len(self._keys):
            self._keys, self._key_at = os.urandom(4 * _KEYS), 0
        self._key_at += 4
        return self._keys[self._key_at - 4 : self._key_at]

    def process_event(self, event: Any) -> None:
        """Takes what the library parsed."""
        handler = self.on_message
        if handler is None or self.response is None or event.opcode not in _DATA:
            super().process_event(event)
            return
        if event.opcode is not Opcode.CONT:
            self._is_text = event.opcode is Opcode.TEXT
        self._fragments.append(bytes(event.data))
        if len(self._fragments) > MAX_FRAGMENTS:
            self.transport.abort()
        elif event.fin:
            data, self._fragments = b"".join(self._fragments), []
            handler(data.decode(errors="replace") if self._is_text else data)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        conn: Any = self.protocol
        if self.on_message is not None and conn.state is OPEN and conn.current_size is None and not conn.reader.buffer:
            data = self._take_messages(self._partial.join(data), conn.max_message_size)
            if not data:
                return
        elif self._partial:
            data = self._partial.take() + data
        if conn.state is not CLOSED:
            super().data_received(data)

    def _take_messages(self, data: bytes, limit: int) -> bytes:
        """Takes the whole binary messages at the start of the data. Returns the rest, unless it only lacks the end of one."""
        at, end = 0, len(data)
        while end - at >= 2 and data[at] == _WHOLE_BINARY and self.on_message is not None:
            size, head = data[at + 1], at + 2
            if size == 126:
                size, head = int.from_bytes(data[head : head + 2], "big"), head + 2
            elif size == 127:
                size, head = int.from_bytes(data[head : head + 8], "big"), head + 8
            elif size > 127:  # masked, which no server may do (RFC 6455, 5.1): the library refuses it
                break
            stop = head + size
            if head > end:  # the length is not complete
                size, stop = 0, head
            if size > limit:
                break
            if stop > end:
                self._partial.hold(data[at:], stop - at)
                return b""
            at = stop
            self.on_message(data[head:stop])
        return data[at:] if at else data


CheckPeer = Callable[[str], None]
"""Takes the IP address that a connection led to. Raises OSError if it may not be used."""


class DirectConnect(connect):
    """websockets' `connect` without redirects: what is sent is meant for the configured server alone."""

    check_peer: CheckPeer | None = None

    async def open_tcp_connection(self) -> ClientConnection:
        """See websockets. Checks the peer's address before anything is sent; behind a proxy, it is the proxy that resolves."""
        connection = await super().open_tcp_connection()
        if self.check_peer is not None and (self.proxy is None or get_proxy(self.ws_uri) is None):
            try:
                self.check_peer((connection.transport.get_extra_info("peername") or ("",))[0])
            except OSError:
                connection.transport.abort()
                raise
        return connection

    def process_redirect(self, exc: Exception) -> Exception:
        """See websockets."""
        return exc


async def open_websocket(
    url: str,
    *,
    max_size: int,
    open_seconds: float,
    ping_seconds: float,
    close_seconds: float,
    user_agent: str,
    use_proxy: bool,
    check_peer: CheckPeer | None = None,
) -> FastPathConnection:
    """Opens a connection. `use_proxy`: whether the environment's proxy settings apply. Times are seconds, sizes bytes.

    `check_peer` is called with the server's address, unless a proxy resolves its name, before the handshake.

    Raises OSError, TimeoutError, and WebSocketException if the server does not open a WebSocket.
    """
    opening = DirectConnect(
        url,
        create_connection=FastPathConnection,
        open_timeout=open_seconds,
        ping_interval=ping_seconds,
        ping_timeout=ping_seconds,
        close_timeout=close_seconds,
        max_size=max_size,
        compression=None,
        proxy=True if use_proxy else None,
        user_agent_header=user_agent,
    )
    opening.check_peer = check_peer
    connection = await opening
    if not isinstance(connection, FastPathConnection):
        raise TypeError("websockets made a connection of another class")
    return connection
