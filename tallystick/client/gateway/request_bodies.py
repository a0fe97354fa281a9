"""Bounds what callers can make the gateway hold: request bodies, each and in all, and answers that callers do not read.

Bodies with a Content-Encoding are decoded, and the limits hold before and after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from starlette.types import Message, Receive, Send

from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.runtime.content_encoding import decode
from tallystick.runtime.deadlines import wait_within
from tallystick.runtime.http_direct import ClientStalled

BODY_TIMEOUT_SECONDS = 60
"""Seconds within which a request's body must arrive."""
SEND_TIMEOUT_SECONDS = 300
"""Seconds without progress after which a caller that does not read its answer is disconnected and its job cancelled."""
MAX_DECODERS = 4
"""Bodies that are decoded at the same time. A decoder may hold 16 MiB."""


class RequestBodies:
    """Limits the bytes of one body and of all bodies together. A body counts from its arrival until its request is over."""

    def __init__(self, max_body: int, max_total: int) -> None:
        self._max_body, self._max_total = max_body, max_total
        self.held = 0
        self._decoders = asyncio.Semaphore(MAX_DECODERS)

    def read(self, receive: Receive, codings: Sequence[str] = (), take: Callable[[], bytes | None] | None = None) -> _Reading:
        """A context manager that reads a request's body, which counts until the block ends. It gives None if the caller
        disconnected meanwhile.

        `codings`: its Content-Encoding; see `read_codings`. `take`: gives the whole body if it is here.

        Entering raises BadMessage for a body that does not decode, Refusal for one that is too long or too slow, and Unavailable
        if all bodies together leave no room for it.
        """
        return _Reading(self, receive, codings, take)

    async def read_into(self, held: _HeldParts, receive: Receive, codings: Sequence[str]) -> tuple[_HeldParts, bytes | None]:
        """Reads a body; see `read`. Returns what counts for it."""
        complete = await _receive_parts(receive, held)
        if complete and codings:
            held = await self._decode(held, codings)
        return held, held.join() if complete else None

    async def _decode(self, encoded: _HeldParts, codings: Sequence[str]) -> _HeldParts:
        """The decoded body. The encoded one is released."""
        decoded = _HeldParts(self)
        try:
            async with self._decoders:
                for part in decode(encoded.join(), codings, self._max_body, "max_body_bytes"):
                    decoded.add(part)
                    await asyncio.sleep(0)  # other requests go on meanwhile
        except BaseException:
            decoded.release()
            raise
        encoded.release()
        return decoded

    def hold(self, size: int, added: int) -> None:
        """Counts `added` bytes of a body that has `size` bytes with them. Raises Refusal or Unavailable; see `read`."""
        if size > self._max_body:
            raise Refusal(Code.BODY_TOO_LARGE, f"request body: expected at most {self._max_body} bytes (max_body_bytes)")
        if self.held + added > self._max_total:
            text = f"the running requests fill the gateway's {self._max_total} bytes (max_total_body_bytes); try again later"
            raise Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)
        self.held += added


class _Reading:
    """See RequestBodies.read."""

    __slots__ = ("_bodies", "_codings", "_held", "_receive", "_take")

    def __init__(
        self, bodies: RequestBodies, receive: Receive, codings: Sequence[str], take: Callable[[], bytes | None] | None
    ) -> None:
        self._bodies, self._receive, self._codings, self._take = bodies, receive, codings, take
        self._held = _HeldParts(bodies)

    async def __aenter__(self) -> bytes | None:
        if self._take is not None and not self._codings and (whole := self._take()) is not None:
            self._held.count(whole)
            return whole
        reading = self._bodies.read_into(self._held, self._receive, self._codings)
        try:
            self._held, body = await wait_within(BODY_TIMEOUT_SECONDS, reading)
        except TimeoutError:
            self._held.release()
            raise Refusal(Code.TIMED_OUT, f"request body: expected within {BODY_TIMEOUT_SECONDS} seconds") from None
        except BaseException:
            self._held.release()
            raise
        return body

    async def __aexit__(self, *_: object) -> None:
        self._held.release()


class _HeldParts:
    """The parts of one body, which count until they are released."""

    def __init__(self, bodies: RequestBodies) -> None:
        self._bodies, self._size, self._parts = bodies, 0, list[bytes]()

    def add(self, part: bytes) -> None:
        """Raises as RequestBodies.read."""
        self.count(part)
        self._parts.append(part)

    def count(self, part: bytes) -> None:
        """Counts a part without keeping it. Raises as RequestBodies.read."""
        self._bodies.hold(self._size + len(part), len(part))
        self._size += len(part)

    def join(self) -> bytes:
        """The whole body, which still counts."""
        body = b"".join(self._parts)
        self._parts.clear()
        return body

    def release(self) -> None:
        """No longer counts the body."""
        self._bodies.held -= self._size
        self._size = 0


async def _receive_parts(receive: Receive, held: _HeldParts) -> bool:
    """Whether the body arrived completely before the caller disconnected."""
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return False
        held.add(event.get("body", b""))
        if not event.get("more_body"):
            return True


def with_send_timeout(send: Send) -> Send:
    """A `send` that raises ClientStalled if the caller reads nothing for SEND_TIMEOUT_SECONDS."""

    async def send_in_time(message: Message) -> None:
        try:
            await wait_within(SEND_TIMEOUT_SECONDS, send(message))
        except TimeoutError:
            raise ClientStalled(f"the caller read nothing for {SEND_TIMEOUT_SECONDS} seconds") from None

    return send_in_time
