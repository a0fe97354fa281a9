"""Shows which processes of a wallet are alive: each one locks a file of its own, and the system releases the lock when it ends.

While the process that reads a job is alive, only that process records the job's receipt, because only it knows what arrived.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

NO_PROCESS = ""


class ProcessLock:
    """The locked file of one process, beside a ledger file. It is created on the first use of `name` and deleted by `release`."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._name = NO_PROCESS
        self._descriptor: int | None = None

    @property
    def name(self) -> str:
        """The name by which other processes know this one; empty on systems without such locks."""
        if self._descriptor is None and sys.platform != "win32":
            import fcntl  # noqa: PLC0415 - not everywhere

            self._name = secrets.token_hex(8)
            self._descriptor = os.open(self._path(self._name), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._name

    def _path(self, name: str) -> Path:
        return self._state.with_name(f"{self._state.name}.{name}.alive")

    def other_is_alive(self, name: str) -> bool:
        """Returns whether another process with this name is alive. Deletes the file of a dead one."""
        if sys.platform == "win32" or name in (NO_PROCESS, self._name):
            return False
        import fcntl  # noqa: PLC0415 - not everywhere

        try:
            descriptor = os.open(self._path(name), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        else:
            self._path(name).unlink(missing_ok=True)
            return False
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Deletes the file and releases its lock: this process reads no more jobs."""
        if self._descriptor is not None:
            self._path(self._name).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor, self._name = None, NO_PROCESS
