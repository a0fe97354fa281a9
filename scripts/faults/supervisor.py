"""Processes that are started again whenever they end, as systemd does with Restart=always."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tallystick.runtime.supervision import PARENT_SOCKET_ENV

RESTART_SECONDS = 0.2
STOP_SECONDS = 30


@dataclass(slots=True)
class Supervised:
    """A process by its command line. `user`: the account that it runs as, empty for this process's own.

    `removed`: environment variables that it does not inherit.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    user: str = ""
    removed: Sequence[str] = ()
    stop_signal: signal.Signals = signal.SIGTERM
    starts: int = 0
    process: asyncio.subprocess.Process | None = None
    _may_start: asyncio.Event = field(default_factory=asyncio.Event)
    _loop: asyncio.Task[None] | None = None
    _link: socket.socket | None = None
    """The child ends when this end is closed, however this process ends."""

    async def start(self) -> None:
        """Starts the process, and starts it again whenever it ends."""
        self._may_start.set()
        await self._spawn()
        self._loop = asyncio.create_task(self._restart())

    def hold_down(self) -> None:
        """Kills the process, and does not start it again before `let_up`."""
        self._may_start.clear()
        self.signal(signal.SIGKILL)

    def let_up(self) -> None:
        """Starts the process again."""
        self._may_start.set()

    async def stop(self) -> None:
        """Ends the process for good: with its stop signal, and with SIGKILL if that takes too long."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        if self.process is not None and self.process.returncode is None:
            self.signal(signal.SIGCONT)
            self.process.send_signal(self.stop_signal)
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await self.process.wait()
            except TimeoutError:
                self.signal(signal.SIGKILL)
                await self.process.wait()
        if self._link is not None:
            self._link.close()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process and its children: SIGSTOP stops only the process that it is sent to."""
        if self.process is None or self.process.returncode is not None:
            return
        pid = self.process.pid
        for target in (pid, *(_children(pid) if number is not signal.SIGKILL else ())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)

    async def _spawn(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link, inherited = socket.socketpair()
        inherited_names = {name: value for name, value in os.environ.items() if name not in self.removed}
        with self.log.open("ab") as log, inherited:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=inherited_names | self.environment | {PARENT_SOCKET_ENV: str(inherited.fileno())},
                pass_fds=(inherited.fileno(),),
                start_new_session=True,
                **({"user": self.user, "group": self.user, "extra_groups": []} if self.user else {}),  # type: ignore[arg-type]
            )
        self.starts += 1

    async def _restart(self) -> None:
        while self.process is not None:
            await self.process.wait()
            await asyncio.sleep(RESTART_SECONDS)
            await self._may_start.wait()
            await self._spawn()


def _children(pid: int) -> list[int]:
    """The processes whose parent is `pid`, on Linux; elsewhere none are found."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in text.split()]
    return []
