"""Lines of the log on their way to standard error: those of one turn of the event loop leave in one write, in their order."""

from __future__ import annotations

import asyncio
import atexit
import sys
from collections import deque
from typing import Any

import structlog

MAX_LINES = 256
"""Lines from which on they are written at once."""


class LogLines:
    """Lines that wait for the end of this turn of the event loop. Outside of one, each line is written at once."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        """The loop that will write them."""

    def add(self, line: str) -> None:
        """Writes a line, without its end, before this turn of the event loop is over."""
        self._lines.append(line)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if len(self._lines) >= MAX_LINES:
            self.flush()
        elif loop is not self._loop:
            self._loop = loop
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Writes what waits."""
        self._loop = None
        text = ""
        while self._lines:
            text += self._lines.popleft() + "\n"
        if text:
            sys.stderr.write(text)
            sys.stderr.flush()


lines = LogLines()
"""Those of this process."""
atexit.register(lines.flush)


class OrderedWriteLogger(structlog.WriteLogger):
    """Writes an event to standard error at once, behind the lines that wait."""

    def __init__(self, *_: Any) -> None:
        super().__init__(sys.stderr)

    def msg(self, message: str) -> None:
        """Writes a line."""
        lines.flush()
        super().msg(message)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg
