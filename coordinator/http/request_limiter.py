"""The gate before the control plane: what its requests may cost an address's share, and how much of them is held.

A body is read whole, within its limit, before the app sees it. A long answer is over when its client has taken it, not when it
was written: so many answers of an address are under way, the others wait their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.domain.peer_errors import error_for_peers
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.resource_bounds import CONTROL_CONCURRENCY, MAX_CONTROL_BODY
from coordinator.http.request_bodies import RequestBodies
from tallystick.protocol.errors import Code, TallyError
from tallystick.protocol.wire import dumps
from tallystick.runtime.connection_limiter import address_key

_SOON = (Code.RATE_LIMITED, Code.NODE_BUSY)


class RequestLimiter:
    """The control plane as an ASGI app behind its gate."""

    def __init__(self, app: ASGIApp, rate_limiter: RateLimiter, bodies: RequestBodies) -> None:
        self._app, self._rate_limiter, self._bodies = app, rate_limiter, bodies
        self._turns: dict[str, tuple[asyncio.Semaphore, int]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0]
        told = _Told(send)
        try:
            self._rate_limiter.count_request(address)
            async with self._turn(address_key(address)):
                await self._pass(scope, receive, told, address)
        except TallyError as error:
            await send_error(told, error)
        except ConnectionResetError:
            return
        self._rate_limiter.count_response(address, told.status, told.size)

    async def _pass(self, scope: Scope, receive: Receive, told: _Told, address: str) -> None:
        if scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            await self._app(scope, receive, told)
            return
        reservation = self._bodies.begin(address)
        try:
            body = await self._bodies.read(receive, reservation, MAX_CONTROL_BODY, "a request of this route")
            await self._app(scope, _Given(body, receive), told)
        finally:
            self._bodies.close(reservation)

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[None]:
        """One of the address's turns, as soon as there is one."""
        turns, users = self._turns.get(key) or (asyncio.Semaphore(CONTROL_CONCURRENCY), 0)
        self._turns[key] = turns, users + 1
        try:
            async with turns:
                yield
        finally:
            users = self._turns[key][1] - 1
            if users:
                self._turns[key] = turns, users
            else:
                del self._turns[key]


class _Given:
    """A body that was read already, then what follows it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Any:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


class _Told:
    """Passes an answer on and notes what it was. The last of it is sent alone: that waits until the client took the rest."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.size = 0, 0

    async def __call__(self, event: Any) -> None:
        if event["type"] == "http.response.start":
            self.status = event["status"]
        elif event.get("body"):
            self.size += len(event["body"])
            await self._send(event | {"more_body": True})
            if event.get("more_body"):
                return
            event = event | {"body": b"", "more_body": False}
        await self._send(event)


async def send_error(send: Send, error: TallyError) -> None:
    """Tells an error as the whole answer to a request."""
    error = error_for_peers(error)
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    if error.code in _SOON:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": dumps(error.as_json())})
