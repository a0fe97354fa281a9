"""Terminal output: tables and progress lines for people (progress goes to stderr), JSON for programs (on stdout)."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, format_amount

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNDERSCORE = re.compile(r"_([a-z])")
PIPE_WIDTH = 250
"""Columns of a table that goes to a file or a pipe."""
WIDE_TABLE_COLUMNS = 6
"""A table of at least this many columns is shown row by row if it is wider than the terminal."""


def _width() -> int | None:
    """Output width in columns; None means the terminal's own."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH


out = Console(width=_width())
err = Console(stderr=True)


def strip_control(text: str) -> str:
    """Removes control characters: text of other parties must not steer the terminal."""
    return _CONTROL.sub("", text)


def dollars(units: int) -> str:
    """An amount for a sentence, from base units: "2.5 dollars"."""
    return f"{format_amount(Amount(units))} dollars"


def counted(number: int, noun: str) -> str:
    """A number with its noun, for a sentence: "1 tab", "2 tabs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cell(value: object) -> str:
    return escape(strip_control(str(value)))


def show_json(value: Any) -> None:
    """Prints one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def json_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for JSON output: names in camelCase, amounts as decimal strings of base units, as everywhere on the wire."""
    return {
        _UNDERSCORE.sub(lambda match: match[1].upper(), name): str(int(value)) if isinstance(value, Amount) else value
        for name, value in fields.items()
    }


def show_fields(fields: Iterable[tuple[str, object]], title: str | None = None) -> None:
    """Prints a two-column table of names and values."""
    _print_fields([(_cell(name), _cell(value)) for name, value in fields], title)


def _print_fields(fields: Iterable[tuple[str, str]], title: str | None) -> None:
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields:
        table.add_row(name, value)
    out.print(table)


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, *, keyed: bool = False
) -> None:
    """Prints a table. If it is `keyed`, the first column holds identifiers to copy and is never folded. A wide table that does
    not fit the terminal is printed row by row.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        out.print(f"{title}: none" if title else "none", highlight=False, markup=False)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if len(columns) >= WIDE_TABLE_COLUMNS and sum(widths) + 3 * len(columns) + 1 > out.width:
        for number, row in enumerate(cells):
            _print_fields(zip(columns, row, strict=True), title if number == 0 else None)
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=keyed and number == 0)
    for row in cells:
        table.add_row(*row)
    out.print(table)


def step(text: str) -> None:
    """Prints a line of progress on stderr."""
    err.print(f"[green]✓[/] {_cell(text)}", highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Prints a remark on stderr, without a check mark."""
    err.print(_cell(text), highlight=False, soft_wrap=True)


def exit_with_error(error: TallyError, *, as_json: bool = False) -> NoReturn:
    """Prints an error with its code and whose fault it is, then ends the process with exit code 1."""
    if as_json:
        show_json(error.as_json())
    else:
        err.print(f"[red]error:[/] {_cell(error)}", highlight=False, soft_wrap=True)
        retry = "; a retry may succeed" if error.retry else ""
        err.print(f"[dim](code {error.code.value}, at fault: {error.fault.value}{retry})[/]", highlight=False)
    sys.exit(1)
