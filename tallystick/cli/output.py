"""Terminal output: tables and progress lines for people (progress goes to stderr), JSON for programs (on stdout)."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context
from typing import Any, NoReturn

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tallystick.protocol.errors import TallyError
from tallystick.protocol.types import Amount, format_amount

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNDERSCORE = re.compile(r"_([a-z])")
PIPE_WIDTH = 250
"""Columns of a table that goes to a file or a pipe."""
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_NO_NUMBER = ("", "-", "unknown", "none", "not measured")
_WORD = re.compile(r"[A-Za-z]{2}")
_COMMAND = re.compile(r"\btally [a-z]")


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


_OUTCOMES = {
    "completed": "completed",
    "length": "completed at the output limit",
    "client_cancelled": "cancelled by the client",
    "provider_error": "failed at the provider",
    "upstream_error": "failed at the engine",
    "timed_out": "timed out",
    "refused": "refused by the provider",
    "no_receipt": "ended without a receipt",
}


def outcome_words(outcome: object) -> str:
    """How a job ended, in words, from the outcome's name in JSON."""
    return _OUTCOMES.get(str(outcome), str(outcome).replace("_", " "))


def counted(number: int, noun: str) -> str:
    """A number with its noun, for a sentence: "1 tab", "2 tabs"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _text(value: object) -> str:
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
    """Prints names and values: as a table if each value fits on one line, else line by line and unbroken, to be copied."""
    pairs = [(strip_control(name), strip_control(str(value))) for name, value in fields]
    _show_title(title)
    names = max((len(name) for name, _ in pairs), default=0)
    values = max((cell_len(line) for _, value in pairs for line in value.split("\n")), default=0)
    if names + values + _BOX_COLUMNS > out.width:
        _print_lines(pairs, names)
        return
    table = Table(show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in pairs:
        table.add_row(escape(name), escape(value))
    out.print(table)


def _print_lines(pairs: Iterable[tuple[str, str]], names: int) -> None:
    """Prints each pair on a line that is not wrapped: the terminal breaks it for the eye, and it is copied whole."""
    for name, value in pairs:
        out.print(f"[cyan]{escape(name.ljust(names))}[/]  {escape(value)}", highlight=False, soft_wrap=True)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Prints a table whose rows can be compared: numbers are aligned at their decimal points and never broken, nor are addresses,
    paths and commands. A table that does not fit the terminal without that is printed row by row.
    """
    cells = [[strip_control(str(value)) for value in row] for row in rows]
    if not cells:
        out.print(f"{title}: none" if title else "none", highlight=False, markup=False)
        return
    _show_title(title)
    numeric = [_is_numeric(column) for column in zip(*cells, strict=True)]
    named = zip(columns, zip(*cells, strict=True), numeric, strict=True)
    headed = [(name, _aligned(column) if number else list(column)) for name, column, number in named]
    natural = [max(cell_len(text) for text in (name, *column)) for name, column in headed]
    least = [max(_longest_word(name), *map(_unbroken, column)) for name, column in headed]
    remarks = len(columns) > 2 and any(" " in cell and _WORD.search(cell) for cell in headed[-1][1])
    layouts = [(needed, below) for needed in (natural, least) for below in ([False, True] if remarks else [False])]
    for needed, below in layouts:
        count = len(columns) - below
        for style in _TABLE_STYLES[1:] if below else _TABLE_STYLES:
            space = out.width - style.overhead(count)
            if sum(needed[:count]) <= space:
                widths = _widths(natural[:count], least[:count], space)
                _print_table(headed[:count], numeric, widths, style, headed[-1][1] if below else None)
                return
    names = max(map(len, columns))
    for number, row in enumerate(cells):
        if number:
            out.print()
        _print_lines([pair for pair in zip(columns, row, strict=True) if pair[1]], names)


def show_checks(checks: Iterable[tuple[str, bool, str, str]]) -> None:
    """Prints checks with what was found, and below each problem its remedy on a line of its own, to be copied.

    Each check is its name, whether it is fine, what was found, and the remedy.
    """
    rows = [(strip_control(name), ready, strip_control(found), strip_control(remedy)) for name, ready, found, remedy in checks]
    names = max((len(name) for name, *_ in rows), default=0)
    for name, ready, found, remedy in rows:
        result = "[green]ok[/]     " if ready else "[red]PROBLEM[/]"
        out.print(f"{result}  [cyan]{escape(name.ljust(names))}[/]  {escape(found)}", highlight=False, soft_wrap=True)
        if remedy and not ready:
            out.print(f"{' ' * (names + 11)}{escape(remedy)}", style="bold", highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _TableStyle:
    """The columns of the terminal that the lines and spaces of a table take: `edge`, and `gap` between two columns."""

    edge: int
    gap: int
    boxed: bool

    def overhead(self, columns: int) -> int:
        return self.edge + self.gap * (columns - 1)


_BOX_COLUMNS = 7
_TABLE_STYLES = (_TableStyle(4, 3, boxed=True), _TableStyle(0, 2, boxed=False), _TableStyle(0, 1, boxed=False))


def _widths(natural: Sequence[int], least: Sequence[int], space: int) -> list[int]:
    """The width of each column: what its cells need unbroken, and an equal share of the rest up to what they need in one line."""
    widths, rest = list(least), space - sum(least)
    wanting = sorted(range(len(widths)), key=lambda column: natural[column] - least[column])
    for place, column in enumerate(wanting):
        more = min(natural[column] - least[column], rest // (len(wanting) - place))
        widths[column] += max(0, more)
        rest -= max(0, more)
    return widths


def _print_table(
    headed: Sequence[tuple[str, Sequence[str]]],
    numeric: Sequence[bool],
    widths: Sequence[int],
    style: _TableStyle,
    remarks: Sequence[str] | None = None,
) -> None:
    """Prints a table. `remarks` are texts about the rows, each on an indented line below its row that is not wrapped."""
    rows = list(zip(*(column for _, column in headed), strict=True))
    groups = [rows] if remarks is None else [[], *([row] for row in rows)]
    for number, group in enumerate(groups):
        table = Table() if style.boxed else Table(box=None, padding=(0, style.gap, 0, 0), pad_edge=False)
        table.show_header = number == 0
        for (name, _), is_number, width in zip(headed, numeric, widths, strict=False):
            table.add_column(escape(name.rjust(width) if is_number else name), width=width, overflow="fold")
        for row in group:
            cells = zip(row, numeric, widths, strict=False)
            table.add_row(*(escape(text.rjust(width) if is_number else text) for text, is_number, width in cells))
        out.print(table)
        if remarks is not None and number and remarks[number - 1]:
            out.print(f"    {escape(remarks[number - 1])}", highlight=False, soft_wrap=True)


def _show_title(title: str | None) -> None:
    if title:
        out.print(escape(strip_control(title)), style="bold", highlight=False, soft_wrap=True)


def _is_numeric(column: Sequence[str]) -> bool:
    """Whether a column has numbers, apart from cells that say there is none."""
    return any(_NUMBER.fullmatch(cell) for cell in column) and all(_NUMBER.fullmatch(c) or c in _NO_NUMBER for c in column)


def _aligned(column: Sequence[str]) -> list[str]:
    """The cells of a numeric column, padded so that the decimal points are below each other. `_print_table` aligns the rest."""
    fractions = [len(cell) - cell.index(".") if _NUMBER.fullmatch(cell) and "." in cell else 0 for cell in column]
    most = max(fractions)
    padded = [cell + " " * (most - own) if _NUMBER.fullmatch(cell) else cell for cell, own in zip(column, fractions, strict=True)]
    width = max(map(len, padded))
    return [cell.rjust(width) for cell in padded]


def _unbroken(cell: str) -> int:
    """The width that a cell needs at least: a number or a command is not broken, a text only between its words."""
    return cell_len(cell) if _NUMBER.fullmatch(cell.strip()) or _COMMAND.search(cell) else _longest_word(cell)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def step(text: str) -> None:
    """Prints a line of progress on stderr."""
    err.print(f"[green]✓[/] {_text(text)}", highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Prints a remark on stderr, without a check mark."""
    err.print(_text(text), highlight=False, soft_wrap=True)


def exit_with_error(error: TallyError, *, as_json: bool = False) -> NoReturn:
    """Prints an error with its code and whose fault it is, then ends the process with exit code 1."""
    if as_json:
        show_json(error.as_json())
    else:
        err.print(f"[red]error:[/] {_text(error)}", highlight=False, soft_wrap=True)
        retry = "; a retry may succeed" if error.retry else ""
        err.print(f"[dim](code {error.code.value}, at fault: {error.fault.value}{retry})[/]", highlight=False)
    sys.exit(1)


def short_decimal(dollars: str) -> str:
    """A decimal number with four significant digits, without an exponent."""
    return f"{Context(prec=4).create_decimal(dollars).normalize():f}"
