"""The progress of the first installation, on a terminal and elsewhere, and what a failure of pip shows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from scripts import install
from scripts.install import Progress

FETCHING = (
    "Looking in indexes: https://registry.example/simple",
    "Ignoring pywin32: markers 'sys_platform == \"win32\"' don't match your environment",
    "WARNING: Location 'file:///simple/anyio/' is ignored: it is neither a file nor a directory.",
    "Collecting safe-pysha3==1.0.7 (from -r constraints.txt (line 1))",
    "  Downloading anyio-4.16.0-py3-none-any.whl (100 kB)",
    "Processing /files/aiohappyeyeballs-2.7.1-py3-none-any.whl (from -r constraints.txt (line 4))",
    "Requirement already satisfied: idna==3.20 in ./lib (3.20)",
)


class Terminal(io.StringIO):
    """A text buffer that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_where_no_terminal_is() -> None:
    """One line for each quarter; packages for other systems do not count, and nothing else of pip's output is shown."""
    out = io.StringIO()
    progress = Progress(5, out)
    for line in FETCHING:
        progress.read(line)
        progress.show()
    assert (progress.total, progress.fetched, progress.name) == (4, 3, "idna")
    progress.read("Installing collected packages: anyio, idna")
    progress.installed = 4
    progress.show()
    assert out.getvalue().splitlines() == [
        "  25% (2 of 4 packages fetched, 0 installed)",
        "  100% (4 of 4 packages fetched, 4 installed)",
    ]


def test_a_bar_on_a_terminal() -> None:
    """It is drawn in place, fits a terminal of 80 columns, and is gone at the end."""
    out = Terminal()
    progress = Progress(2, out)
    progress.read(FETCHING[3])
    progress.show()
    drawn = out.getvalue()
    assert drawn.startswith("\r[")
    assert " 25% safe-pysha3" in drawn
    assert len(drawn) <= 80
    progress.end()
    assert out.getvalue().endswith("\r\033[K")


def test_a_failure_shows_pips_reason_without_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be installed is named last, and the warnings of each package are left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "constraints.txt").write_text("nothing==1\n")
    assert install.main() != 0
    shown = capsys.readouterr().err
    assert "pip failed; its whole output is in .venv/install.log" in shown
    assert (tmp_path / ".venv" / "install.log").read_text().splitlines()[-1] in shown
