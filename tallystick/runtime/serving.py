"""Serving ASGI apps: uvicorn with uvloop, an orderly stop on SIGTERM and SIGINT, errors in one shape."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

GRACE_SECONDS = 10


@contextlib.asynccontextmanager
async def serving(app: Any, host: str, port: int) -> AsyncIterator[int]:
    """Serves `app` inside the running loop; yields the bound port (useful with port 0). Raises OSError if it cannot bind."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        ws_max_size=64 * 1024 * 1024,
        ws_per_message_deflate=False,
    )
    server = _Server(config)
    config.load()
    sockets = [config.bind_socket()]
    task = asyncio.create_task(server.serve(sockets), name="http-server")
    ready = asyncio.create_task(server.ready.wait())
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if task.done():
        await task
    try:
        yield int(sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        await task
        sockets[0].close()


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


async def until_stopped() -> None:
    """Returns on the first SIGTERM or SIGINT. A second one then kills the process, as the default would."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
