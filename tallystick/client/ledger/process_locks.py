"""Which processes of a wallet live: each holds a lock on a file of its own, which the system lets go of at the process's end.

A job whose reader lives is that process's affair: only the reader knows what arrived, so nobody else books its receipt.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

NO_PROCESS = ""


class ProcessLock:
    """The mark of one process beside a state file. Made at the first `name`; `leave` takes it away."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._name = NO_PROCESS
        self._held: int | None = None

    @property
    def name(self) -> str:
        """What other processes know this one by; empty where the system has no such locks."""
        if self._held is None and sys.platform != "win32":
            import fcntl  # noqa: PLC0415 - not everywhere

            self._name = secrets.token_hex(8)
            self._held = os.open(self._path(self._name), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._name

    def _path(self, name: str) -> Path:
        return self._state.with_name(f"{self._state.name}.{name}.alive")

    def other_lives(self, name: str) -> bool:
        """Whether another process of that name lives. The mark of one that does not is removed."""
        if sys.platform == "win32" or name in (NO_PROCESS, self._name):
            return False
        import fcntl  # noqa: PLC0415 - not everywhere

        try:
            mark = os.open(self._path(name), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            self._path(name).unlink(missing_ok=True)
            return False
        finally:
            os.close(mark)

    def leave(self) -> None:
        """This process reads no jobs any more."""
        if self._held is not None:
            self._path(self._name).unlink(missing_ok=True)
            os.close(self._held)
            self._held, self._name = None, NO_PROCESS
