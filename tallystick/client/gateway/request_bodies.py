"""Bounds what callers can make the gateway hold: request bodies, each and in all, and answers that callers do not read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Message, Receive, Send

from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable

BODY_TIMEOUT_SECONDS = 60
"""Seconds within which a request's body must arrive."""
SEND_TIMEOUT_SECONDS = 300
"""Seconds without progress after which a caller that does not read its answer is disconnected and its job cancelled."""


class ClientStalled(Exception):
    """The caller does not read its answer."""


class RequestBodies:
    """Limits the bytes of one body and of all bodies together. A body counts from its arrival until its request is over."""

    def __init__(self, max_body: int, max_total: int) -> None:
        self._max_body, self._max_total = max_body, max_total
        self.held = 0

    @contextlib.asynccontextmanager
    async def read(self, receive: Receive) -> AsyncIterator[bytes | None]:
        """Reads a request's body, which counts until the block ends. Yields None if the caller disconnected meanwhile.

        Raises Refusal for a body that is too long or too slow, and Unavailable if all bodies together leave no room for it.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_SECONDS) as deadline:
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
            if not deadline.expired():
                raise
            raise Refusal(Code.TIMED_OUT, f"request body: expected within {BODY_TIMEOUT_SECONDS} seconds") from None
        finally:
            self.held -= size

    def _check(self, size: int, added: int) -> None:
        if size > self._max_body:
            raise Refusal(Code.BODY_TOO_LARGE, f"request body: expected at most {self._max_body} bytes (max_body_bytes)")
        if self.held + added > self._max_total:
            text = f"the running requests fill the gateway's {self._max_total} bytes (max_total_body_bytes); try again later"
            raise Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)


def with_send_timeout(send: Send) -> Send:
    """A `send` that raises ClientStalled if the caller reads nothing for SEND_TIMEOUT_SECONDS."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                await send(message)
        except TimeoutError:
            raise ClientStalled(f"the caller read nothing for {SEND_TIMEOUT_SECONDS} seconds") from None

    return send_in_time
