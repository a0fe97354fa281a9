"""TCP ports of this machine: which process listens on one. Linux tells; elsewhere the answer is unknown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp (see proc_net_tcp in the kernel's documentation)."""
MAX_COMMAND, COMMAND_WORDS = 80, 6


def describe_holder(port: int, proc: Path = Path("/proc")) -> str | None:
    """The process that listens on a TCP port, for an error: "process 123 (tally chain)".

    "Another user's process" if it cannot be identified; None if no process is known to listen.
    """
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    if not sockets:
        return None
    for process in proc.glob("[0-9]*"):
        if not sockets.isdisjoint(_open_files(process)):
            return f"process {process.name} ({_command(process)})"
    return "another user's process"


def _listening_inodes(port: int, proc: Path) -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _open_files(process: Path) -> Iterator[str]:
    try:
        files = list((process / "fd").iterdir())
    except OSError:  # it ended, or belongs to another user
        return
    for file in files:
        with contextlib.suppress(OSError):  # closed meanwhile
            yield str(file.readlink())


def _command(process: Path) -> str:
    from tallystick.runtime.logs import printable  # noqa: PLC0415 - slow to import, and seldom needed

    try:
        words = (process / "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return "ended meanwhile"
    return printable(" ".join([Path(words[0]).name, *words[1:COMMAND_WORDS]]))[:MAX_COMMAND]
