from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from tallystick.cli.chat import session, turn
from tallystick.cli.chat.screen import MarkdownScreen, PlainScreen, last_break
from tallystick.cli.output import strip_control
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tests.cli.conftest import Tally
from tests.client.fake_coordinator import EVENTS, FakeMarket, Session, event
from tests.client.parties import MODEL

ANSWER = "A split tally stick."


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    """Keyboard input for the interactive session."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def _last_messages(fake: FakeMarket) -> list[tuple[str, str]]:
    """The messages of the last request."""
    return [(message["role"], message["content"]) for message in fake.last.request["messages"]]


def _chats(payer: Tally) -> list[Path]:
    return sorted((payer.home / "chats").glob("*.json"))


def test_one_question(payer: Tally, fake: FakeMarket) -> None:
    """One answer is printed as JSON with its cost; system prompt and limits reach the engine; nothing is saved."""
    options = ("--system", "be brief", "--max-tokens", "7", "--temperature", "0.5")
    answer = payer("chat", "hi", "--coordinator", fake.url, *options)
    assert (answer["text"], answer["model"], answer["outcome"]) == (ANSWER, MODEL, "completed")
    assert answer["usage"] == {"input": 10, "cached": 0, "output": 5}
    assert int(answer["cost"]) > 0
    assert _last_messages(fake) == [("system", "be brief"), ("user", "hi")]
    assert (fake.last.request["max_tokens"], fake.last.request["temperature"]) == (7, 0.5)
    assert not (payer.home / "chats").exists()


def test_piped_input_follows_the_prompt(payer: Tally, fake: FakeMarket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cat file | tally chat "summarise"` works, also without a prompt; an empty pipe is refused."""
    file = tmp_path / "text"
    file.write_text("a long text\n")
    for arguments, sent in ((("summarise",), "summarise\n\na long text"), ((), "a long text")):
        with file.open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            payer("chat", *arguments, "--coordinator", fake.url)
        assert _last_messages(fake) == [("user", sent)]
    file.write_text("")
    with file.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert "the prompt is empty" in payer("chat", "--coordinator", fake.url, fails=True)["message"]


def test_conversation_is_saved_and_resumed(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """Each question is sent with the earlier messages, also in a later run; the files are readable by their owner only."""
    keyboard.send_text("one\r/cost\rtwo\r/exit\r")
    text = payer.says("chat", "--coordinator", fake.url)
    assert text.count(ANSWER) == 2
    assert "2 answers" in text
    assert "20 + 10 tokens" in text
    assert _last_messages(fake) == [("user", "one"), ("assistant", ANSWER), ("user", "two")]
    (file,) = _chats(payer)
    assert {path.stat().st_mode & 0o777 for path in (file, payer.home / "chats" / "prompts")} == {0o600}
    (kept,) = payer("chat", "--list")
    assert (kept["id"], kept["title"], kept["answers"]) == (file.stem, "one", 2)
    payer("chat", "three", "--resume", "last", "--coordinator", fake.url)
    assert len(_last_messages(fake)) == 5
    assert payer("chat", "--list")[0]["answers"] == 3
    keyboard.send_text("four\r\x04")
    assert "continuing: one" in payer.says("chat", "--resume", file.stem, "--coordinator", fake.url)
    assert len(_last_messages(fake)) == 7


def test_no_history(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """With --no-history neither prompts nor answers are written to disk."""
    keyboard.send_text("a secret\r/exit\r")
    payer.says("chat", "--no-history", "--coordinator", fake.url)
    assert _last_messages(fake) == [("user", "a secret")]
    assert not (payer.home / "chats").exists()


def test_slash_commands(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """Each slash command prints its result; a wrong one prints an error, and the conversation goes on."""
    keyboard.send_text(f"/help\r/model nobody's\r/model {MODEL}\r/models\r/system be brief\r")
    keyboard.send_text("one\r/new\r/system -\rtwo\r/no\r/exit\r")
    text = payer.says("chat", "--coordinator", fake.url)
    for part in (
        "no provider sells nobody's",
        f"model: {MODEL}",
        "system prompt: be brief",
        "new conversation",
        "no command /no",
    ):
        assert part in text
    assert _last_messages(fake) == [("user", "two")]
    assert len(_chats(payer)) == 2


def test_an_error_does_not_end_the_conversation(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """A question that failed is dropped, and the next one is asked."""
    from tallystick.protocol.errors import Code, Refusal

    fake.refusals.append(Refusal(Code.INSUFFICIENT_FUNDS, "the purse is empty"))
    keyboard.send_text("one\rtwo\r/exit\r")
    assert "the purse is empty" in payer.says("chat", "--coordinator", fake.url)
    assert _last_messages(fake) == [("user", "two")]


async def _interrupted(market: Session) -> None:
    """Begins an answer, which `_CtrlC` stops once it is shown."""
    await market.match()
    await market.answer(200, EVENTS)
    await market.chunk(event("As I was"))
    await market.cancelled.wait()
    await market.finish(Usage(10, 0, 2), Outcome.CLIENT_CANCELLED)


class _CtrlC(PlainScreen):
    """Sends SIGINT, as Ctrl-C does, when text is shown."""

    def write(self, text: str) -> None:
        super().write(text)
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_an_answer_and_shows_its_cost(
    payer: Tally, fake: FakeMarket, keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversation continues from the partial answer, also after two Ctrl-C; a single question exits with code 130."""
    fake.script = _interrupted
    monkeypatch.setattr(turn, "open_screen", lambda *_args, **_options: _CtrlC(strip=False))
    monkeypatch.setattr(session, "DOUBLE_INTERRUPT_SECONDS", 1e9)
    assert "stopped; paid 0.0" in payer.says("chat", "hi", "--coordinator", fake.url, code=130)
    keyboard.send_text("hi\rgo on\r\x03/cost\r\x04")
    text = payer.says("chat", "--coordinator", fake.url)
    assert "10 + 2 tokens" in text
    assert "2 answers" in text


@pytest.mark.parametrize("name", ["../keys/default", "last", "20260101-000000-abcd"])
def test_resume_of_an_unknown_conversation(payer: Tally, name: str) -> None:
    """Only the id of a saved conversation is accepted."""
    assert "tally chat --list" in payer("chat", "hi", "--resume", name, fails=True)["message"]


def test_a_damaged_conversation(payer: Tally) -> None:
    """The error names the damaged file."""
    file = payer.home / "chats" / "20260101-000000-abcd.json"
    file.parent.mkdir()
    file.write_text('{"model": 3}')
    assert str(file) in payer("chat", "hi", "--resume", "last", fails=True)["message"]


def test_markdown_is_rendered_completely() -> None:
    """Every block appears once and in order, also one taller than the terminal; control characters are removed."""
    code = "".join(f"line {number}\n\n" for number in range(30))
    console = Console(force_terminal=True, width=60, height=10, color_system=None)
    with console.capture() as shown, MarkdownScreen(console) as screen:
        for piece in (f"# Title\n\nSome **bold** words\x1b]52;c;AAAA\x07.\n\n```\n{code}```\n\n1. one\n", "2. two"):
            screen.write(piece)
    text = shown.get()
    assert "\x1b]52" not in text
    assert "**" not in text
    for word in ("Title", "bold", "line 0", "line 29", "one"):
        assert word in text


@given(st.lists(st.sampled_from(["a\n", "\n", "```\n", "~~~~\n", "  b\n", "- c\n", "```python\n", "d"])).map("".join))
def test_break_is_never_inside_code(text: str) -> None:
    """The text before a break is complete: its fences are closed, and an unindented line follows."""
    end = last_break(text)
    line = text[:end].count("\n")
    fences = [token.map for token in MarkdownIt().parse(text) if token.type == "fence" and token.map]
    assert not any(first < line < past for first, past in fences)
    if end:
        assert text[:end].splitlines()[-1] == ""
        assert text[end] not in " \n"


def test_strip_control() -> None:
    """Control characters are removed, other text stays."""
    words: dict[str, Any] = {"a\x1b[31mb": "a[31mb", "tab\tnew\n": "tab\tnew\n", "\x9b1m\r\x7fé": "1mé"}
    assert {raw: strip_control(raw) for raw in words} == words
