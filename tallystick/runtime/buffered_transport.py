"""A transport that joins all writes of one turn of the event loop into one write.

HTTP heads and bodies, or several small frames, then take one system call and wake the peer once, which makes small messages
much cheaper.
"""

from __future__ import annotations

import asyncio
from typing import Any

_MAX_BUFFERED = 16 * 1024
"""Bytes from which on the buffer is written at once."""


class BufferedTransport:
    """An asyncio.Transport that wraps another one and forwards all other attributes to it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing  # asked before each write: not by way of __getattr__
        self._loop = asyncio.get_running_loop()
        self._chunks: list[bytes] = []
        self._size = 0
        self._written = 0

    @property
    def sent_bytes(self) -> int:
        """The bytes written here that were handed to the operating system."""
        return self._written - self._transport.get_write_buffer_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """See asyncio.WriteTransport."""
        if not data:
            return
        if not self._chunks:
            self._loop.call_soon(self._flush)
        self._chunks.append(data)
        self._size += len(data)
        if self._size > _MAX_BUFFERED:
            self._flush()

    def write_eof(self) -> None:
        """See asyncio.WriteTransport."""
        self._flush()
        self._transport.write_eof()

    def close(self) -> None:
        """See asyncio.BaseTransport."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """See asyncio.WriteTransport."""
        self._chunks.clear()
        self._transport.abort()

    def _flush(self) -> None:
        if self._chunks:
            data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
            self._chunks.clear()
            self._size = 0
            if not self._transport.is_closing():  # the peer may have closed it meanwhile
                self._written += len(data)
                self._transport.write(data)


def buffered(transport: Any) -> Any:
    """The transport itself if it is buffered, else a BufferedTransport around it."""
    return transport if isinstance(transport, BufferedTransport) else BufferedTransport(transport)
