"""One session of a node's link: what waits to be sent, and how the connection ends."""

from __future__ import annotations

import asyncio
from collections import deque

from websockets.exceptions import WebSocketException

from node.ports import LinkLost
from tallystick.protocol.link import Listing
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import Kind, pack_link
from tallystick.runtime.websocket_client import FastPathConnection

_NOTHING = Listing((), (), {})
MAX_OUTBOX_FACTOR = 16
HOLD_SECONDS = 0.02
"""Deadlines of coordinators that an ACCEPT meets are seconds."""


class LinkSession:
    """One connected session (ports.Link).

    Posted frames leave at once, those of one turn of the event loop in one write. An ACCEPT waits HOLD_SECONDS for another frame,
    so that the coordinator wakes up once for both. While the coordinator does not read, frames wait in order and one task writes
    them. `drain` slows down a sender that posts more than the coordinator reads.
    """

    def __init__(
        self,
        socket: FastPathConnection,
        coordinator: Address,
        outbox_frames: int,
        announced: Listing = _NOTHING,
        endpoint: str = "",
        *,
        payer_asks: bool = False,
    ) -> None:
        """`announced`: what HELLO carried, or ASKS later; `endpoint`: see ports.Link; `payer_asks`: see link.Challenge."""
        self.payer_asks = payer_asks
        self.socket, self.coordinator, self.announced, self.endpoint = socket, coordinator, announced, endpoint
        self.reported = dict(announced.capacities)
        """The capacities that the coordinator knows."""
        self.problem, self.log_head, self.told_head = "", b"", b""
        self.refused = False
        """Whether the coordinator sent an error, or broke the protocol."""
        self._limit = outbox_frames
        self._loop = asyncio.get_running_loop()
        self._held: list[JobId] = []
        """Jobs whose ACCEPT waits for another frame."""
        self._holding: asyncio.TimerHandle | None = None
        self._outbox: deque[bytes] = deque()
        self._posted, self._room, self._empty = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._room.set()
        self._empty.set()
        self._closed = False
        self._ending: asyncio.Task[None] | None = None

    def post(self, kind: Kind, job: JobId, payload: bytes = b"") -> None:
        """See ports.Link.

        The queue is limited by `drain` and by the credit of running jobs. The connection ends if answers to a coordinator that
        does not read fill the queue MAX_OUTBOX_FACTOR times over.
        """
        if kind is Kind.ACCEPT and len(self._held) < self._limit:
            self._held.append(job)
            if self._holding is None:
                self._holding = self._loop.call_later(HOLD_SECONDS, self._release)
            return
        if self._held:
            self._release()
        self._send(kind, job, payload)

    def _release(self) -> None:
        """Sends the ACCEPT frames that were held."""
        if self._holding is not None:
            self._holding.cancel()
            self._holding = None
        held, self._held = self._held, []
        for job in held:
            self._send(Kind.ACCEPT, job, b"")

    def _send(self, kind: Kind, job: JobId, payload: bytes) -> None:
        if self._closed:
            return
        if not self._outbox and not self.socket.paused:
            if not self.socket.send_parts((bytes((kind,)), job, payload)):
                self.close()
            return
        if len(self._outbox) >= MAX_OUTBOX_FACTOR * self._limit:
            self.problem = f"the coordinator does not read: {len(self._outbox)} frames are waiting"
            self.close()
            self.socket.transport.abort()
            return
        self._outbox.append(pack_link(kind, job, payload))
        self._posted.set()
        self._empty.clear()
        if len(self._outbox) >= self._limit:
            self._room.clear()

    @property
    def has_room(self) -> bool:
        """See ports.Link."""
        return not self._closed and self._room.is_set()

    @property
    def is_lost(self) -> bool:
        """See ports.Link."""
        return self._closed

    async def drain(self) -> None:
        """See ports.Link."""
        if not self._room.is_set():
            await self._room.wait()
        if self._closed:
            raise LinkLost

    async def write(self) -> None:
        """Sends what is posted, until the connection ends."""
        try:
            while True:
                await self._posted.wait()
                while self._outbox:
                    await self.socket.send(self._outbox.popleft())
                    if len(self._outbox) < self._limit // 2:
                        self._room.set()
                self._posted.clear()
                self._empty.set()
        except WebSocketException:
            self.close()

    async def flush(self, seconds: float) -> None:
        """Waits until everything posted was sent, for at most `seconds`."""
        self._release()
        await wait_for(self._empty, seconds)

    def end_soon(self, reason: str, code: int) -> None:
        """Begins to close the connection with a reason."""
        self._ending = asyncio.create_task(self.end(reason, code), name="link end")

    async def end(self, reason: str, code: int = 1000) -> None:
        """Closes the connection with a reason."""
        self.close()
        await self.socket.close(code, reason)

    def close(self) -> None:
        """Marks the session as closed and wakes up waiting senders."""
        self._closed = True
        self._release()
        self._room.set()
        self._empty.set()


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Waits for an event, for at most `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
