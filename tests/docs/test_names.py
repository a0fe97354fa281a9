"""The check of names in the documentation: each kind of mistake is reported with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.checks import markdown, names
from docs.checks.markdown import Page


def problems(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path, name: str = "page.md") -> list[str]:
    """What the check reports for a page with this text, in a checkout that is otherwise this one."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    for module in (names, markdown):
        monkeypatch.setattr(module, "ROOT", folder)
    if not (folder / "docs").exists():
        for part in ("docs", "node", "tallystick", "coordinator", "contracts", "scripts", ".ci"):
            (folder / part).symlink_to(REAL_ROOT / part)
    return list(names._problems(Page(path)))


REAL_ROOT = markdown.ROOT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see [the guide](docs/no-such-page.md)", "page.md:1: broken link: docs/no-such-page.md"),
        ("\nsee [the part](#no-such-part)", "page.md:2: broken anchor: #no-such-part"),
        ("run `tally frobnicate`", "page.md:1: no such command: tally frobnicate"),
        ("run `tally node run --frobnicate`", "page.md:1: tally node run: no such option: --frobnicate"),
        ("```sh\ntally wallet frobnicate\n```", "page.md:1: no such command: tally wallet frobnicate"),
        ("```console\n$ tally chat --frobnicate hello\n```", "page.md:1: tally chat: no such option: --frobnicate"),
        ("in `node/domain/no_such_module.py`", "page.md:1: no such path: node/domain/no_such_module.py"),
        ("set `TALLYSTICK_NO_SUCH_VARIABLE`", "page.md:1: no such environment variable: TALLYSTICK_NO_SUCH_VARIABLE"),
        ("set `no_such_setting_anywhere`", "page.md:1: no such name in the code: no_such_setting_anywhere"),
        ("the table `[[no_such_table]]`", "page.md:1: no such table in the settings: [[no_such_table]]"),
        ("```toml client\nno_such = 1\n```", "page.md:1: no such setting: no_such"),
        ("```toml client\n[[budgets]]\nno_such = 1\n```", "page.md:1: no such setting: budgets.no_such"),
        ("```toml\nbroken =\n```", "page.md:1: not TOML: "),
        ("```python\nprint(\n```", "page.md:1: does not compile: "),
        ("```json\n{broken}\n```", "page.md:1: not JSON: "),
        ("```mermaid\nflowchart LR\n  a[node/no_such/room.py]\n```", "page.md:1: no such path: node/no_such/room.py"),
    ],
)
def test_a_mistake_is_reported_once_with_its_place(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A page with one mistake has exactly one problem, which names the place and the mistake."""
    (problem,) = problems(text, monkeypatch, tmp_path)
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        "# A part\n\nsee [the part](#a-part) and [a page](docs/index.md) and [elsewhere](https://example.org/none)",
        "run `tally node run --config node.toml`, then `tally --help`",
        "```sh\ntally node init \\\n  --wallet node --yes\n```",
        "the setting `top_up_total` and the table `[[budgets]]`, the variable `TALLYSTICK_HOME`",
        "`node/domain/tabs.py` and every `node/domain/*.py`; `~/node/domain/none.py` is elsewhere",
        '```json\n{"cut": …}\n```',
        "```text\ntally frobnicate is output and no command\n```",
        "```python\nresult = await market.chat()\n```",
    ],
)
def test_a_page_without_mistakes_passes(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Right names, links that leave the site, shortened JSON and plain text are no problems."""
    assert problems(text, monkeypatch, tmp_path) == []


def test_the_changelog_may_name_what_was_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Old commands and settings belong into the changelog, but its links are checked."""
    text = "`tally frobnicate` and `no_such_setting_anywhere` are gone, see [this](docs/none.md)"
    assert problems(text, monkeypatch, tmp_path, "CHANGELOG.md") == ["CHANGELOG.md:1: broken link: docs/none.md"]
