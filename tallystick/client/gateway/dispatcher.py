"""The gateway's first step with a request: what it asks for, and whether its caller may ask.

Requests for jobs, which are nearly all of them, go to their handler without passing Starlette's middleware and routes, and most
of them without ASGI.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

from tallystick.client.gateway.auth import ANONYMOUS, CALLER_KEY, OPEN_PATHS, Authenticator
from tallystick.client.gateway.paths import read_target
from tallystick.protocol.errors import TallyError
from tallystick.protocol.routes import ALWAYS, MESSAGES, RESPONSES
from tallystick.runtime.http_direct import DirectRequest

PATH_MODEL: Final = "tally.model"
"""Scope member with the model that the request's path names, or None."""
JOB_ROUTES: Final = frozenset((*ALWAYS, RESPONSES, MESSAGES))
"""Routes to which every POST request is one for a job."""


class JobHandler(Protocol):
    """Answers requests for jobs, by ASGI or without it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        ...

    async def serve(self, request: DirectRequest) -> None:
        """See DirectRoutes."""
        ...


class Dispatcher:
    """Authenticates requests, and passes them on to `handler` if they are for JOB_ROUTES, else to `app`.

    It is an ASGI app; `serve` takes a request that comes without ASGI.
    Each request's path is replaced by that of the route that it stands for. Requests to OPEN_PATHS, and to pages where one can
    log in, are passed on for every caller, marked ANONYMOUS. `refuse` sends an error.
    """

    def __init__(
        self,
        handler: JobHandler,
        app: ASGIApp,
        authenticator: Authenticator,
        refuse: Callable[[Scope, Send, TallyError], Awaitable[None]],
    ) -> None:
        self._handler, self._app, self._authenticator, self._refuse = handler, app, authenticator, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] not in JOB_ROUTES:
            target = read_target(scope["path"])
            scope = {**scope, "path": target.path, "raw_path": quote(target.path).encode(), PATH_MODEL: target.model}
        try:
            scope[CALLER_KEY] = self._authenticator.authenticate(scope)
        except TallyError as error:
            if scope["path"] not in OPEN_PATHS and not self._authenticator.is_page(scope["path"]):
                await self._refuse(scope, send, error)
                return
            scope[ANONYMOUS] = True
        is_job = scope["method"] == "POST" and scope["path"] in JOB_ROUTES
        await (self._handler if is_job else self._app)(scope, receive, send)

    async def serve(self, request: DirectRequest) -> None:
        """Serves one request to JOB_ROUTES without ASGI."""
        try:
            request.scope[CALLER_KEY] = self._authenticator.authenticate(request.scope)
        except TallyError as error:
            await self._refuse(request.scope, request, error)
            return
        await self._handler.serve(request)
