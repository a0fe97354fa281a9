"""A transport that writes once what is written to it in one turn of the event loop.

Heads and bodies, or several small frames, then leave in one system call and wake the other side once: a good part of what a
small message costs.
"""

from __future__ import annotations

import asyncio
from typing import Any

_AT_ONCE = 16 * 1024


class BufferedTransport:
    """An asyncio.Transport in front of another. What it does not say itself, the other one says."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []
        self._size = 0
        self._written = 0

    @property
    def taken(self) -> int:
        """Bytes that the system has taken of what was written here."""
        return self._written - self._transport.get_write_buffer_size()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """See asyncio.WriteTransport. Much at once is not held back."""
        if not data:
            return
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)
        self._size += len(data)
        if self._size > _AT_ONCE:
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
        self._held.clear()
        self._transport.abort()

    def _flush(self) -> None:
        if self._held:
            data = self._held[0] if len(self._held) == 1 else b"".join(self._held)
            self._held.clear()
            self._size = 0
            if not self._transport.is_closing():  # the other side may have gone meanwhile
                self._written += len(data)
                self._transport.write(data)


def buffered(transport: Any) -> Any:
    """The transport, buffered once."""
    return transport if isinstance(transport, BufferedTransport) else BufferedTransport(transport)
