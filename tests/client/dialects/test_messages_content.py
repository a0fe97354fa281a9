"""Turns and content blocks of Anthropic's Messages as chat messages."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tallystick.client.dialects.messages_content import translate_turns
from tallystick.protocol.errors import BadMessage

PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
LINKED = {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}}
PNG_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
LINKED_PART = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
CACHED = {"cache_control": {"type": "ephemeral"}}


def text(value: str, **members: Any) -> dict[str, Any]:
    """A block of text."""
    return {"type": "text", "text": value} | members


def user(*blocks: Any) -> dict[str, Any]:
    """A turn of the user."""
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": list(blocks)}


def use(call: str, **arguments: Any) -> dict[str, Any]:
    """A call of a tool."""
    return {"type": "tool_use", "id": call, "name": "look", "input": arguments}


def result(call: str, content: Any = None, **members: Any) -> dict[str, Any]:
    """What a tool returned."""
    return {"type": "tool_result", "tool_use_id": call} | ({} if content is None else {"content": content}) | members


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (None, None),
        ("", None),
        ("Be brief.", "Be brief."),
        ([text("A", **CACHED)], "A"),
        ([text("A"), text("B", **CACHED)], "A\n\nB"),
        ([text("x-anthropic-billing-header: cc_version=2.1; cch=abc;"), text("B")], "B"),
        ([], None),
    ],
)
def test_the_system_prompt(system: Any, expected: str | None) -> None:
    """A text or blocks become one system message; Claude Code's line for Anthropic's accounting is no prompt."""
    first = translate_turns(system, [user(text("hi"))])[0]
    assert (first["content"] if first["role"] == "system" else None) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("hi", "hi"),
        ([text("hi")], "hi"),
        ([text("a", **CACHED), text("b", citations=None)], "a\n\nb"),
        ([text(""), text("b")], "b"),
        ([text("")], ""),
        ([], ""),
        ([PNG, text("What is it?")], [PNG_PART, {"type": "text", "text": "What is it?"}]),
        ([LINKED], [LINKED_PART]),
        ([{"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}], "T\n\nD"),
        ([{"type": "document", "source": {"type": "content", "content": [text("D"), PNG]}}], [text("D"), PNG_PART]),
        ([{"type": "document", "source": {"type": "content", "content": "D"}, "citations": {"enabled": False}}], "D"),
        ([{"type": "search_result", "title": "T", "source": "https://x", "content": [text("D")]}], "T\nhttps://x\n\nD"),
    ],
)
def test_what_a_user_says(content: Any, expected: Any) -> None:
    """Text alone is one text, which every chat template can read; images stay where they are; documents of text are text."""
    assert translate_turns(None, [{"role": "user", "content": content}]) == [{"role": "user", "content": expected}]


def test_turns_of_one_role_are_one_turn() -> None:
    """Chat templates want the roles to alternate, and Anthropic's API joins turns by itself."""
    turns = [user(text("a")), user(text("b")), assistant(text("c")), {"role": "assistant", "content": "d"}, user(text("e"))]
    contents = [(message["role"], message["content"]) for message in translate_turns(None, turns)]
    assert contents == [("user", "a\n\nb"), ("assistant", "cd"), ("user", "e")]


def test_a_system_message_between_turns_is_said_by_the_user() -> None:
    """Many chat templates allow a system message at the beginning only."""
    turns = [user(text("hi")), {"role": "system", "content": "Mind the time."}, assistant(text("ok"))]
    said, _ = translate_turns("S", turns)[1:]
    assert said == {"role": "user", "content": "hi\n\n<system-reminder>\nMind the time.\n</system-reminder>"}


def test_calls_of_tools_and_their_results() -> None:
    """Results follow the calls at once, whatever else the user says; text beside a call stays."""
    turns = [
        user(text("go")),
        assistant(text("I look."), use("a", x=1), use("b")),
        user(text("and?"), result("a", "one"), result("b", [text("two"), text("three")], is_error=False)),
    ]
    _, called, first, second, last = translate_turns(None, turns)
    assert called["content"] == "I look."
    functions = [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in called["tool_calls"]
    ]
    assert functions == [("a", "look", {"x": 1}), ("b", "look", {})]
    assert first == {"role": "tool", "tool_call_id": "a", "content": "one"}
    assert second == {"role": "tool", "tool_call_id": "b", "content": "two\n\nthree"}
    assert last == {"role": "user", "content": "and?"}


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (result("a"), ""),
        (result("a", ""), ""),
        (result("a", []), ""),
        (result("a", "no such file", is_error=True), "Error: no such file"),
        (result("a", "Error: gone", is_error=True), "Error: gone"),
        (result("a", [{"type": "search_result", "title": "T", "source": "s", "content": [text("D")]}]), "T\ns\n\nD"),
    ],
)
def test_a_result(block: dict[str, Any], expected: str) -> None:
    """A result may be empty or an error, which a chat completion has no other mark for."""
    turns = [user(text("go")), assistant(use("a")), user(block)]
    assert translate_turns(None, turns)[2:] == [{"role": "tool", "tool_call_id": "a", "content": expected}]


def test_a_call_without_text_has_no_content() -> None:
    """As OpenAI's own answers have it."""
    message = translate_turns(None, [user(text("go")), assistant(use("a"))])[1]
    assert message["content"] is None


def test_images_in_results_follow_as_the_users() -> None:
    """Messages of the role tool have text only. All results come before the images of any."""
    turns = [
        user(text("go")),
        assistant(use("a"), use("b")),
        user(result("a", [PNG]), result("b", [text("t"), LINKED]), text("see")),
    ]
    first, second, images = translate_turns(None, turns)[2:]
    assert [message["role"] for message in (first, second, images)] == ["tool", "tool", "user"]
    assert first["content"]
    assert second["content"] == "t"
    assert [part for part in images["content"] if part["type"] == "image_url"] == [PNG_PART, LINKED_PART]
    assert images["content"][-1] == {"type": "text", "text": "see"}


def test_reasoning_goes_back_to_the_model() -> None:
    """Thinking blocks become reasoning_content; what only Anthropic's models can read is left out."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "xyz"}
    message = translate_turns(None, [user(text("go")), assistant(thought, hidden, text("Yes."))])[1]
    assert message == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("turns", "named"),
    [
        (["hi"], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([user("hi")], "messages[0].content[0]"),
        ([user(text("a")), user({"type": "text"})], "messages[1].content[0].text"),
        ([user({"type": "video"})], "messages[0].content[0]"),
        ([user(text("a"), {"type": "image", "source": {"type": "file", "file_id": "f"}})], "messages[0].content[1].source.type"),
        ([user({"type": "image"})], "messages[0].content[0].source.type"),
        ([user({"type": "image", "source": {"type": "base64", "data": "x"}})], "messages[0].content[0].source"),
        (
            [user({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}})],
            "messages[0].content[0].source.type",
        ),
        ([user({"type": "document", "source": {"type": "url", "url": "https://x"}})], "messages[0].content[0].source.type"),
        (
            [user({"type": "document", "source": {"type": "text", "data": "x"}, "citations": {"enabled": True}})],
            "messages[0].content[0].citations",
        ),
        ([user({"type": "container_upload", "file_id": "f"})], "messages[0].content[0]"),
        (
            [user(text("a")), assistant({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}})],
            "messages[1].content[0]",
        ),
        ([user(text("a")), assistant({"type": "web_search_tool_result", "content": []})], "messages[1].content[0]"),
        ([user(text("a")), assistant(PNG)], "messages[1].content[0]"),
        ([user(text("a")), assistant({"type": "tool_use", "id": "a", "name": "n"})], "messages[1].content[0].input"),
        ([user(text("a")), assistant({"type": "tool_use", "input": {}})], "messages[1].content[0]"),
        ([user({"type": "tool_result", "content": "x"})], "messages[0].content[0].tool_use_id"),
        ([user(result("a", [{"type": "video"}]))], "messages[0].content[0].content[0]"),
        ([user(text("a")), {"role": "system", "content": [PNG]}], "messages[1].content[0]"),
    ],
)
def test_what_is_refused_names_its_member(turns: list[Any], named: str) -> None:
    """Nothing is left out silently."""
    with pytest.raises(BadMessage, match=f"^{re.escape(named)}: "):
        translate_turns(None, turns)


def test_a_refused_system_prompt() -> None:
    """A system prompt is text."""
    with pytest.raises(BadMessage, match=r"^system\[0\]: "):
        translate_turns([PNG], [user(text("hi"))])
