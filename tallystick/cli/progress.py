"""What a command is doing, on stderr: a spinner or a bar on a terminal, nothing in a pipe or with --json.

A terminal that is to show no colours or cannot move its cursor (NO_COLOR, TERM=dumb) gets one plain line for each piece of work.
Results are printed after the work has ended, never beside it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from tallystick.cli.output import note

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Result = TypeVar("Result")


class Unit(Enum):
    """What a bar counts."""

    ITEMS = "items"
    BYTES = "bytes"


class Activity:
    """One piece of work that is shown. Its methods may be called from any thread; where nothing is shown they do nothing."""

    def __init__(self, display: Progress | None = None, row: TaskID | None = None) -> None:
        self._display, self._row = display, row

    def update(self, text: str | None = None, *, done: float | None = None, total: float | None = None) -> None:
        """Shows another text, or how much is done out of `total`."""
        if self._display is not None and self._row is not None:
            from tallystick.cli.progress_display import line

            shown = None if text is None else line(text)
            self._display.update(self._row, description=shown, completed=done, total=total)

    def advance(self, by: float = 1) -> None:
        """Shows that more is done."""
        if self._display is not None and self._row is not None:
            self._display.advance(self._row, by)


@contextmanager
def activity(text: str, total: float | None = None, unit: Unit = Unit.ITEMS) -> Iterator[Activity]:
    """Shows what is being done while the block runs: a bar if a `total` is known, here or by `Activity.update`, else a spinner.

    Several may run at a time, each in a line of its own. The lines vanish as the work ends, also by Ctrl-C.
    """
    if "--json" in sys.argv or not sys.stderr.isatty():
        yield Activity()
    elif os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") in {"dumb", "unknown"}:
        note(f"{text} …")
        yield Activity()
    else:
        from tallystick.cli.progress_display import display

        with display.row(text, total, in_bytes=unit is Unit.BYTES) as (shown, row):
            yield Activity(shown, row)


def run_shown(text: str, work: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine to its end, as `asyncio.run` does, and shows `text` meanwhile. It must neither ask nor print results."""
    try:
        with activity(text):
            return asyncio.run(work)
    finally:
        work.close()  # Ctrl-C may come before it begins
