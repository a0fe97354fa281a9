"""Over all commands a flag has one type and one pair of names, so that it means the same wherever it is typed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from tallystick.cli.commands import app


def _options(command: Any, path: tuple[str, ...] = ("tally",)) -> Iterator[tuple[str, Any]]:
    """Each option of each command, with the command's words."""
    for parameter in command.params:
        if parameter.param_type_name == "option":
            yield " ".join(path), parameter
    for name, sub in getattr(command, "commands", {}).items():
        yield from _options(sub, (*path, name))


OPTIONS = list(_options(get_command(app)))


def _differences(uses: dict[str, dict[object, list[str]]]) -> dict[str, dict[object, list[str]]]:
    return {flag: by_kind for flag, by_kind in uses.items() if len(by_kind) > 1}


def test_a_flag_has_one_type() -> None:
    """A flag takes a value everywhere or nowhere, of one type, once or repeatedly."""
    uses: dict[str, dict[object, list[str]]] = defaultdict(lambda: defaultdict(list))
    for command, option in OPTIONS:
        for flag in (*option.opts, *option.secondary_opts):
            annotation = getattr(option.type_descriptor, "annotation", None)
            uses[flag][annotation, option.is_flag, option.multiple].append(command)
    assert len(uses) > 50
    assert not _differences(uses)


def test_a_short_flag_stands_for_one_long_flag() -> None:
    """A letter abbreviates one flag only, and a flag that has a letter has it in every command."""
    by_letter: dict[str, dict[object, list[str]]] = defaultdict(lambda: defaultdict(list))
    by_name: dict[str, dict[object, list[str]]] = defaultdict(lambda: defaultdict(list))
    for command, option in OPTIONS:
        letters = tuple(flag for flag in option.opts if not flag.startswith("--"))
        names = tuple(flag for flag in option.opts if flag.startswith("--"))
        assert names, f"{command}: {letters} has no long form"
        for letter in letters:
            by_letter[letter][names].append(command)
        for name in names:
            by_name[name][letters].append(command)
    assert not _differences(by_letter)
    assert not _differences(by_name)


def test_every_flag_says_what_it_does() -> None:
    """Each option has a help text that begins with a capital letter and ends with a full stop."""
    for command, option in OPTIONS:
        if option.hidden:
            continue
        text = option.help or ""
        assert text[:1].isupper(), f"{command} {option.opts}: {text!r}"
        assert text.endswith((".", ")")), f"{command} {option.opts}: {text!r}"


def test_common_flags_have_their_letters() -> None:
    """The flags that most commands share have the letters that the documentation uses."""
    letters = {flag: option.opts for _, option in OPTIONS for flag in option.opts}
    for name, letter in (("--wallet", "-w"), ("--config", "-c"), ("--yes", "-y"), ("--out", "-o"), ("--limit", "-n")):
        assert letter in letters[name]
