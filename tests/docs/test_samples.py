"""The check of samples: a sample that fails, prints something else or does not end is reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from docs.checks import markdown, samples
from docs.checks.markdown import Page


def run(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """What the check reports for a page with this text."""
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(markdown, "ROOT", folder)
    return list(samples._run_page(Page(path), dict(os.environ)))


def test_samples_that_print_what_the_page_shows_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shell and Python samples run in one folder, in the order of the page."""
    text = (
        "```sh run\necho one > file\n```\n\n"
        "```python run\nprint(open('file').read(), 'and more')\n```\n\n"
        "```text output\none …\n```\n"
    )
    assert run(text, monkeypatch, tmp_path) == []


@pytest.mark.parametrize("sample", ["```sh run\nfalse\ntrue\n```", "```sh run\nfalse | true\n```", "```python run\n1 / 0\n```"])
def test_a_sample_that_fails_is_reported(sample: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command that fails anywhere in a sample fails it, and the rest of the page does not run."""
    (problem,) = run(f"{sample}\n\n```sh run\ntouch ran\n```\n", monkeypatch, tmp_path)
    assert problem.startswith("page.md:1: exit status 1")


def test_the_error_of_a_failed_sample_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The report has what the sample wrote to stderr."""
    (problem,) = run("```python run\nraise SystemExit('the reason')\n```\n", monkeypatch, tmp_path)
    assert "the reason" in problem


def test_other_output_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Output that differs from the page is shown as it was printed."""
    (problem,) = run("```sh run\necho two\n```\n\n```text output\none\n```\n", monkeypatch, tmp_path)
    assert problem == "page.md:5: the sample printed something else:\n    two"


def test_output_without_a_sample_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Expected output must follow a sample that runs."""
    (problem,) = run("```sh\necho one\n```\n\n```text output\none\n```\n", monkeypatch, tmp_path)
    assert problem == "page.md:5: no sample comes before this output"


def test_a_sample_that_does_not_end_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sample is stopped after TIMEOUT seconds; what it printed until then is shown."""
    monkeypatch.setattr(samples, "TIMEOUT", 0.5)
    (problem,) = run("```sh run\necho begun; exec sleep 60\n```\n", monkeypatch, tmp_path)
    assert problem.startswith("page.md:1: exit status 124")
    assert "begun" in problem


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a b", "a\n  b\n", True),
        ("a … d", "a b\nc d", True),
        ("0x…", "0xabc", True),
        ("…", "", True),
        ("a.b", "axb", False),
        ("a", "a b", False),
        ("a … d", "a b c", False),
    ],
)
def test_an_ellipsis_stands_for_any_text(expected: str, printed: str, same: bool) -> None:
    """White space does not count, and nothing but an ellipsis is a wildcard."""
    assert samples.matches(expected, printed) is same
