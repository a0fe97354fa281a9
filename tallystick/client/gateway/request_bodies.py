"""What callers can make the gateway hold: the bodies of their requests, in all and each for how long, and answers that they do
not take.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Message, Receive, Send

from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable

BODY_TIMEOUT_SECONDS = 60
"""How long a request's body may take to arrive."""
SEND_TIMEOUT_SECONDS = 300
"""How long a caller may take none of its answer before the connection is given up, and its job cancelled."""


class ClientStalled(Exception):
    """The caller does not take its answer."""


class RequestBodies:
    """Room for the bodies of all requests under way, in bytes: a body has room from when it arrives until its request is over."""

    def __init__(self, one: int, together: int) -> None:
        self._one, self._together = one, together
        self.held = 0

    @contextlib.asynccontextmanager
    async def read(self, receive: Receive) -> AsyncIterator[bytes | None]:
        """A request's body, for which there is room inside the block; None if its caller left meanwhile. Raises Refusal where it
        is too long or too slow, Unavailable where all bodies together leave no room for it.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_SECONDS) as waited:
                more = True
                while more:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        break
                    part = event.get("body", b"")
                    self._check(size + len(part), len(part))
                    size += len(part)
                    self.held += len(part)
                    parts.append(part)
                    more = bool(event.get("more_body"))
            body = None if more else b"".join(parts)
            parts.clear()
            yield body
        except TimeoutError:
            if not waited.expired():
                raise
            raise Refusal(Code.TIMED_OUT, f"the request did not arrive within {BODY_TIMEOUT_SECONDS} s") from None
        finally:
            self.held -= size

    def _check(self, size: int, more: int) -> None:
        if size > self._one:
            raise Refusal(Code.BODY_TOO_LARGE, f"the request is longer than {self._one} bytes")
        if self.held + more > self._together:
            text = (
                f"the requests under way have {self._together} bytes, which is all that this gateway holds (max_total_body_bytes)"
            )
            raise Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)


def with_send_timeout(send: Send) -> Send:
    """A `send` that raises ClientStalled where the caller takes nothing for SEND_TIMEOUT_SECONDS."""

    async def in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientStalled(f"the caller took nothing for {SEND_TIMEOUT_SECONDS} s") from None

    return in_time
