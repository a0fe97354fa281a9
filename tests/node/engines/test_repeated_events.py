"""Events that are recognised by their bytes: the reader says of each stream what it says if it parses every event."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.requests import EngineRequest
from node.engines.repeated_events import RepeatedEvents
from node.engines.streams import EngineBroken, StreamReader
from node.ports import ResponsePart
from tallystick.protocol.openai_wire import read_completion
from tallystick.protocol.routes import CHAT
from tallystick.protocol.sse import MalformedAnswer, event_data

Read = tuple[bytes, int, bool, Any, str]


def event(text: str, *, spaced: bool = False, ascii_only: bool = False, **members: Any) -> bytes:
    """One event of a chat as an engine writes it. `members`: more of its delta; "choice", "document": more of those."""
    choice, document = members.pop("choice", {}), members.pop("document", {})
    separators = (", ", ": ") if spaced else (",", ":")
    body = {"id": "c", "model": "m", "choices": [{"index": 0, "delta": {"content": text} | members} | choice]} | document
    return b"data: " + json.dumps(body, separators=separators, ensure_ascii=ascii_only).encode(errors="replace") + b"\n\n"


def read(data: bytes, *, parses_all: bool, rename: tuple[str, str] | None, pieces: int) -> Read:
    """All that a reader says of a stream: its bytes, its text, whether it had output, the usage, and the error that ended it."""
    reader = StreamReader(EngineRequest(CHAT, b"{}", stream=True, strip_usage=False, rename=rename), 1 << 20)
    if parses_all:
        reader._repeated = None
    shown, text, output, usage, error = b"", 0, False, None, ""
    try:
        for start in range(0, len(data), pieces):
            part = reader.feed(data[start : start + pieces])
            if part is not None:
                shown, text, output = shown + part.data, text + part.text_bytes, output or part.has_output
                usage = part.usage or usage
        for last in reader.finish():
            shown, text = shown + (last.data if isinstance(last, ResponsePart) else last.tail), text + last.text_bytes
            usage = last.usage or usage
    except (EngineBroken, MalformedAnswer) as raised:
        error = repr(raised)
    return shown, text, output, usage, error


texts = st.sampled_from(
    ["a", " word", "", '"', "\\", "\n", "\x00", "\x7f", "é", "日本", "\ud800", '"content":"x"', "0" * 20]
) | st.text(max_size=5)
members = st.fixed_dictionaries(
    {},
    optional={
        "role": st.just("assistant"),
        "reasoning_content": texts,
        "tool_calls": st.just([{"index": 0, "function": {"name": "f", "arguments": "{}"}}]),
        "choice": st.sampled_from([{}, {"finish_reason": None}, {"finish_reason": "stop"}, {"finish_reason": ""}, {"text": "b"}]),
        "document": st.sampled_from(
            [{}, {"usage": None}, {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}, {"created": 5}, {"content": "top"}]
        ),
    },
)
forms = st.tuples(st.booleans(), st.booleans(), members)
streams = st.lists(forms, min_size=1, max_size=3).flatmap(
    lambda chosen: st.lists(st.tuples(st.sampled_from(chosen), texts), min_size=1, max_size=12)
)


@given(streams, st.sampled_from([None, ("m", "sold"), ("m", "m")]), st.integers(1, 400))
def test_recognised_events_are_read_as_parsed_ones(stream: Any, rename: tuple[str, str] | None, pieces: int) -> None:
    """Streams of any forms and texts, in any pieces, read the same, whether or not events are recognised."""
    data = b"".join(event(text, spaced=spaced, ascii_only=plain, **more) for (spaced, plain, more), text in stream)
    expected, got = (read(data, parses_all=parses, rename=rename, pieces=pieces) for parses in (True, False))
    assert got == expected


@pytest.mark.parametrize("spaced", [True, False])
def test_an_event_that_differs_in_its_text_needs_no_parser(spaced: bool) -> None:
    """After one event, others of its form are recognised, with their own text; also where the model gets another name."""
    events = RepeatedEvents()
    first, second = event("one", spaced=spaced, role="a"), event(" zwölf", spaced=spaced, role="a")
    assert events.read(first) is None
    events.learn(first, first.replace(b'"m"', b'"sold"'), read_completion(event_data(first) or b""))
    other = len("a") if read_completion(event_data(first) or b"").text_bytes > len("one") else 0
    assert events.read(second) == (second.replace(b'"m"', b'"sold"'), len(" zwölf".encode()) + other)


@pytest.mark.parametrize(
    "other",
    [
        event('"'),
        event("\\"),
        event("\n"),
        event(""),
        event("é", ascii_only=True),
        event("a", role="b"),
        event("a", choice={"finish_reason": "stop"}),
        event("a", document={"usage": {"prompt_tokens": 1}}),
        event("a", spaced=True),
        event("a")[:-2],
        event("a").replace(b'"a"', b'"\xff"'),
        event("a").replace(b'"a"', b'"a","content":"b"'),
        event("a").replace(b'"a"', b"null"),
        event("a").replace(b"data: ", b"event: error\ndata: "),
    ],
)
def test_any_other_event_is_parsed(other: bytes) -> None:
    """An event that differs in more than plain text is left to the parser."""
    events, first = RepeatedEvents(), event("one")
    events.learn(first, first, read_completion(event_data(first) or b""))
    assert events.read(event("two")) is not None
    assert events.read(other) is None


@pytest.mark.parametrize(
    "first",
    [
        event("a", choice={"finish_reason": "stop"}),
        event("a", document={"usage": {"prompt_tokens": 1, "completion_tokens": 1}}),
        event("a", document={"content": "top"}),
        event(""),
        event("é", ascii_only=True),
        event("a").replace(b'"content":', b'"content" :'),
    ],
)
def test_an_event_that_says_more_is_no_form(first: bytes) -> None:
    """An event that ends an answer, reports usage, or writes its text in another way is no form for later ones."""
    events = RepeatedEvents()
    events.learn(first, first, read_completion(event_data(first) or b""))
    assert events.read(first) is None


def test_an_engine_whose_events_never_repeat_costs_no_more() -> None:
    """Where events differ in more than their text again and again, no further form is learnt."""
    events = RepeatedEvents()
    for number in range(40):
        event_of = event("a", document={"created": number})
        events.learn(event_of, event_of, read_completion(event_data(event_of) or b""))
    assert events.read(event("b", document={"created": 39})) is None
