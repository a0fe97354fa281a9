"""Several processes of one daemon on one machine, forked by a parent that starts a dead one again and stops all of them together.

The parent serves nothing. It is told by a socket of each process that this one is ready, and by the socket's end that it is gone,
as supervision.py has it. A process that ends before all are ready fails the start. Needs fork, so a system with POSIX.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass

import structlog

from tallystick.protocol.errors import BadMessage
from tallystick.runtime.supervision import MAX_REPORT_BYTES, attach_to, report_port, take_parent

log = structlog.get_logger()
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0
STABLE_SECONDS = 60.0
"""A process that ran for this long is started again at once."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(slots=True, eq=False)
class _Process:
    """One of the processes; `link` is None while it does not run, and `due` the time at which it is started then."""

    index: int
    pid: int = 0
    link: socket.socket | None = None
    ready: bool = False
    began: float = 0.0
    due: float = 0.0
    delay: float = FIRST_RETRY_SECONDS


class _Forked(Exception):
    """Raised in a new process."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def fork_processes(count: int, stop_seconds: float, shared_port: int) -> int:
    """Forks `count` processes and returns in each of them, with its index. The parent never returns: it ends with SystemExit.

    The parent reports `shared_port` to its own parent once all are ready. SIGTERM stops all; those that run `stop_seconds` later
    are killed, and so are all at a second signal. Call before any thread or event loop begins. Raises BadMessage without fork.
    """
    if not hasattr(os, "fork"):
        raise BadMessage("workers: expected 1, since this system cannot fork processes")
    try:
        status = _Parent(count, stop_seconds, shared_port).run()
    except _Forked as forked:
        return forked.index
    sys.exit(status)


class _Parent:
    def __init__(self, count: int, stop_seconds: float, shared_port: int) -> None:
        self._processes = [_Process(index) for index in range(count)]
        self._stop_seconds, self._shared_port = stop_seconds, shared_port
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._alarm = socket.socketpair()
        self._former = [(number, signal.getsignal(number)) for number in _SIGNALS]
        self._kill_at: float | None = None
        """When processes that still run are killed; None unless all stop."""
        self._status, self._started = 0, False

    def run(self) -> int:
        """Runs until all have ended. Returns the exit status. Raises _Forked in each child."""
        for end in (self._wakeup, self._alarm):
            end.setblocking(False)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_signal)
        parent = take_parent()
        if parent is not None:
            self._selector.register(parent, selectors.EVENT_READ, lambda: self._stop(0))
        signal.set_wakeup_fd(self._alarm.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        for process in self._processes:
            self._start(process)
        while any(process.link is not None for process in self._processes) or self._kill_at is None:
            for key, _ in self._selector.select(self._seconds_to_next()):
                key.data()
            self._start_due()
            self._kill_late()
        return self._status

    def _seconds_to_next(self) -> float | None:
        due = [process.due for process in self._processes if process.link is None and self._kill_at is None]
        due += [] if self._kill_at is None else [self._kill_at]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _start(self, process: _Process) -> None:
        mine, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            mine.close()
            self._become_child(theirs)
            raise _Forked(process.index)
        theirs.close()
        mine.setblocking(False)
        process.pid, process.link, process.ready, process.began = pid, mine, False, time.monotonic()
        self._selector.register(mine, selectors.EVENT_READ, lambda: self._on_report(process))

    def _become_child(self, link: socket.socket) -> None:
        """Closes what belongs to the parent: the ends of the others' sockets above all, which else would never end."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._former:
            signal.signal(number, handler)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # each is a socket
        self._selector.close()
        self._alarm.close()
        attach_to(link)

    def _on_report(self, process: _Process) -> None:
        link = process.link
        if link is None:
            return
        try:
            report = link.recv(MAX_REPORT_BYTES)
        except BlockingIOError:
            return
        except OSError:
            report = b""
        if not report:
            self._ended(process, link)
            return
        process.ready = True
        if not self._started and all(other.ready for other in self._processes):
            self._started = True
            report_port(self._shared_port)
            log.info("all processes are ready", count=len(self._processes), port=self._shared_port)

    def _ended(self, process: _Process, link: socket.socket) -> None:
        self._selector.unregister(link)
        link.close()
        process.link = None
        _, wait_status = os.waitpid(process.pid, 0)
        status = os.waitstatus_to_exitcode(wait_status)
        if self._kill_at is not None:
            self._status = self._status or (status if status not in {0, -signal.SIGTERM, -signal.SIGINT} else 0)
        elif not self._started:
            self._stop(abs(status) or 1)
        else:
            lived = time.monotonic() - process.began
            process.delay = FIRST_RETRY_SECONDS if lived > STABLE_SECONDS else process.delay
            process.due = time.monotonic() + (0 if lived > STABLE_SECONDS else process.delay)
            log.error("a process ended; it is started again", process=process.pid, status=status, seconds=round(process.delay, 1))
            process.delay = min(2 * process.delay, LAST_RETRY_SECONDS)

    def _start_due(self) -> None:
        for process in self._processes:
            if process.link is None and self._kill_at is None and process.due <= time.monotonic():
                self._start(process)

    def _on_signal(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(MAX_REPORT_BYTES)
        if self._kill_at is None:
            self._stop(0)
        else:
            self._kill_at = time.monotonic()

    def _stop(self, status: int) -> None:
        """Tells all to stop, the first time; `status` is the exit status of the parent."""
        if self._kill_at is not None:
            return
        self._status, self._kill_at = status, time.monotonic() + self._stop_seconds
        self._signal(signal.SIGTERM)

    def _kill_late(self) -> None:
        if self._kill_at is not None and self._kill_at <= time.monotonic():
            self._signal(signal.SIGKILL)
            self._kill_at = time.monotonic() + self._stop_seconds

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.link is not None:  # it is no other process: its end was not waited for yet
                os.kill(process.pid, number)
