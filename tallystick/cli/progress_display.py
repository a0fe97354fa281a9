"""The lines at the bottom of the terminal in which `tallystick.cli.progress` shows work, drawn by rich."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from tallystick.cli.output import err, strip_control

MAX_TEXT_CHARACTERS = 120
_MIB = 1 << 20


class Display:
    """The lines at the bottom of the terminal, which all work of this process shares."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._rows = 0

    @contextmanager
    def row(self, text: str, total: float | None, *, in_bytes: bool) -> Iterator[tuple[Progress, TaskID]]:
        """A line that shows `text` while the block runs."""
        with self._lock:
            if self._progress is None:
                self._progress = _open_display()
            progress = self._progress
            self._rows += 1
        row: TaskID | None = None
        try:
            row = progress.add_task(line(text), total=total, in_bytes=in_bytes)
            yield progress, row
        finally:
            if row is not None:
                progress.remove_task(row)
            with self._lock:
                self._rows -= 1
                if not self._rows:
                    self.close()

    def close(self) -> None:
        """Erases the lines, if there are any."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()


display = Display()
atexit.register(display.close)  # Ctrl-C may come between any two steps of `row`


def _open_display() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), _Bar(bar_width=30), _Amount(), _Time())
    # Not redirected: rich would write to stderr what is meant for a pipe on stdout.
    progress = Progress(*columns, console=err, transient=True, redirect_stdout=False, redirect_stderr=False)
    progress.start()
    err.show_cursor(True)  # a terminal whose program is killed keeps its cursor
    return progress


def line(text: str) -> str:
    """A text for a line: without markup and control characters, cut to a length."""
    clean = " ".join(strip_control(text).split())
    return escape(clean if len(clean) <= MAX_TEXT_CHARACTERS else clean[: MAX_TEXT_CHARACTERS - 1] + "…")


class _Bar(BarColumn):
    """A bar for work whose amount is known."""

    def render(self, task: Task) -> ProgressBar:
        """See rich."""
        bar = super().render(task)
        bar.width = self.bar_width if task.total else 0
        return bar


class _Amount(ProgressColumn):
    """How much is done."""

    def render(self, task: Task) -> Text:
        """See rich."""
        if not task.total:
            return Text("")
        if task.fields["in_bytes"]:
            return Text(f"{task.completed / _MIB:.0f}/{task.total / _MIB:.0f} MiB")
        return Text(f"{task.completed:,.0f}/{task.total:,.0f}")


class _Time(ProgressColumn):
    """The time that the rest will take if it is known, else the time since the start."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """See rich."""
        rest = task.time_remaining if task.total else None
        return Text(f"{task.elapsed or 0:.0f} s" if rest is None else f"{_span(rest)} left", style="dim")


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
