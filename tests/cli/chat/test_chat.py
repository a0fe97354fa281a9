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

from tallystick.cli.chat.screen import MarkdownScreen, last_break
from tallystick.cli.output import strip_control
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tests.cli.conftest import Tally
from tests.client.fake_coordinator import EVENTS, FakeMarket, Session, event
from tests.client.parties import MODEL

ANSWER = "A split tally stick."


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    """What a person types."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys


def _said(fake: FakeMarket) -> list[tuple[str, str]]:
    """The messages of the last request."""
    return [(one["role"], one["content"]) for one in fake.last.request["messages"]]


def _chats(payer: Tally) -> list[Path]:
    return sorted((payer.home / "chats").glob("*.json"))


def test_one_question(payer: Tally, fake: FakeMarket) -> None:
    """One answer as JSON with its price; system prompt and limits reach the engine; nothing of it is kept."""
    options = ("--system", "be brief", "--max-tokens", "7", "--temperature", "0.5")
    told = payer("chat", "hi", "--coordinator", fake.url, *options)
    assert (told["text"], told["model"], told["outcome"]) == (ANSWER, MODEL, "completed")
    assert told["usage"] == {"input": 10, "cached": 0, "output": 5}
    assert int(told["cost"]) > 0
    assert _said(fake) == [("system", "be brief"), ("user", "hi")]
    assert (fake.last.request["max_tokens"], fake.last.request["temperature"]) == (7, 0.5)
    assert not (payer.home / "chats").exists()


def test_what_is_piped_in_follows_the_prompt(
    payer: Tally, fake: FakeMarket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cat file | tally chat "summarise"`, also without a prompt; an empty pipe says nothing."""
    file = tmp_path / "text"
    file.write_text("a long text\n")
    for arguments, sent in ((("summarise",), "summarise\n\na long text"), ((), "a long text")):
        with file.open() as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            payer("chat", *arguments, "--coordinator", fake.url)
        assert _said(fake) == [("user", sent)]
    file.write_text("")
    with file.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert "the prompt is empty" in payer("chat", "--coordinator", fake.url, fails=True)["message"]


def test_a_conversation_is_kept_and_taken_up(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """Each question goes out with what was said before, also in another run; files are the owner's only."""
    keyboard.send_text("one\r/cost\rtwo\r/exit\r")
    seen = payer.says("chat", "--coordinator", fake.url)
    assert seen.count(ANSWER) == 2
    assert "2 answers" in seen
    assert "20 + 10 tokens" in seen
    assert _said(fake) == [("user", "one"), ("assistant", ANSWER), ("user", "two")]
    (file,) = _chats(payer)
    assert {path.stat().st_mode & 0o777 for path in (file, payer.home / "chats" / "prompts")} == {0o600}
    (kept,) = payer("chat", "--list")
    assert (kept["id"], kept["title"], kept["answers"]) == (file.stem, "one", 2)
    payer("chat", "three", "--resume", "last", "--coordinator", fake.url)
    assert len(_said(fake)) == 5
    assert payer("chat", "--list")[0]["answers"] == 3
    keyboard.send_text("four\r\x04")
    assert "continuing: one" in payer.says("chat", "--resume", file.stem, "--coordinator", fake.url)
    assert len(_said(fake)) == 7


def test_nothing_is_kept_if_so_wished(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """With --no-history neither prompts nor answers are on disk."""
    keyboard.send_text("a secret\r/exit\r")
    payer.says("chat", "--no-history", "--coordinator", fake.url)
    assert _said(fake) == [("user", "a secret")]
    assert not (payer.home / "chats").exists()


def test_commands(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """Each command says what it did; a mistake is said, and the conversation goes on."""
    keyboard.send_text(f"/help\r/model nobody's\r/model {MODEL}\r/models\r/system be brief\r")
    keyboard.send_text("one\r/new\r/system -\rtwo\r/no\r/exit\r")
    seen = payer.says("chat", "--coordinator", fake.url)
    for part in (
        "no provider sells nobody's",
        f"model: {MODEL}",
        "system prompt: be brief",
        "new conversation",
        "no command /no",
    ):
        assert part in seen
    assert _said(fake) == [("user", "two")]
    assert len(_chats(payer)) == 2


def test_an_error_does_not_end_the_conversation(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """A failed question is forgotten, the next is asked."""
    from tallystick.protocol.errors import Code, Refusal

    fake.refusals.append(Refusal(Code.INSUFFICIENT_FUNDS, "the purse is empty"))
    keyboard.send_text("one\rtwo\r/exit\r")
    assert "the purse is empty" in payer.says("chat", "--coordinator", fake.url)
    assert _said(fake) == [("user", "two")]


async def _endless(session: Session) -> None:
    """Begins an answer, then the person presses Ctrl-C."""
    await session.match()
    await session.answer(200, EVENTS)
    await session.chunk(event("As I was"))
    os.kill(os.getpid(), signal.SIGINT)
    await session.cancelled.wait()
    await session.finish(Usage(10, 0, 2), Outcome.CLIENT_CANCELLED)


def test_ctrl_c_stops_an_answer_and_tells_what_was_paid(payer: Tally, fake: FakeMarket, keyboard: PipeInput) -> None:
    """In a conversation it goes on after that, from what came, also if Ctrl-C comes twice; a question alone ends with 130."""
    fake.script = _endless
    assert "stopped; paid 0.0" in payer.says("chat", "hi", "--coordinator", fake.url, code=130)
    keyboard.send_text("hi\rgo on\r\x03/cost\r\x04")
    seen = payer.says("chat", "--coordinator", fake.url)
    assert "10 + 2 tokens" in seen
    assert "2 answers" in seen


@pytest.mark.parametrize("name", ["../keys/default", "last", "20260101-000000-abcd"])
def test_what_is_not_kept_is_not_taken_up(payer: Tally, name: str) -> None:
    """Only conversations can be named."""
    assert "tally chat --list" in payer("chat", "hi", "--resume", name, fails=True)["message"]


def test_a_damaged_conversation(payer: Tally) -> None:
    """Is named."""
    file = payer.home / "chats" / "20260101-000000-abcd.json"
    file.parent.mkdir()
    file.write_text('{"model": 3}')
    assert str(file) in payer("chat", "hi", "--resume", "last", fails=True)["message"]


def test_markdown_is_rendered_whole() -> None:
    """Blocks appear once each, in order, also one that is taller than the terminal; nothing steers the terminal."""
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
def test_a_break_is_never_inside_of_code(text: str) -> None:
    """What is before it is whole: its fences are closed, and a line at the margin follows."""
    end = last_break(text)
    line = text[:end].count("\n")
    fences = [token.map for token in MarkdownIt().parse(text) if token.type == "fence" and token.map]
    assert not any(first < line < past for first, past in fences)
    if end:
        assert text[:end].splitlines()[-1] == ""
        assert text[end] not in " \n"


def test_harmless() -> None:
    """Control characters go, text stays."""
    words: dict[str, Any] = {"a\x1b[31mb": "a[31mb", "tab\tnew\n": "tab\tnew\n", "\x9b1m\r\x7fé": "1mé"}
    assert {raw: strip_control(raw) for raw in words} == words
