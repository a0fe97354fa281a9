"""How the command speaks: tables and progress for people (progress on stderr), JSON for scripts (on stdout)."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tallystick.protocol.errors import TallyError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PIPED_COLUMNS = 250
"""A table that no terminal shows need not be narrow."""
MANY_COLUMNS = 6


def _width() -> int | None:
    """None: what the terminal has."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_COLUMNS


out = Console(width=_width())
err = Console(stderr=True)


def harmless(text: str) -> str:
    """Without control characters: what strangers say must not steer the terminal."""
    return _CONTROL.sub("", text)


def _shown(value: object) -> str:
    return escape(harmless(str(value)))


def show_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def show_facts(facts: Iterable[tuple[str, object]], title: str | None = None) -> None:
    """A two-column table of names and values."""
    _print_facts([(_shown(name), _shown(value)) for name, value in facts], title)


def _print_facts(facts: Iterable[tuple[str, str]], title: str | None) -> None:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    out.print(table)


def show_rows(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, *, keyed: bool = False) -> None:
    """A table. Where it is keyed, the first column is one to copy from and is never folded. One of many columns that does not fit
    is shown row by row.
    """
    cells = [[_shown(value) for value in row] for row in rows]
    widest = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if len(columns) >= MANY_COLUMNS and sum(widest) + 3 * len(columns) + 1 > out.width:
        for number, row in enumerate(cells):
            _print_facts(zip(columns, row, strict=True), title if number == 0 else None)
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=keyed and number == 0)
    for row in cells:
        table.add_row(*row)
    out.print(table)


def step(text: str) -> None:
    """A line of progress."""
    err.print(f"[green]✓[/] {_shown(text)}", highlight=False, soft_wrap=True)


def fail(error: TallyError, *, as_json: bool = False) -> NoReturn:
    """Says what went wrong, whose fault it is, and ends the process."""
    if as_json:
        show_json(error.as_json())
    else:
        err.print(f"[red]error:[/] {_shown(error)}", highlight=False, soft_wrap=True)
        hint = "trying again may help" if error.retry else f"code {error.code.value}"
        err.print(f"[dim]({hint}; at fault: {error.fault.value})[/]", highlight=False)
    sys.exit(1)
