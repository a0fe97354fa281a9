"""Tags of prefixes: which requests are recognised as the continuation of which, in every dialect."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick.client.openai.requests import ApiRequest
from tallystick.client.selection.prefix_tags import MAX_MESSAGES, MAX_TAGS, TAG_BYTES, PrefixTag, derive_tags
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

KEY = bytes(range(32))
Body = dict[str, Any]


def tags_of(path: str, body: Body, name: str | None = None, key: bytes = KEY) -> tuple[PrefixTag, ...]:
    """The tags of a request, longest prefix first."""
    return derive_tags(key, ApiRequest.of(path, json.dumps({"model": "m", **body}).encode()), name)


def longest_common(path: str, earlier: Body, later: Body, **options: Any) -> int | None:
    """The share of `later`, in percent, that the longest prefix covers by which it is recognised after `earlier`."""
    known = {prefix.tag for prefix in tags_of(path, earlier, **options)}
    return next((prefix.percent for prefix in tags_of(path, later, **options) if prefix.tag in known), None)


def user(text: object) -> Body:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: object) -> Body:
    """A message of the model."""
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "You are a tally keeper. " * 60}
TURN = [user("What is a tally?"), assistant("A split stick."), user("Since when?")]
TOOLS = [{"type": "function", "function": {"name": "count", "description": "counts " * 200, "parameters": {}}}]


CONTINUED: dict[str, tuple[str, Body, Body]] = {
    "chat": (CHAT, {"messages": [SYSTEM, *TURN[:1]]}, {"messages": [SYSTEM, *TURN]}),
    "chat without a system prompt": (CHAT, {"messages": TURN[:1]}, {"messages": TURN}),
    "chat with tools": (
        CHAT,
        {"messages": TURN[:1], "tools": TOOLS},
        {
            "messages": [
                TURN[0],
                {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "3"},
            ],
            "tools": TOOLS,
        },
    ),
    "chat after a tool's result": (
        CHAT,
        {"messages": [TURN[0], assistant(""), {"role": "tool", "tool_call_id": "c1", "content": "3"}]},
        {
            "messages": [
                TURN[0],
                assistant(""),
                {"role": "tool", "tool_call_id": "c1", "content": "3"},
                assistant("Three."),
                user("?"),
            ]
        },
    ),
    "chat, what the SDK echoes": (
        CHAT,
        {"messages": [TURN[0], assistant("x"), user("y")]},
        {
            "messages": [
                TURN[0],
                {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": None, "audio": None},
                user("y"),
                assistant("z"),
                user("a"),
            ]
        },
    ),
    "chat, reasoning that is left out later": (
        CHAT,
        {"messages": [TURN[0], {**assistant("x"), "reasoning_content": "hm"}, user("y")]},
        {"messages": [TURN[0], assistant("x"), user("y"), assistant("z"), user("a")]},
    ),
    "Messages, whose mark for the cache moves": (
        MESSAGES,
        {
            "max_tokens": 9,
            "system": [{"type": "text", "text": "s" * 2_000, "cache_control": {"type": "ephemeral"}}],
            "messages": [user([{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}])],
        },
        {
            "max_tokens": 9,
            "system": "s" * 2_000,
            "messages": [
                user("one"),
                assistant([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "1"}]),
                user([{"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}]),
            ],
        },
    ),
    "Messages with a tool's result": (
        MESSAGES,
        {
            "max_tokens": 9,
            "messages": [
                user("one"),
                assistant([{"type": "tool_use", "id": "t", "name": "n", "input": {}}]),
                user([{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "3"}]}]),
            ],
        },
        {
            "max_tokens": 9,
            "messages": [
                user("one"),
                assistant([{"type": "tool_use", "id": "t", "name": "n", "input": {}}]),
                user([{"type": "tool_result", "tool_use_id": "t", "content": "3", "cache_control": {"type": "ephemeral"}}]),
                assistant("Three."),
                user("Sure?"),
            ],
        },
    ),
    "Responses, from a text to items": (
        RESPONSES,
        {"input": "one", "instructions": "i"},
        {
            "instructions": "i",
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "1", "annotations": [], "logprobs": []}],
                },
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "two"}]},
            ],
        },
    ),
    "Responses with a call": (
        RESPONSES,
        {"input": [user("one")]},
        {
            "input": [
                user("one"),
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "n", "arguments": "{}", "status": "completed"},
                {"type": "function_call_output", "call_id": "c", "output": "3"},
            ]
        },
    ),
    "completions": (COMPLETIONS, {"prompt": "word " * 100}, {"prompt": "word " * 120}),
    "completions, one prompt in a list": (COMPLETIONS, {"prompt": ["word " * 100]}, {"prompt": "word " * 120}),
    "completions, token ids": (COMPLETIONS, {"prompt": list(range(400))}, {"prompt": [*range(400), 9, 99_999_999]}),
    "a branch at an earlier turn": (
        CHAT,
        {"messages": [TURN[0], assistant("x"), user("y"), assistant("z"), user("a")]},
        {"messages": [TURN[0], assistant("x"), user("another question")]},
    ),
    "lone surrogates": (COMPLETIONS, {"prompt": "\ud800" * 300}, {"prompt": "\ud800" * 400}),
}


@pytest.mark.parametrize("case", CONTINUED)
def test_a_later_turn_is_recognised(case: str) -> None:
    """A request that continues another has the tag of a prefix that ends where the other ended, or shortly before."""
    path, earlier, later = CONTINUED[case]
    assert longest_common(path, earlier, later) is not None


OTHERS: dict[str, tuple[str, Body, Body]] = {
    "another question": (CHAT, {"messages": [user("one")]}, {"messages": [user("two")]}),
    "another system prompt": (
        CHAT,
        {"messages": [SYSTEM, *TURN[:1]]},
        {"messages": [{"role": "system", "content": "Other."}, *TURN]},
    ),
    "other tools": (CHAT, {"messages": TURN[:1], "tools": TOOLS}, {"messages": TURN}),
    "another model": (CHAT, {"messages": TURN[:1]}, {"messages": TURN, "model": "n"}),
    "another answer in between": (
        CHAT,
        {"messages": [TURN[0], assistant("x"), user("y")], "prompt_cache_key": None},
        {"messages": [user("Z"), assistant("w"), user("y"), assistant("z"), user("a")]},
    ),
    "the same texts, cut elsewhere": (CHAT, {"messages": [user("ab"), user("c")]}, {"messages": [user("a"), user("bc")]}),
    "a short system prompt in common": (
        CHAT,
        {"messages": [{"role": "system", "content": "Be brief."}, user("one")]},
        {"messages": [{"role": "system", "content": "Be brief."}, user("two")]},
    ),
    "short prompts": (COMPLETIONS, {"prompt": "once upon"}, {"prompt": "once upon a time"}),
    "several prompts": (COMPLETIONS, {"prompt": ["a" * 400, "b"]}, {"prompt": ["a" * 400, "b"]}),
    "embeddings": (EMBEDDINGS, {"input": "one " * 400}, {"input": "one " * 400}),
    "messages of another type": (CHAT, {"messages": "one"}, {"messages": [1, 2]}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_conversation_is_not_mistaken_for_it(case: str) -> None:
    """Requests that do not begin alike, or too little of which is alike, share no tag."""
    path, earlier, later = OTHERS[case]
    assert longest_common(path, earlier, later) is None


def test_the_longest_prefix_comes_first() -> None:
    """Each turn has its tag, and then the system prompt, with the share that it covers."""
    tags = tags_of(CHAT, {"messages": [SYSTEM, *TURN]})
    assert [prefix.shared for prefix in tags] == [False, False, True]
    percents = [prefix.percent for prefix in tags]
    assert percents == sorted(percents, reverse=True)
    assert percents[0] == 100
    assert all(len(prefix.tag) == TAG_BYTES for prefix in tags)


def test_a_system_prompt_in_common_counts_only_if_it_is_most_of_the_request() -> None:
    """Else the load decides where a new conversation begins."""
    new = {"messages": [SYSTEM, user("new")]}
    assert longest_common(CHAT, {"messages": [SYSTEM, user("one")]}, new) is not None
    assert longest_common(CHAT, {"messages": [SYSTEM, user("one")]}, {"messages": [SYSTEM, user("new" * 2_000)]}) is None


def test_a_name_separates_conversations_and_joins_their_requests() -> None:
    """Requests of one name are of one conversation whatever they say; those of another name are of another."""
    one, two = {"messages": [user("one")]}, {"messages": [user("two")]}
    assert longest_common(CHAT, one, two, name="mine") == 100
    assert not {prefix.tag for prefix in tags_of(CHAT, one, "mine")} & {prefix.tag for prefix in tags_of(CHAT, one, "yours")}
    keyed = {"prompt_cache_key": "mine"}
    assert tags_of(CHAT, one | keyed) == tags_of(CHAT, one | keyed, "mine")
    assert longest_common(CHAT, one | keyed, two | keyed) == 100
    assert tags_of(CHAT, one | keyed, "yours") != tags_of(CHAT, one | keyed)
    assert tags_of(CHAT, one | {"prompt_cache_key": 7}) == tags_of(CHAT, one)


def test_a_key_decides_the_tags() -> None:
    """Without the key nobody can tell whether a tag is that of a guessed text."""
    body = {"messages": [SYSTEM, *TURN]}
    assert not {prefix.tag for prefix in tags_of(CHAT, body)} & {prefix.tag for prefix in tags_of(CHAT, body, key=bytes(32))}


def test_the_number_of_tags_is_bounded() -> None:
    """A long conversation has the tags of its longest prefixes; one of absurd length has none."""
    turns = [message for number in range(500) for message in (user(f"q{number}"), assistant("a"))]
    tags = tags_of(CHAT, {"messages": [SYSTEM, *turns, user("last")]}, "mine")
    assert len(tags) <= MAX_TAGS
    assert longest_common(CHAT, {"messages": [SYSTEM, *turns, user("q")]}, {"messages": [SYSTEM, *turns, user("q"), *TURN]})
    assert len(tags_of(COMPLETIONS, {"prompt": "x" * 5_000_000})) <= MAX_TAGS
    assert tags_of(CHAT, {"messages": [{"role": "user"}] * (MAX_MESSAGES + 1)}) == ()


def _nested(depth: int) -> Any:
    content: Any = "x"
    for _ in range(depth):
        content = [content, 1]
    return content


ODD = [[{}], [{"role": 7, "content": 5}], [{"type": ["a"]}], [user([1, None, [[]]])], [], [user({})], [user(_nested(400))]]


@pytest.mark.parametrize("messages", ODD)
def test_messages_of_any_shape_have_tags(messages: list[Any]) -> None:
    """The engine judges what a message is; here it is only recognised."""
    body = {"messages": messages}
    assert tags_of(CHAT, body) == tags_of(CHAT, json.loads(json.dumps(body)))
