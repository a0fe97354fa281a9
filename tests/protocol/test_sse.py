from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.sse import EventReader, MalformedAnswer, event_data, event_name

STREAM = b'data: {"a":1}\n\n: keep-alive\n\nevent: x\ndata: {"b":\ndata: 2}\n\ndata: [DONE]\n\n'


def events(parts: list[bytes], limit: int = 1_000) -> list[bytes]:
    """All events of a stream that arrives in these parts."""
    reader = EventReader(limit)
    return [event for part in parts for event in reader.feed(part)]


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8), newline=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_events_are_the_same_however_they_are_cut(cuts: list[int], newline: bytes) -> None:
    """Events are equal for any split of the stream, with each of the three line endings."""
    stream = STREAM.replace(b"\n", newline)
    edges = [0, *sorted(cuts), len(stream)]
    parts = [stream[a:b] for a, b in pairwise(edges)]
    # A lone CR at the very end could still become a CRLF, so the last event may have to wait for what follows.
    whole = events([*parts, b": end\n\n"])
    assert [event for event in whole if b"end" not in event] == events([STREAM])


def test_event_data() -> None:
    """An event's data lines are joined; a comment has no data."""
    assert [event_data(event) for event in events([STREAM])] == [b'{"a":1}', None, b'{"b":\n2}', b"[DONE]"]
    assert event_data(b'data:{"a":1}\n\n') == b'{"a":1}'


def test_event_name() -> None:
    """The last event line names the event; data that looks like one does not."""
    assert event_name(b"event: error\ndata: {}\n\n") == "error"
    assert event_name(b"data: {}\nevent:error\n\n") == "error"
    assert event_name(b'data: {"event: error": 1}\n\n') == ""
    assert event_name(b"event: a\nevent: b\ndata: 1\n\n") == "b"


def test_an_event_without_end_is_bounded() -> None:
    """An endless event is not stored, and a complete event above the limit is refused too."""
    for parts in ([b"data: " + b"x" * 600, b"x" * 600], [b"data: " + b"x" * 1_200 + b"\n\n"]):
        with pytest.raises(MalformedAnswer):
            events(parts)
