"""Child processes: started with a log file each, awaited until they are ready, stopped in reverse order. Also free ports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from tallystick.protocol.errors import Code, Unavailable

STOP_SECONDS = 15
READY_SECONDS = 60
PORT_ATTEMPTS = 16
LOG_TAIL_LINES = 15

if sys.platform != "win32":
    import fcntl


@dataclass(frozen=True, slots=True)
class ManagedProcess:
    """One running `tally` process."""

    name: str
    process: asyncio.subprocess.Process
    log: Path

    def exited(self) -> Unavailable:
        """The error for a process that ended unexpectedly."""
        return Unavailable(Code.PROCESS_FAILED, f"{self.name} exited unexpectedly; see its log {self.log}")


async def spawn_tally(*arguments: str, log: BinaryIO, environment: dict[str, str] | None = None) -> asyncio.subprocess.Process:
    """Starts `tally ARGUMENTS` in a session of its own, so that Ctrl-C does not reach it."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tallystick.cli",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )


class ProcessGroup:
    """The started processes. An async context manager that stops all of them on exit."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, os.environ | environment
        self._running: list[ManagedProcess] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for managed in reversed(self._running):
            await _stop(managed)

    async def start(self, name: str, *arguments: str, ready: Callable[[], Awaitable[bool]]) -> ManagedProcess:
        """Starts `tally ARGUMENTS` and waits until `ready`. Raises Unavailable with the end of the log if it fails."""
        log = self._folder / f"{name}.log"
        with log.open("wb") as file:
            process = await spawn_tally(*arguments, log=file, environment=self._environment)
        managed = ManagedProcess(name, process, log)
        self._running.append(managed)
        await _until_ready(managed, ready)
        return managed

    async def first_exit(self) -> ManagedProcess:
        """Waits until a process exits by itself."""
        waits = {asyncio.create_task(managed.process.wait()): managed for managed in self._running}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return waits[done.pop()]


def log_tail(log: Path) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


async def _until_ready(managed: ManagedProcess, ready: Callable[[], Awaitable[bool]]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS):
            while managed.process.returncode is None:
                if await ready():
                    return
                await asyncio.sleep(0.05)
    raise Unavailable(
        Code.PROCESS_FAILED, f"{managed.name} did not start; the end of its log {managed.log}:\n{log_tail(managed.log)}"
    )


async def _stop(managed: ManagedProcess) -> None:
    if managed.process.returncode is None:
        managed.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(managed.process.wait(), STOP_SECONDS)
        except TimeoutError:
            managed.process.kill()
            await managed.process.wait()


def free_port(preferred: int) -> int:
    """The preferred port if it is free, else any free port. Until this process ends, no other caller of this function gets the
    port, so a child process may take its time to listen on it. Raises Unavailable if no port is free.
    """
    for candidate in (preferred, *[0] * PORT_ATTEMPTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", candidate))
                port = int(probe.getsockname()[1])
                if _lock_port(port):
                    return port
    raise Unavailable(Code.PORT_UNAVAILABLE, "no free port on 127.0.0.1; stop a program that listens there")


_port_locks: dict[int, int] = {}
"""Descriptors of the lock files that this process holds until its end, by port."""


def _lock_port(port: int) -> bool:
    if port in _port_locks or sys.platform == "win32":
        return port not in _port_locks
    path = Path(tempfile.gettempdir()) / f"tallystick-{os.getuid()}-{port}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    _port_locks[port] = descriptor
    return True
