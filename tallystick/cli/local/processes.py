"""Child processes: started with a log file each, awaited until they are ready, stopped in reverse order. Also free ports.

A child that serves a port proves that it does (see tallystick.runtime.supervision); an answer on the port is never taken for its.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from tallystick.cli.progress import activity
from tallystick.protocol.errors import Code, Unavailable
from tallystick.runtime.ports import describe_holder
from tallystick.runtime.supervision import MAX_REPORT_BYTES, PARENT_SOCKET_ENV, parse_report

STOP_SECONDS = 15
READY_SECONDS = 180
"""For a busy or slow machine. A process that ends by itself is noticed at once."""
PORT_ATTEMPTS = 16
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
IANA_EPHEMERAL_PORTS = (49_152, 65_535)
"""RFC 6335, section 6."""
FIRST_FREE_PORT = 20_000
"""Most well-known services of development machines are below it."""
LOG_TAIL_LINES = 15

if sys.platform != "win32":
    import fcntl


@dataclass(frozen=True, slots=True)
class ManagedProcess:
    """One running `tally` process. It ends when `link` is closed, as it is when this process ends."""

    name: str
    process: asyncio.subprocess.Process
    log: Path
    link: socket.socket

    def exited(self) -> Unavailable:
        """The error for a process that ended unexpectedly."""
        return Unavailable(Code.PROCESS_FAILED, f"{self.name} exited unexpectedly; see its log {self.log}")


async def spawn_tally(
    *arguments: str, log: BinaryIO, environment: dict[str, str] | None = None, inherited: tuple[int, ...] = ()
) -> asyncio.subprocess.Process:
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
        pass_fds=inherited,
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

    async def start(
        self, name: str, *arguments: str, ready: Callable[[], Awaitable[bool]], port: int | None = None
    ) -> ManagedProcess:
        """Starts `tally ARGUMENTS` and waits until `ready`.

        `port`: the one that the process serves. The process must report that it listens there before `ready` is asked. Raises
        Unavailable with the end of the log if it fails.
        """
        log = self._folder / f"{name}.log"
        link, inherited = socket.socketpair()
        with log.open("wb") as file, inherited:
            environment = self._environment | {PARENT_SOCKET_ENV: str(inherited.fileno())}
            process = await spawn_tally(*arguments, log=file, environment=environment, inherited=(inherited.fileno(),))
        link.setblocking(False)
        managed = ManagedProcess(name, process, log, link)
        self._running.append(managed)
        try:
            with activity(f"starting {name}"):
                async with asyncio.timeout(READY_SECONDS):
                    if (port is None or await _listens(managed, port)) and await _becomes_ready(managed, ready):
                        return managed
        except TimeoutError:
            pass
        raise Unavailable(Code.PROCESS_FAILED, _start_failure(managed, port))

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


async def _listens(managed: ManagedProcess, port: int) -> bool:
    """Whether the process itself reports that it listens on this port. Waits for the report or for the end of the process."""
    loop, report = asyncio.get_running_loop(), b""
    while not report.endswith(b"\n") and len(report) < MAX_REPORT_BYTES:
        try:
            part = await loop.sock_recv(managed.link, MAX_REPORT_BYTES)
        except ConnectionError:
            part = b""
        if not part:
            await managed.process.wait()
            return False
        report += part
    return parse_report(report) == (managed.process.pid, port)


async def _becomes_ready(managed: ManagedProcess, ready: Callable[[], Awaitable[bool]]) -> bool:
    """Whether the process is ready. Waits for that or for its end."""
    while managed.process.returncode is None:
        if await ready() and managed.process.returncode is None:
            return True
        await asyncio.sleep(0.05)
    return False


def _start_failure(managed: ManagedProcess, port: int | None) -> str:
    holder = None if port is None or managed.process.returncode is None else describe_holder(port)
    late = "" if managed.process.returncode is not None else f" within {READY_SECONDS} s"
    cause = f": {holder} listens on port {port}" if holder else late
    return f"{managed.name} did not start{cause}; the end of its log {managed.log}:\n{log_tail(managed.log)}"


async def _stop(managed: ManagedProcess) -> None:
    if managed.process.returncode is None:
        managed.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await managed.process.wait()
        except TimeoutError:
            managed.process.kill()
            await managed.process.wait()
    managed.link.close()


def free_port(preferred: int) -> int:
    """The preferred port if it is free, else any free port; 0 prefers none. Until this process ends, no other caller of this
    function gets the port, so a child process may take its time to listen on it. Raises Unavailable if no port is free.
    """
    for candidate in ([preferred] if preferred else []) + _non_ephemeral_ports() + [0] * PORT_ATTEMPTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", candidate))
                port = int(probe.getsockname()[1])
                if _lock_port(port):
                    return port
    raise Unavailable(Code.PORT_UNAVAILABLE, "no free port on 127.0.0.1; stop a program that listens there")


def _non_ephemeral_ports() -> list[int]:
    """Some ports at random that the system does not assign. It may give one that it does assign to a program's connection before
    the child listens on it, or while the child is restarted.
    """
    try:
        first, last = map(int, EPHEMERAL_PORTS.read_text().split())
    except (OSError, ValueError):  # not Linux
        first, last = IANA_EPHEMERAL_PORTS
    ports = [port for port in range(FIRST_FREE_PORT, 1 << 16) if not first <= port <= last]
    return random.sample(ports, min(PORT_ATTEMPTS, len(ports)))


def still_free(port: int) -> int:
    """The port, if nothing listens there although it was free before, else another free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return free_port(0)
    return port


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
