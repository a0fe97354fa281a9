"""uvicorn's WebSocket with a short way for what a server of nodes gets most: whole binary messages in one frame.

The library (websockets, in Python) parses every other frame, and everything while one of its own is unfinished; so it alone
decides about fragments, pings, closes and errors. The short way takes a third of what a relayed chunk costs.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import OPEN

try:
    from websockets.speedups import apply_mask
except ImportError:  # a platform without the compiled part
    from websockets.utils import apply_mask

_WHOLE_BINARY = 0x82
"""FIN and opcode 2, no extension bits (RFC 6455, 5.2)."""
_MASKED = 0x80
FRAGMENTS = 64
"""Fragments that a message may come in; clients of ours send none. Empty ones would count for no size limit."""
LIMIT = "tallystick.frame_limit"
"""The ASGI extension by which an app changes how many bytes the messages of one connection may have: a function of the bytes."""


class FastPathWebSocket(WebSocketsSansIOProtocol):
    """See the module's docstring."""

    _limit = 0

    def handle_connect(self, event: Any) -> None:
        """Offers the app to set the limit of this connection's messages, until when the server's holds."""
        super().handle_connect(event)
        self._limit = self.config.ws_max_size
        if self.response.status_code == 101:
            self.scope["extensions"] |= {LIMIT: self._set_limit}  # type: ignore[dict-item]  # one of our own

    def _set_limit(self, size: int) -> None:
        conn: Any = self.conn
        self._limit = conn.max_message_size = size

    def handle_cont(self, event: Any) -> None:
        """One more fragment."""
        if len(self.frames) >= FRAGMENTS:
            self.conn.fail(1009, f"more than {FRAGMENTS} fragments")
            self.handle_parser_exception()
            return
        super().handle_cont(event)

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        conn: Any = self.conn
        if conn.state is OPEN and not self.close_sent and conn.current_size is None and not conn.reader.buffer:
            data = self._take_messages(data)
            if not data:
                return
        super().data_received(data)

    def _take_messages(self, data: bytes) -> bytes:
        """Queues the whole binary messages that the data begins with; returns the rest."""
        at, end, limit = 0, len(data), self._limit
        while end - at >= 6 and data[at] == _WHOLE_BINARY and data[at + 1] & _MASKED:
            size, head = data[at + 1] & 0x7F, at + 2
            if size == 126:
                size, head = int.from_bytes(data[head : head + 2], "big"), head + 2
            elif size == 127:
                size, head = int.from_bytes(data[head : head + 8], "big"), head + 8
            stop = head + 4 + size
            if stop > end or size > limit:
                break
            payload = apply_mask(data[head + 4 : stop], data[head : head + 4])
            self.queue.put_nowait({"type": "websocket.receive", "bytes": payload})
            at = stop
        if at and not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
        return data[at:] if at else data
