from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.openai_wire import (
    MAX_CHOICES,
    completion_text,
    count_choices,
    delta_text,
    read_completion,
)
from tallystick.protocol.routes import CHAT, COMPLETIONS
from tallystick.protocol.sse import EventReader, MalformedAnswer, event_data
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import dumps


@pytest.mark.parametrize(
    ("document", "output", "text", "finish"),
    [
        ({"choices": [{"delta": {"role": "assistant"}}]}, False, 0, None),
        ({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}, False, 0, None),
        ({"choices": [{"delta": {"role": "assistant", "content": None, "tool_calls": []}}]}, False, 0, None),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}]}, False, 0, "stop"),
        ({"choices": [{"delta": {"content": "né"}}]}, True, 3, None),
        ({"choices": [{"delta": {"reasoning_content": "hm"}}]}, True, 2, None),
        ({"choices": [{"delta": {"tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]}}]}, True, 3, None),
        ({"choices": [{"text": ""}]}, False, 0, None),
        ({"choices": [{"text": "ab", "finish_reason": "length"}]}, True, 2, "length"),
        ({"choices": [{"text": "a", "finish_reason": "length"}, {"text": "b", "finish_reason": "stop"}]}, True, 2, "length"),
        ({"choices": [{"message": {"role": "assistant", "content": "abc"}, "finish_reason": "stop"}]}, True, 3, "stop"),
        ({"choices": []}, False, 0, None),
        ({"choices": "no"}, False, 0, None),
        ({}, False, 0, None),
    ],
)
def test_output_is_what_a_user_would_see(document: dict[str, object], output: bool, text: int, finish: str | None) -> None:
    """Text, reasoning and tool calls are output; a role, an empty delta or an end marker is not."""
    reading = read_completion(dumps(document))
    assert (reading.has_output, reading.text_bytes, reading.finish_reason) == (output, text, finish)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (None, None),
        ({"prompt_tokens": 3, "completion_tokens": 4}, ReportedUsage(3, 0, 4)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}, ReportedUsage(3, 2, 4)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": None}, ReportedUsage(3, 0, 4)),
        ({"prompt_tokens": 3, "total_tokens": 3}, ReportedUsage(3, 0, 0)),
        ({"prompt_tokens": "3", "completion_tokens": 4}, ReportedUsage(3, 0, 4)),
        ({"prompt_tokens": "three", "completion_tokens": 4}, None),
        ({"prompt_tokens": True, "completion_tokens": 4}, None),
        ({}, None),
        ("many", None),
    ],
)
def test_usage_is_read_only_if_it_is_valid(usage: object, counted: ReportedUsage | None) -> None:
    """Counts come from OpenAI's usage object; an invalid one counts as no usage."""
    reading = read_completion(dumps({"choices": [], "usage": usage}))
    assert reading.usage == counted
    assert reading.usage_only is (counted is not None)


@pytest.mark.parametrize("data", [b"{", b"[]", b'"x"', b'{"error": {"message": "no"}}', b""])
def test_malformed_answers(data: bytes) -> None:
    """Invalid JSON, other JSON and error objects are malformed answers."""
    with pytest.raises(MalformedAnswer):
        read_completion(data)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    """Any bytes of an engine are an answer or malformed, and never crash the reader."""
    reader = EventReader(100)
    try:
        for event in reader.feed(data):
            read_completion(event_data(event) or b"")
    except MalformedAnswer:
        pass


@pytest.mark.parametrize(
    ("path", "request_members", "choices"),
    [
        (CHAT, {}, 1),
        (CHAT, {"n": None}, 1),
        (CHAT, {"n": 3, "prompt": ["a", "b"]}, 3),
        (CHAT, {"n": 2, "best_of": 3}, 3),
        (COMPLETIONS, {"n": 2, "best_of": 3, "prompt": ["a", "b"]}, 6),
        (COMPLETIONS, {"prompt": [[1], [2], [3]]}, 3),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 1),
        (COMPLETIONS, {"prompt": []}, 1),
        (CHAT, {"n": MAX_CHOICES}, MAX_CHOICES),
    ],
)
def test_choices_are_counted_over_all_prompts(path: str, request_members: dict[str, object], choices: int) -> None:
    """An engine generates the larger of `n` and `best_of` for each prompt."""
    assert count_choices(path, request_members) == choices


@pytest.mark.parametrize("members", [{"n": MAX_CHOICES + 1}, {"n": 0}, {"n": True}, {"n": 1.5}, {"best_of": 1 << 31}])
def test_impossible_numbers_of_choices_are_refused(members: dict[str, object]) -> None:
    """Too many choices, none, and counts that are not whole numbers are the caller's error."""
    with pytest.raises(BadMessage):
        count_choices(CHAT, members)


def test_the_text_of_the_first_choice_is_extracted() -> None:
    """Only the first choice's visible text counts, in a whole answer and in an event; without text the result is empty."""
    assert delta_text({"choices": [{"index": 1, "delta": {"content": "b"}}, {"delta": {"content": "a"}}, 7]}) == "a"
    assert delta_text({"choices": [{"text": "a"}]}) == "a"
    assert delta_text({"choices": [{"delta": {"reasoning_content": "hm"}}]}) == ""
    assert delta_text({"type": "response.output_text.delta", "delta": "a"}) == "a"
    assert completion_text({"choices": [{"message": {"content": None}}]}) == ""
    assert completion_text({"choices": [{"message": 5}]}) is None
    assert completion_text([]) is None
