"""A node's WebSocket connection: bounded frames in, a bounded queue of frames out. No sender waits for a slow node.

Nearly all nodes are idle or read at once, so a link has a queue, and a task that sends from it, only while frames wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Send

from coordinator.domain.peer_errors import error_for_peers
from coordinator.domain.resource_bounds import OUTBOX_BYTES, OUTBOX_FRAMES, SMALL_FRAME_BYTES
from coordinator.http.watchdog import Watchdog
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError
from tallystick.protocol.wire import Kind, dumps, pack_link
from tallystick.runtime.connection_limiter import address_key

CLOSE_SECONDS = 5
"""How long a node has to take its last frame and the close."""


class LinkClosed(Exception):
    """The node's connection ended."""


def queue_all(_frame: bytes) -> bool:
    """Sends nothing at once, for a server that cannot."""
    return False


class NodeLink:
    """One connection. A node that lets its queue fill up is disconnected, and its jobs fail over."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        address: str,
        queued: Counter[str],
        try_send: Callable[[bytes], bool] = queue_all,
    ) -> None:
        """`queued`: the bytes that wait, by address; this link counts its own bytes there. `try_send`: sends a frame at once if
        the node reads (websocket.WRITE_EXTENSION).
        """
        self.address = address
        self._receive, self._send, self._try_send = receive, send, try_send
        self._key, self._queued, self._waiting = address_key(address), queued, 0
        self._outbox: deque[bytes] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._closed = self._overflowed = False
        self._watchdog: Watchdog | None = None
        self.heard = False
        """Whether a frame came that `receive` does not return, since it last looked."""
        self.takes_replicas = False
        """Whether the node takes REPLICAS frames; only after its WELCOME."""
        self._failure: Exception | None = None

    def enqueue(self, frame: bytes) -> bool:
        """Sends a frame, or queues it if the node does not read at once. Returns False for a job that does not fit into the bytes
        of this address; it is not queued.

        Small frames are always queued. Otherwise jobs that fill the queue exactly, or another link of the address that does not
        read, would close the link of a working node.
        """
        if not self._waiting and not self._closed and self._try_send(frame):
            return True
        if self._waiting and len(frame) > SMALL_FRAME_BYTES and self._queued[self._key] + len(frame) > OUTBOX_BYTES:
            if frame[0] == Kind.DISPATCH:
                return False
            self._overflow()
        elif self._outbox is not None and len(self._outbox) >= OUTBOX_FRAMES:
            self._overflow()
        else:
            self._queue(frame)
        return True

    def _queue(self, frame: bytes) -> None:
        if self._outbox is None:
            self._outbox = deque()
            self._writer = asyncio.create_task(self._write(self._outbox), name=f"to {self.address}")
        self._outbox.append(frame)
        self._count(len(frame))

    def _overflow(self) -> None:
        self._overflowed = True
        self._interrupt()

    def fail(self, error: Exception) -> None:
        """Makes `receive` raise this error."""
        self._failure = self._failure or error
        self._interrupt()

    @property
    def failed(self) -> bool:
        """Whether `fail` was called."""
        return self._failure is not None

    def _interrupt(self) -> None:
        if self._watchdog is not None:
            self._watchdog.trip()

    def _count(self, size: int) -> None:
        self._waiting += size
        self._queued[self._key] += size
        if not self._queued[self._key]:
            del self._queued[self._key]

    def discard_queue(self) -> None:
        """Discards all queued frames, after the link has ended."""
        if self._writer is not None:
            self._writer.cancel()
        self._outbox = self._writer = None
        self._count(-self._waiting)

    async def _write(self, outbox: deque[bytes]) -> None:
        """Sends the queued frames. A frame counts as queued until it is sent, so no later one overtakes it."""
        while outbox and not self._closed:
            frame = outbox.popleft()
            await self.send_now(frame)
            self._count(-len(frame))
        if not self._closed:
            self._outbox = self._writer = None

    async def send_now(self, frame: bytes) -> None:
        """Sends a frame past the queue. A lost connection shows in `receive`."""
        try:
            await self._send({"type": "websocket.send", "bytes": frame})
        except (OSError, RuntimeError):
            self._closed = True

    async def receive(self, watchdog: Watchdog) -> bytes:
        """Returns the next frame. Raises LinkClosed, BadMessage for text, Refusal for a node that is silent or does not read,
        and what `fail` was given.
        """
        self._watchdog = watchdog
        event: Any = None
        while event is None and not self._overflowed and self._failure is None:
            self.heard = False
            try:
                event = await watchdog.wait(self._receive())
            except TimeoutError:
                if not self.heard:
                    break
        if self._failure is not None:
            raise self._failure
        if event is None:
            text = "the node does not read what is sent to it" if self._overflowed else "the node was silent for too long"
            raise Refusal(Code.NODE_GONE, f"link: {text}", fault=Fault.PROVIDER)
        if event["type"] == "websocket.disconnect":
            self._closed = True
            raise LinkClosed
        frame = event.get("bytes")
        if frame is None:
            raise BadMessage("link: expected binary frames, got text")
        return bytes(frame)

    async def refuse(self, error: TallyError) -> None:
        """Sends the error, then closes the connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                if not self._closed:
                    await self.send_now(pack_link(Kind.ERROR, payload=dumps(error_for_peers(error).as_json())))
                await self.close()

    async def close(self) -> None:
        """Closes the connection; waits for the node for CLOSE_SECONDS at most."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(TimeoutError, OSError, RuntimeError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._send({"type": "websocket.close", "code": 1000})
