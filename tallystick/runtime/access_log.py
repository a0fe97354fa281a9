"""One log line for each request that a server has answered, and what was measured for metrics.

The line has the method, the path, the status and the time; handlers add the job, its model, its outcome and its cost. It never
has a query, a header or a body, so neither prompts nor keys.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tallystick.protocol.health import LIVENESS_PATH, READINESS_PATH
from tallystick.runtime.logs import log_frequent

MAX_PATH = 200
CLIENT_GONE = 499
"""The status of a request whose client left before the answer, after nginx."""
PROBES = frozenset({LIVENESS_PATH, READINESS_PATH, "/metrics", "/health", "/ready", "/v1/health", "/v1/ready"})
"""Paths that are asked every few seconds; their lines are logged at the level debug."""
_fields: ContextVar[dict[str, object] | None] = ContextVar("access", default=None)


@dataclass(slots=True)
class Access:
    """One answered request. Times are seconds from its arrival; `first_seconds` is None without a body."""

    method: str
    path: str
    status: int = CLIENT_GONE
    seconds: float = 0.0
    first_seconds: float | None = None
    sent_bytes: int = 0
    fields: dict[str, object] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """How the request ended, if a handler has said so, else by its status."""
        return str(self.fields.get("outcome") or ("answered" if self.status < 400 else "failed"))


def record(**fields: object) -> None:
    """Adds fields to the line of the request that the caller serves. Does nothing outside of a request."""
    current = _fields.get()
    if current is not None:
        current.update(fields)


def recorded() -> Mapping[str, object]:
    """The fields so far of the line of the request that the caller serves; none outside of a request."""
    return _fields.get() or {}


def begin_access(method: str, path: str) -> Access:
    """Begins the entry of what the current task serves from now on: `record` adds to it."""
    access = Access(method, path)
    _fields.set(access.fields)
    return access


def log_access(access: Access) -> None:
    """Writes the line of an answered request."""
    milliseconds = round(access.seconds * 1_000, 1)
    fields = {"method": access.method, "path": access.path, "status": access.status, "ms": milliseconds, **access.fields}
    log_frequent("debug" if access.path in PROBES else "info", "request", fields)


class AccessLog:
    """ASGI middleware that logs each request once it is answered, and passes it to `observe`."""

    def __init__(
        self, app: ASGIApp, observe: Callable[[Access], None] = lambda _: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._app, self._observe, self._clock = app, observe, clock

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serves one request. What is no request is only passed on."""
        return (self._serve if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin, access = self._clock(), Access(scope["method"], scope["path"][:MAX_PATH])

        def observed(message: Message) -> Awaitable[None]:  # no coroutine of its own: this runs for every chunk
            if message["type"] == "http.response.start":
                access.status = message["status"]
            elif size := len(message.get("body", b"")):
                access.sent_bytes += size
                if access.first_seconds is None:
                    access.first_seconds = self._clock() - begin
            return send(message)

        token = _fields.set(access.fields)
        try:
            await self._app(scope, receive, observed)
        except Exception:
            if access.status == CLIENT_GONE:
                access.status = 500  # which the server answers once it has the error
            raise
        finally:
            _fields.reset(token)
            access.seconds = self._clock() - begin
            self._observe(access)
            log_access(access)
