"""Terminal output: tables that fit, and no control characters."""

from __future__ import annotations

import pytest
from rich.console import Console

from tallystick.cli import output

COLUMNS = ("provider", "offered", "input", "output", "region", "speed")
ROW = ("0x" + "ab" * 20, "yes", "0.1", "0.4", "eu-west-and-more", "fast\x1b]0;owned\x07 [bold]")


def _shown(monkeypatch: pytest.MonkeyPatch, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(output, "out", console)
    with console.capture() as capture:
        output.show_table(COLUMNS, [ROW, ROW], title="asks", keyed=True)
    return capture.get()


def test_table_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that fits has one line per row."""
    shown = _shown(monkeypatch, 160)
    assert len([line for line in shown.splitlines() if "0xabab" in line and "eu-west-and-more" in line]) == 2
    assert shown.count("provider") == 1


def test_table_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is too wide is printed row by row; markup and control characters of strangers have no effect."""
    shown = _shown(monkeypatch, 80)
    assert shown.count("provider") == 2
    assert any("region" in line and "eu-west-and-more" in line for line in shown.splitlines())
    assert "\x1b]0" not in shown
    assert "[bold]" in shown
