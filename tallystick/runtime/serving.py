"""Serving ASGI apps: uvicorn with uvloop, an orderly stop on SIGTERM and SIGINT, errors in one shape."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import structlog
import uvicorn

from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.runtime.connection_limiter import LINGERING, ConnectionLimiter, ConnectionLimits

resource: ModuleType | None
try:
    import resource
except ImportError:  # a system without such limits
    resource = None

log = structlog.get_logger()
GRACE_SECONDS = 10
OTHER_FILES = 128
"""Open files that a server needs beside its connections: databases, the chain, logs."""
MAX_RECURSION = 12_288
"""What py-evm needs. eth-account's libraries raise Python's limit to 100,000 when they are imported; the standard library's JSON
parser, which FastAPI uses, then overflows the stack on a deeply nested body: one request would kill the process.
"""


@contextlib.asynccontextmanager
async def serving(
    app: Any, host: str, port: int, *, limits: ConnectionLimits | None = None, ws_max_size: int = 1 << 20
) -> AsyncIterator[int]:
    """Serves `app` inside the running loop; yields the bound port (useful with port 0). Raises Unavailable if it can't listen."""
    limits = _affordable(limits or ConnectionLimits())
    http, websocket = ConnectionLimiter(limits).protocols()
    config = uvicorn.Config(
        _guarded(app),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        http=http,
        ws=websocket,
        ws_max_size=ws_max_size,
        ws_per_message_deflate=False,
    )
    server = _Server(config)
    config.load()
    with _listener(host, port) as listener:
        task = asyncio.create_task(server.serve([listener]), name="http-server")
        ready = asyncio.create_task(server.ready.wait())
        try:
            await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            yield int(listener.getsockname()[1])
        finally:
            ready.cancel()
            server.should_exit = True
            await task


def _spare_the_collector() -> None:
    """What a daemon has loaded when it is ready stays for good, and a request leaves few cycles: the collector need not look at
    all of it so often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def _guarded(app: Any) -> Any:
    """The app behind a look at the recursion limit: those libraries may be imported at any time."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if sys.getrecursionlimit() > MAX_RECURSION:
            sys.setrecursionlimit(MAX_RECURSION)
        await app(scope, receive, send)

    return guarded


def _affordable(limits: ConnectionLimits) -> ConnectionLimits:
    """The limits, with no more connections than this process may have open files: it asks for as many as it needs. Without a
    free one a server cannot even refuse a connection.
    """
    if resource is None:
        return limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + LINGERING + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft >= wanted:
        return limits
    fewer = max(soft // 2, soft - LINGERING - OTHER_FILES)
    log.warning("fewer connections than configured: the system allows too few open files", connections=fewer, files=soft)
    return replace(limits, connections=min(limits.connections, fewer))


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        text = f"cannot listen on {host} port {port}: {error}; choose another with --port, or `port` in the config"
        raise Unavailable(Code.PORT_UNAVAILABLE, text, fault=Fault.CLIENT) from error


class _Server(uvicorn.Server):
    """Leaves signals to the process's root, which stops its parts in order; says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def wait_for_stop_signal() -> None:
    """Returns on the first SIGTERM or SIGINT. A second one then kills the process, as the default would."""
    _spare_the_collector()
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    try:
        await stopped.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
