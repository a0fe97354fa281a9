"""Terminal output: tables whose rows can be compared, nothing to copy is broken, and no control characters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rich.console import Console

from tallystick.cli import output

ADDRESS = "0x" + "ab" * 20
COLUMNS = ("provider", "offered", "input", "output", "region", "speed")
ROW = (ADDRESS, "yes", "0.1", "0.4", "eu-west-and-more", "fast\x1b]0;owned\x07 [bold]")
BALANCE = ("where", "dollars", "how to get it")
PLACES = [
    ("wallet", "0", "it is yours"),
    ("purse, free", "9.999793", "tally thaw AMOUNT, wait, tally withdraw"),
    (f"reserved for {ADDRESS}", "12.5", f"tally release {ADDRESS}, wait, repeat it; or the provider gives it back"),
]
Print = Callable[[], None]


def _shown(monkeypatch: pytest.MonkeyPatch, width: int, show: Print) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(output, "out", console)
    with console.capture() as capture:
        show()
    return [line.rstrip() for line in capture.get().splitlines()]


def _asks() -> None:
    output.show_table(COLUMNS, [ROW, ROW], title="asks")


def test_a_table_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that fits has one line per row, in a frame where there is room for one."""
    for width, frame in ((160, True), (98, False)):
        shown = _shown(monkeypatch, width, _asks)
        assert len([line for line in shown if ADDRESS in line and "eu-west-and-more" in line]) == 2
        assert sum("provider" in line for line in shown) == 1
        assert any("│" in line for line in shown) is frame


def test_a_table_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is too wide is printed row by row; markup and control characters of strangers have no effect."""
    shown = _shown(monkeypatch, 60, _asks)
    assert sum("provider" in line for line in shown) == 2
    assert any("region" in line and "eu-west-and-more" in line for line in shown)
    assert not any("\x1b]0" in line for line in shown)
    assert any("[bold]" in line for line in shown)


@pytest.mark.parametrize("width", [20, 40, 80, 140, 250])
def test_what_is_copied_is_never_broken(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """At any width an address and a command with an address are on one line, which no frame breaks."""
    shown = _shown(monkeypatch, width, lambda: output.show_table(BALANCE, PLACES))
    assert any(f"tally release {ADDRESS}, wait" in line for line in shown)
    assert any(f"reserved for {ADDRESS}" in line for line in shown)
    fields = _shown(monkeypatch, width, lambda: output.show_fields([("escrow", ADDRESS), ("rpc", "http://127.0.0.1:8545")]))
    assert any(ADDRESS in line for line in fields)
    assert any("http://127.0.0.1:8545" in line for line in fields)


@pytest.mark.parametrize("width", [80, 140, 250])
def test_rows_stay_comparable(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """The decimal points of a column are below each other, and a remark that has no room goes below its row."""
    shown = _shown(monkeypatch, width, lambda: output.show_table(BALANCE, PLACES))
    rows = [next(line for line in shown if place in line and amount in line) for place, amount, _ in PLACES]
    points = [
        line.index(amount) + (amount.index(".") if "." in amount else len(amount))
        for line, (_, amount, _) in zip(rows, PLACES, strict=True)
    ]
    assert len(set(points)) == 1
    for line, (_, _, remark) in zip(rows, PLACES, strict=True):
        below = shown[shown.index(line) + 1] if line is not rows[-1] or width < 250 else ""
        assert remark in line or below == f"    {remark}"


def test_numbers_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """If text must be broken, it is broken between words, and numbers are whole."""
    rows = [("a long name of many words that wraps", "1234567.890123", "word " * 10) for _ in range(2)]
    shown = _shown(monkeypatch, 50, lambda: output.show_table(("name", "dollars", "n"), rows))
    assert sum("1234567.890123" in line for line in shown) == 2
    for word in ("name", "many", "wraps"):
        assert any(word in line.split() for line in shown)


def test_columns_that_are_no_numbers_are_left_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column with a text among its numbers is no numeric column; one with gaps is."""
    rows = [("a", "1.5", "1.5"), ("b", "unknown", "about two"), ("c", "10", "10")]
    shown = _shown(monkeypatch, 60, lambda: output.show_table(("name", "speed", "mixed"), rows))
    lines = [next(line for line in shown if line.startswith(f"│ {name}")) for name in "abc"]
    assert lines[0].index("1.5") == lines[2].index("10") + 1
    assert lines[0].rindex("1.5") == lines[2].rindex("10") == lines[1].index("about two")


def test_an_empty_table_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table without rows is one line."""
    assert _shown(monkeypatch, 80, lambda: output.show_table(("a",), [], title="Jobs")) == ["Jobs: none"]
    assert _shown(monkeypatch, 80, lambda: output.show_table(("a",), [])) == ["none"]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_checks_show_a_remedy_on_its_own_line(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Each check is a line; only a problem is followed by its remedy, which is a line of its own."""
    command = f"tally chain fund {ADDRESS}"
    checks = [("chain", True, f"contract {ADDRESS} on chain 31337", "unused"), ("gas", False, "no coins", command)]
    shown = _shown(monkeypatch, width, lambda: output.show_checks(checks))
    assert [line.split()[0] for line in shown] == ["ok", "PROBLEM", "tally"]
    assert ADDRESS in shown[0]
    assert shown[2].strip() == command
    assert shown[0].index("contract") == shown[1].index("no coins") == shown[2].index("tally")
