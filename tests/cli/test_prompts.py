from __future__ import annotations

import io

import pytest

from tallystick.cli.prompts import ask, choose_password
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import parse_amount


def _type(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_typo_is_asked_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong answer is named and asked for again; an empty one takes the default."""
    _type(monkeypatch, "ten", "-1", " 0.25 ", "")
    assert ask("Price", "0.1", parse_amount, instead="name it") == 250_000
    assert capsys.readouterr().err.count("; try again") == 2
    assert ask("Price", "0.1", parse_amount, instead="name it") == 100_000


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a piped stdin, the error names the question and the option that answers it."""
    _type(monkeypatch, "ten")
    with pytest.raises(BadMessage, match=r"no answer to 'Price', because stdin has ended: use --price, or .* --yes"):
        ask("Price", "0.1", parse_amount, instead="use --price")
    with pytest.raises(BadMessage, match="TALLYSTICK_PASSWORD"):
        choose_password("new")


class Terminal(io.StringIO):
    """A stdin that is a terminal."""

    def isatty(self) -> bool:
        """See io."""
        return True


def test_a_password_is_chosen_not_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The rule is told first; too short ones and ones that differ are asked again."""
    answers = iter(["short", "long enough", "long enouhg", "long enough", "long enough"])
    questions: list[str] = []

    def prompt(question: str, **_options: object) -> str:
        questions.append(question)
        return next(answers)

    monkeypatch.setattr("tallystick.cli.prompts.typer.prompt", prompt)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert choose_password("mine") == "long enough"
    shown = capsys.readouterr().err
    for part in ("Choose a password for the wallet mine: at least 8 characters", "got 5", "the two passwords differ"):
        assert part in " ".join(shown.split())
    assert questions == ["New password", *(["New password", "The same password again"] * 2)]
