"""Runs `tally ARGUMENTS` with a clock that another process can set: python -m scripts.faults.launch FILE ARGUMENTS.

FILE has 8 bytes, a double: the seconds by which the wall clock is off. Monotonic clocks stay as they are, as in reality.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

_OFFSET = struct.Struct("<d")


def write_offset(file: Path, seconds: float) -> None:
    """Sets the clock of the processes that were started with this file."""
    if not file.exists():
        file.write_bytes(_OFFSET.pack(0.0))
    with file.open("r+b") as opened:
        opened.write(_OFFSET.pack(seconds))


def shift_clock(file: Path) -> None:
    """Replaces this process's wall clock. Before other modules are imported, which may copy the functions."""
    with file.open("rb") as opened:
        offset = mmap.mmap(opened.fileno(), _OFFSET.size, access=mmap.ACCESS_READ)
    real, real_ns = time.time, time.time_ns

    def now() -> float:
        shift: float = _OFFSET.unpack(offset)[0]
        return real() + shift

    def now_ns() -> int:
        return real_ns() + int(_OFFSET.unpack(offset)[0]) * 10**9

    functions: dict[str, Callable[[], float]] = {"time": now, "time_ns": now_ns}
    for name, function in functions.items():
        setattr(time, name, function)


def main() -> None:
    """Runs the command line of Tallystick."""
    shift_clock(Path(sys.argv.pop(1)))
    from tallystick.cli.main import main as tally  # noqa: PLC0415 - after the clock

    tally()


if __name__ == "__main__":
    main()
