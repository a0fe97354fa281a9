"""Child processes of the demo: started with a log file each, waited for until they answer, stopped in reverse order."""

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
from typing import Self

from tallystick.protocol.errors import Code, Unavailable

STOP_SECONDS = 15
READY_SECONDS = 60
ATTEMPTS = 16

if sys.platform != "win32":
    import fcntl


@dataclass(frozen=True, slots=True)
class Child:
    """One running `tally` process."""

    name: str
    process: asyncio.subprocess.Process
    log: Path


class Children:
    """All of them, as an async context: whatever happens, none is left."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, os.environ | environment
        self._running: list[Child] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for child in reversed(self._running):
            await _stop(child)

    async def start(self, name: str, *arguments: str, ready: Callable[[], Awaitable[bool]]) -> Child:
        """Starts `tally ARGUMENTS` and waits until `ready`. Raises Unavailable with the log's end where it dies or never is."""
        log = self._folder / f"{name}.log"
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tallystick.cli",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches only the demo, which stops them in order
            )
        child = Child(name, process, log)
        self._running.append(child)
        await _until_ready(child, ready)
        return child

    async def first_death(self) -> Child:
        """Waits until a process ends by itself."""
        waits = {asyncio.create_task(child.process.wait()): child for child in self._running}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return waits[done.pop()]


async def _until_ready(child: Child, ready: Callable[[], Awaitable[bool]]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(READY_SECONDS):
            while child.process.returncode is None:
                if await ready():
                    return
                await asyncio.sleep(0.05)
    tail = "\n".join(child.log.read_text(errors="replace").splitlines()[-15:])
    raise Unavailable(Code.PROCESS_FAILED, f"{child.name} did not start; the end of {child.log}:\n{tail}")


async def _stop(child: Child) -> None:
    if child.process.returncode is None:
        child.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(child.process.wait(), STOP_SECONDS)
        except TimeoutError:
            child.process.kill()
            await child.process.wait()


def free_port(preferred: int) -> int:
    """The preferred port if nobody listens on it, else any free one. No other process that asks here gets it while this one
    lives: a child that is to listen on it may take its time.
    """
    for port in (preferred, *[0] * ATTEMPTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found = int(probe.getsockname()[1])
                if _claim(found):
                    return found
    raise Unavailable(Code.PORT_UNAVAILABLE, "no free port on 127.0.0.1")


_claims: dict[int, int] = {}
"""The locks that this process holds until its end, by port."""


def _claim(port: int) -> bool:
    if port in _claims or sys.platform == "win32":
        return port not in _claims
    path = Path(tempfile.gettempdir()) / f"tallystick-{os.getuid()}-{port}.lock"
    claim = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(claim)
        return False
    _claims[port] = claim
    return True
