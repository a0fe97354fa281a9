from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.meter import Counted
from node.domain.responses import EventReader, Malformed, UpstreamModel, data_of, read_document, read_models
from tallystick.protocol.wire import dumps

STREAM = b'data: {"a":1}\n\n: keep-alive\n\nevent: x\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n'


def events(parts: list[bytes], limit: int = 1_000) -> list[bytes]:
    """All events of a stream that comes in these parts."""
    reader = EventReader(limit)
    return [event for part in parts for event in reader.feed(part)]


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8), newline=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_are_the_same_however_they_are_cut(cuts: list[int], newline: bytes) -> None:
    """Events come out whole and equal, wherever the network cut the stream, with any of the three line endings."""
    stream = STREAM.replace(b"\n", newline)
    edges = [0, *sorted(cuts), len(stream)]
    parts = [stream[a:b] for a, b in pairwise(edges)]
    # A lone CR at the very end could still become a CRLF, so the last event may have to wait for what follows.
    found = events([*parts, b": end\n\n"])
    assert [event for event in found if b"end" not in event] == events([STREAM])


def test_data_is_what_follows_its_name() -> None:
    """An event's data lines are joined; a comment has none."""
    assert [data_of(event) for event in events([STREAM])] == [b'{"a":1}', None, b'{"b":\n2}', b"[DONE]"]
    assert data_of(b'data:{"a":1}\n\n') == b'{"a":1}'


def test_an_event_without_end_is_bounded() -> None:
    """Bytes without a blank line are not gathered for ever, and a long event that did end is refused too."""
    for parts in ([b"data: " + b"x" * 600, b"x" * 600], [b"data: " + b"x" * 1_200 + b"\n\n"]):
        with pytest.raises(Malformed):
            events(parts)


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
    """A role, an empty delta or an end alone are no output; text, reasoning and tool calls are."""
    reading = read_document(dumps(document))
    assert (reading.output, reading.text, reading.finish) == (output, text, finish)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (None, None),
        ({"prompt_tokens": 3, "completion_tokens": 4}, Counted(3, 0, 4)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}, Counted(3, 2, 4)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": None}, Counted(3, 0, 4)),
        ({"prompt_tokens": 3, "total_tokens": 3}, Counted(3, 0, 0)),
        ({"prompt_tokens": "3", "completion_tokens": 4}, None),
        ({"prompt_tokens": True, "completion_tokens": 4}, None),
        ({}, None),
        ("many", None),
    ],
)
def test_usage_is_taken_only_where_it_makes_sense(usage: object, counted: Counted | None) -> None:
    """Counts come from OpenAI's usage object; anything else counts as no usage at all."""
    reading = read_document(dumps({"choices": [], "usage": usage}))
    assert reading.counted == counted
    assert reading.usage_only is (counted is not None)


@pytest.mark.parametrize("data", [b"{", b"[]", b'"x"', b'{"error": {"message": "no"}}', b""])
def test_what_is_no_answer_is_malformed(data: bytes) -> None:
    """Broken JSON, other JSON and an error object in place of an answer are not taken for one."""
    with pytest.raises(Malformed):
        read_document(data)


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    """Whatever an engine sends is an answer or malformed, never a crash."""
    reader = EventReader(100)
    try:
        for event in reader.feed(data):
            read_document(data_of(event) or b"")
    except Malformed:
        pass


def test_models_are_read_with_their_context() -> None:
    """Names, owners and context lengths as vLLM, hosted APIs and llama.cpp tell them; entries that are none are left out."""
    listed = [
        {"id": "a", "owned_by": "vllm", "max_model_len": 4_096},
        {"id": "b", "context_length": 8_192},
        {"id": "c", "meta": {"n_ctx": 512}},
        {"id": "d", "max_model_len": "many", "meta": None},
        {"id": 5},
        "e",
    ]
    assert read_models(dumps({"data": listed})) == (
        UpstreamModel("a", 4_096, "vllm"),
        UpstreamModel("b", 8_192),
        UpstreamModel("c", 512),
        UpstreamModel("d"),
    )
    for body in (b"<html>", b"[]", b'{"data": 1}'):
        with pytest.raises(Malformed):
            read_models(body)
