"""How an answer appears while it streams: as rendered markdown on a terminal, as the plain text elsewhere."""

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

from tallystick.cli.output import harmless

FRAMES_PER_SECOND = 10
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_INDENT = (" ", "\t")


class Screen(Protocol):
    """Where an answer's text goes as it comes. A context manager."""

    def write(self, text: str) -> None:
        """Shows the next piece."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def choose(console: Console, *, plain: bool) -> Screen:
    """Markdown where there is a person at a terminal, plain text else."""
    return PlainScreen(harmless=console.is_terminal) if plain or not console.is_terminal else MarkdownScreen(console)


class PlainScreen:
    """The text as it is; on a terminal without control characters."""

    def __init__(self, *, harmless: bool) -> None:
        self._harmless = harmless

    def write(self, text: str) -> None:
        """Shows the next piece."""
        sys.stdout.write(harmless(text) if self._harmless else text)
        sys.stdout.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


class MarkdownScreen:
    """Blocks that are whole are printed for good; the one that still grows is drawn anew as it does."""

    def __init__(self, console: Console) -> None:
        self._console, self._growing = console, ""
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=FRAMES_PER_SECOND, transient=True)

    def write(self, text: str) -> None:
        """Shows the next piece."""
        text = harmless(text)
        line_ended = "\n" in self._growing[-1:] + text
        self._growing += text
        if line_ended and (end := last_break(self._growing)):
            whole, self._growing = self._growing[:end], self._growing[end:]
            self._console.print(Markdown(whole))
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
    """The end of a block that may be taller than the terminal."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(1, console.height - 2)
        for line in console.render_lines(Markdown(self._text), options.update(height=None), pad=False)[-room:]:
            yield from line
            yield Segment.line()


def last_break(text: str) -> int:
    """Where the last whole block of a markdown text ends: before a line at the margin that follows an empty one, outside of
    code. 0 where no block is whole.
    """
    found, place, fence, empty = 0, 0, "", False
    for line in text.splitlines(keepends=True):
        if empty and not fence and line.strip() and not line.startswith(_INDENT):
            found = place
        if match := _FENCE.match(line):
            mark = match[1]
            if not fence:
                fence = mark
            elif mark[0] == fence[0] and len(mark) >= len(fence) and not line.strip().strip(mark[0]):
                fence = ""
        empty = not line.strip()
        place += len(line)
    return found
