"""The request limiter: an ASGI middleware that bounds what the control plane holds and spends per address.

A body is read whole, within its limit, before the app sees it. A response counts as under way until its client has taken it. An
address has a number of slots; further requests of that address wait for one.
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
from coordinator.http.request_bodies import RequestBodies, refuse_codings
from tallystick.protocol.errors import TallyError, retry_headers
from tallystick.protocol.wire import dumps
from tallystick.runtime.connection_limiter import address_key
from tallystick.web.sign_in_routes import SIGN_IN_PATHS


class RequestLimiter:
    """Wraps the control plane's ASGI app."""

    def __init__(self, app: ASGIApp, rate_limiter: RateLimiter, bodies: RequestBodies) -> None:
        self._app, self._rate_limiter, self._bodies = app, rate_limiter, bodies
        self._slots: dict[str, tuple[asyncio.Semaphore, int]] = {}
        """By address: its slots, and the number of requests that use or wait for them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = (scope.get("client") or ("",))[0]
        measured = _MeasuredSend(send)
        signs_in = scope["method"] == "POST" and scope["path"] in SIGN_IN_PATHS
        try:
            if signs_in:
                self._rate_limiter.count_sign_in(address)
            else:
                self._rate_limiter.count_request(address)
            async with self._slot(address_key(address)):
                await self._serve(scope, receive, measured, address)
        except TallyError as error:
            await send_error(measured, error)
        except ConnectionResetError:
            return
        if not signs_in:
            self._rate_limiter.count_response(address, measured.status, measured.size)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, address: str) -> None:
        if scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            await self._app(scope, receive, send)
            return
        refuse_codings(scope)
        reservation = self._bodies.begin(address)
        try:
            body = await self._bodies.read(receive, reservation, MAX_CONTROL_BODY, "a request of this route")
            await self._app(scope, _ReplayedBody(body, receive), send)
        finally:
            self._bodies.close(reservation)

    @asynccontextmanager
    async def _slot(self, key: str) -> AsyncIterator[None]:
        """Waits for a slot of the address and holds it."""
        slots, users = self._slots.get(key) or (asyncio.Semaphore(CONTROL_CONCURRENCY), 0)
        self._slots[key] = slots, users + 1
        try:
            async with slots:
                yield
        finally:
            users = self._slots[key][1] - 1
            if users:
                self._slots[key] = slots, users
            else:
                del self._slots[key]


class _ReplayedBody:
    """An ASGI `receive` that returns a body that was read already, then the events that follow it."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Any:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


class _MeasuredSend:
    """An ASGI `send` that records status and size. The end is sent apart, which waits until the client took the rest."""

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
    """Sends an error as the whole response to a request."""
    shown = error_for_peers(error)
    headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    headers += [(name.encode(), value.encode()) for name, value in retry_headers(shown).items()]
    await send({"type": "http.response.start", "status": shown.status, "headers": headers})
    await send({"type": "http.response.body", "body": dumps(shown.as_json())})
