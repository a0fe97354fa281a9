"""Serving ASGI apps with uvicorn inside a running event loop, and waiting for SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import structlog
import uvicorn

from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.runtime.connection_limiter import LINGERING, ConnectionLimiter, ConnectionLimits
from tallystick.runtime.http_direct import MAX_RECURSION, DirectApp
from tallystick.runtime.ports import describe_holder
from tallystick.runtime.supervision import report_port

resource: ModuleType | None
try:
    import resource
except ImportError:  # a system without such limits
    resource = None

log = structlog.get_logger()
GRACE_SECONDS = 10
KEEP_ALIVE_SECONDS = 75
"""Seconds after which an idle connection is closed. Clients and proxies that keep theirs for up to a minute must close first, as
otherwise a request may meet a connection that is just being closed."""
_DATE_SECONDS = 1.0
OTHER_FILES = 128
"""Open files that a server needs in addition to its connections: databases, the chain, logs."""


@dataclass
class SharedPort:
    """A port on which several processes of one user listen (SO_REUSEPORT, socket(7)). The kernel distributes connections."""

    port: int
    leave: Callable[[], None] = lambda: None
    """Takes no further connections from it, once the port is served. Those that there are go on."""


@contextlib.asynccontextmanager
async def serving(
    app: Any,
    host: str,
    port: int,
    *,
    limits: ConnectionLimits | None = None,
    ws_max_size: int | None = 1 << 20,
    shared: SharedPort | None = None,
) -> AsyncIterator[int]:
    """Serves `app` inside the running loop. Yields the bound port, which differs from `port` if that is 0.

    `ws_max_size`: the most bytes of a WebSocket message; None ignores offers of a WebSocket, and serves the request as it is.
    `shared`: a second port.

    Raises Unavailable (port_unavailable) if it cannot listen.
    """
    config = server_config(app, host, port, limits=limits, ws_max_size=ws_max_size)
    server = _Server(config)
    config.load()
    with contextlib.ExitStack() as listeners:
        listener = listeners.enter_context(listen(host, port))
        sockets = [listener]
        if shared is not None:
            sockets.append(listeners.enter_context(listen(host, shared.port, shared=True)))
            shared.leave = server.leave_shared_port
        task = asyncio.create_task(server.serve(sockets), name="http-server")
        ready = asyncio.create_task(server.ready.wait())
        try:
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            bound = int(listener.getsockname()[1])
            report_port(bound)
            yield bound
        finally:
            ready.cancel()
            server.stop()
            await task


def server_config(
    app: Any, host: str, port: int, *, limits: ConnectionLimits | None = None, ws_max_size: int | None = None
) -> uvicorn.Config:
    """The settings with which `serving` runs uvicorn."""
    direct = app.routes if isinstance(app, DirectApp) else None
    http, websocket = ConnectionLimiter(_within_open_file_limit(limits or ConnectionLimits()), direct).protocols()
    return uvicorn.Config(
        _with_recursion_limit(app),
        interface="asgi3",
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        proxy_headers=False,  # uvicorn would trust each program on this machine; see trusted_proxies.py
        http=http,
        ws="none" if ws_max_size is None else websocket,
        ws_max_size=ws_max_size or 0,
        ws_per_message_deflate=False,
    )


def _settle_memory() -> None:
    """Frees what only the start of a daemon needed, and exempts what is left from garbage collection, which becomes rarer, since
    requests leave few cycles.
    """
    if "alembic" in sys.modules:
        from tallystick.runtime.database_migration import unload_migrations  # noqa: PLC0415 - a server may have no database

        unload_migrations()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it; it returns free pages to the system
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _with_recursion_limit(app: Any) -> Any:
    """The app with a check of the recursion limit before each request: the libraries may be imported at any time."""

    def limited(scope: Any, receive: Any, send: Any) -> Awaitable[None]:  # no coroutine of its own for each connection
        if sys.getrecursionlimit() > MAX_RECURSION:
            sys.setrecursionlimit(MAX_RECURSION)
        awaitable: Awaitable[None] = app(scope, receive, send)
        return awaitable

    return limited


def _within_open_file_limit(limits: ConnectionLimits) -> ConnectionLimits:
    """The limits, with fewer connections if the process may not open enough files. It raises its soft limit first.

    Without a free file descriptor a server cannot even refuse a connection.
    """
    if resource is None:
        return limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.connections + LINGERING + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return limits
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    if soft >= needed:
        return limits
    fewer = max(soft // 2, soft - LINGERING - OTHER_FILES)
    log.warning("fewer connections than configured: the open file limit is too low", connections=fewer, open_files=soft)
    return replace(limits, connections=min(limits.connections, fewer))


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that listens. `shared`: see SharedPort.

    Raises Unavailable (port_unavailable).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, reuse_port=shared)
    except (OSError, OverflowError, ValueError) as error:  # a ValueError where ports cannot be shared
        holder = describe_holder(port) if getattr(error, "errno", None) == errno.EADDRINUSE else None
        reason = f"{holder} listens there" if holder else str(error)
        text = f"cannot listen on {host} port {port}: {reason}; choose another port with --port, or `port` in the config"
        raise Unavailable(Code.PORT_UNAVAILABLE, text, fault=Fault.CLIENT) from error


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the process's root, and sets `ready` once it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready, self._stopping = asyncio.Event(), asyncio.Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        """Renews the date of answers each second until `stop`. uvicorn's own wakes the process ten times a second to look."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DATE_SECONDS):
                    await self._stopping.wait()

    def leave_shared_port(self) -> None:
        """Stops listening on all ports but the first."""
        for server in self.servers[1:]:
            server.close()

    def stop(self) -> None:
        """Ends the server, which completes the requests under way."""
        self.should_exit = True
        self._stopping.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def wait_for_stop_signal() -> None:
    """Returns on the first SIGTERM or SIGINT. After that the default handlers are back, so a second signal ends the process."""
    _settle_memory()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        await stopped.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
