"""The layout check: what it accepts and what it reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.check_layout import ROOT, misplaced_tests, silent_rooms


def _file(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_repository_passes() -> None:
    """Tests mirror the rooms here, and every room introduces itself."""
    assert [*misplaced_tests(ROOT), *silent_rooms(ROOT)] == []


@pytest.mark.parametrize("name", ["jobs/test_runner.py", "jobs/test_runner_endings.py", "test_ports.py"])
def test_a_test_beside_its_module_is_accepted(tmp_path: Path, name: str) -> None:
    """A module has one test file, or several that name an aspect each."""
    _file(tmp_path / "node/jobs/runner.py")
    _file(tmp_path / "node/ports.py")
    _file(tmp_path / "tests/node" / name)
    assert list(misplaced_tests(tmp_path)) == []


@pytest.mark.parametrize("name", ["test_runner.py", "jobs/test_run.py", "jobs/test_runners.py", "service/test_runner.py"])
def test_a_test_elsewhere_is_reported(tmp_path: Path, name: str) -> None:
    """A test in another room, in none, or under another name is a fault."""
    _file(tmp_path / "node/jobs/runner.py")
    _file(tmp_path / "tests/node" / name)
    assert len(list(misplaced_tests(tmp_path))) == 1


@pytest.mark.parametrize(("text", "faults"), [("", 1), ('"""Jobs."""', 1), ('"""Jobs. May import `domain`."""', 0)])
def test_a_room_says_what_it_may_import(tmp_path: Path, text: str, faults: int) -> None:
    """The docstring of a room's `__init__` is its introduction."""
    _file(tmp_path / "node/jobs/__init__.py", text)
    assert len(list(silent_rooms(tmp_path))) == faults
