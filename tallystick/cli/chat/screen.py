"""Shows an answer while it streams: as rendered Markdown on a terminal, as plain text elsewhere."""

from __future__ import annotations

import re
import sys
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner

from tallystick.cli.output import strip_control

FRAMES_PER_SECOND = 10
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_INDENT = (" ", "\t")


class Screen(Protocol):
    """Shows the pieces of an answer. A context manager."""

    def write(self, text: str) -> None:
        """Shows the next piece of text."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def open_screen(console: Console, *, plain: bool) -> Screen:
    """Returns a Markdown screen for a terminal, and a plain one for pipes or if asked."""
    return PlainScreen(strip=console.is_terminal) if plain or not console.is_terminal else MarkdownScreen(console)


class PlainScreen:
    """Plain text; on a terminal, without control characters."""

    def __init__(self, *, strip: bool) -> None:
        self._strip = strip

    def write(self, text: str) -> None:
        """Shows the next piece of text."""
        sys.stdout.write(strip_control(text) if self._strip else text)
        sys.stdout.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


class MarkdownScreen:
    """Rendered Markdown: complete blocks are printed once, the growing one is redrawn."""

    def __init__(self, console: Console) -> None:
        self._console, self._growing = console, ""
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=FRAMES_PER_SECOND, transient=True)

    def write(self, text: str) -> None:
        """Shows the next piece of text."""
        text = strip_control(text)
        line_ended = "\n" in self._growing[-1:] + text
        self._growing += text
        if line_ended and (end := last_break(self._growing)):
            complete, self._growing = self._growing[:end], self._growing[end:]
            self._console.print(Markdown(complete))
            self._console.print()

    def _draw(self) -> Spinner | _Tail:
        return _Tail(self._growing) if self._growing.strip() else Spinner("dots", style="dim")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()
        if self._growing.strip():
            self._console.print(Markdown(self._growing))


class _Tail:
    """The last lines of a block, as many as the terminal has room for."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(1, console.height - 2)
        for line in console.render_lines(Markdown(self._text), options.update(height=None), pad=False)[-room:]:
            yield from line
            yield Segment.line()


def last_break(text: str) -> int:
    """The offset at which the last complete Markdown block ends: before an unindented line that follows an empty one, outside
    fenced code. 0 if no block is complete.
    """
    end, offset, fence, empty = 0, 0, "", False
    for line in text.splitlines(keepends=True):
        if empty and not fence and line.strip() and not line.startswith(_INDENT):
            end = offset
        if match := _FENCE.match(line):
            mark = match[1]
            if not fence:
                fence = mark
            elif mark[0] == fence[0] and len(mark) >= len(fence) and not line.strip().strip(mark[0]):
                fence = ""
        empty = not line.strip()
        offset += len(line)
    return end
