"""Event streams of chat completions as Anthropic's: order of events, blocks, fragments, ends and errors."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tallystick.client.dialects.messages_request import ChatRequest
from tallystick.client.dialects.messages_stream import MessageStream
from tallystick.protocol.pricing import Usage

REQUEST = ChatRequest(b"", "asked", stream=True, stop_sequences=("###",))
HIDING = ChatRequest(b"", "asked", stream=True, shows_thinking=False)
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}
DONE = b"data: [DONE]\n\n"


def event(delta: Any = None, **members: Any) -> bytes:
    """An event with a delta in its choice."""
    choice = {"index": 0, "delta": {} if delta is None else delta} | members
    return b"data: " + json.dumps({"id": "c", "model": "engine/m", "choices": [choice]}).encode() + b"\n\n"


def usage(**counts: Any) -> bytes:
    """The event that reports usage."""
    return b"data: " + json.dumps({"choices": [], "usage": counts or USAGE}).encode() + b"\n\n"


def fragment(index: int | None, arguments: str, call: str | None = None, name: str | None = None) -> bytes:
    """An event with a fragment of a call."""
    function = {"arguments": arguments} | ({"name": name} if name else {})
    members = {"index": index, "id": call}
    return event({"tool_calls": [{"function": function} | {key: value for key, value in members.items() if value is not None}]})


FULL = b"".join(
    [
        event({"role": "assistant", "content": ""}),
        event({"reasoning_content": "Hm, "}),
        event({"reasoning_content": "well."}),
        event({"content": "Gr\u00fc\u00dfe \U0001f600"}),
        event({"content": "!"}),
        fragment(0, "", "call_a", "look"),
        fragment(0, '{"x":'),
        fragment(0, " 1}"),
        fragment(1, "{}", "call_b", "look"),
        event({}, finish_reason="tool_calls"),
        usage(),
        DONE,
    ]
)


def translate(*parts: bytes, request: ChatRequest = REQUEST, billed: Usage | None = None) -> list[dict[str, Any]]:
    """The events of a translated stream, whose names and types must agree."""
    stream = MessageStream(request, job="ab")
    return read(b"".join([*map(stream.feed, parts), stream.finish(billed)]))


def read(output: bytes) -> list[dict[str, Any]]:
    """The data of each event."""
    events = []
    for raw in filter(None, output.split(b"\n\n")):
        name, data = raw.split(b"\n")
        document = json.loads(data.removeprefix(b"data: "))
        assert name.removeprefix(b"event: ").decode() == document["type"]
        events.append(document)
    return events


def shape(events: list[dict[str, Any]]) -> list[str]:
    """The events in short, without pings."""
    names = {"content_block_start": "start", "content_block_delta": "delta", "content_block_stop": "stop"}
    short = []
    for document in events:
        if document["type"] == "ping":
            continue
        text = names.get(document["type"], document["type"])
        if "index" in document:
            text += f" {document['index']}"
        if "content_block" in document:
            text += f" {document['content_block']['type']}"
        if text.startswith("delta"):
            delta = document["delta"]
            text += " " + next(str(value) for name, value in delta.items() if name != "type")
        short.append(text)
    return short


def blocks(events: list[dict[str, Any]]) -> list[str]:
    """What a client puts together: each block's kind and what its deltas add up to. Blocks must not overlap."""
    put: list[list[str]] = []
    open_index: int | None = None
    for document in events:
        if document["type"] == "content_block_start":
            assert open_index is None
            assert document["index"] == len(put)
            open_index = document["index"]
            block = document["content_block"]
            put.append([block["type"] if block["type"] != "tool_use" else f"{block['name']}({block['id']})"])
        elif document["type"] == "content_block_delta":
            assert document["index"] == open_index
            put[-1] += [value for name, value in document["delta"].items() if name not in ("type", "signature")]
        elif document["type"] == "content_block_stop":
            assert document["index"] == open_index
            open_index = None
    assert open_index is None
    return [f"{kind}:{''.join(parts)}" for kind, *parts in put]


def test_the_order_of_events() -> None:
    """Each kind of block, in the order in which Anthropic's streams have them."""
    events = translate(FULL)
    assert shape(events) == [
        "message_start",
        "start 0 thinking",
        "delta 0 Hm, ",
        "delta 0 well.",
        "delta 0 unsigned",
        "stop 0",
        "start 1 text",
        "delta 1 Gr\u00fc\u00dfe \U0001f600",
        "delta 1 !",
        "stop 1",
        "start 2 tool_use",
        'delta 2 {"x":',
        "delta 2  1}",
        "stop 2",
        "start 3 tool_use",
        "delta 3 {}",
        "stop 3",
        "message_delta",
        "message_stop",
    ]
    message = events[0]["message"]
    assert (message["id"], message["model"], message["content"], message["stop_reason"]) == ("msg_ab", "engine/m", [], None)
    counts = {"input_tokens": 4, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 5, "output_tokens": 4}
    assert events[-2] == {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": counts}
    kinds = [document["delta"]["type"] for document in events if document["type"] == "content_block_delta"]
    expected = ["thinking_delta"] * 2 + ["signature_delta"] + ["text_delta"] * 2 + ["input_json_delta"] * 3
    assert kinds == expected


def test_a_stream_may_be_split_anywhere() -> None:
    """At every byte, and into single bytes; also within a character and with CRLF line ends."""
    whole = translate(FULL)
    for at in range(1, len(FULL)):
        assert translate(FULL[:at], FULL[at:]) == whole
    assert translate(*(FULL[at : at + 1] for at in range(len(FULL)))) == whole
    crlf = FULL.replace(b"\n", b"\r\n")
    for at in range(0, len(crlf), 7):
        assert translate(crlf[:at], crlf[at:]) == whole


def test_what_comes_is_sent_at_once() -> None:
    """Deltas do not wait for what follows them."""
    stream = MessageStream(REQUEST, job="ab")
    assert shape(read(stream.feed(event({"content": "a"})))) == ["message_start", "start 0 text", "delta 0 a"]
    assert shape(read(stream.feed(event({"content": "b"})))) == ["delta 0 b"]
    assert shape(read(stream.feed(fragment(0, '{"x"', "c", "look")))) == ["stop 0", "start 1 tool_use", 'delta 1 {"x"']
    assert shape(read(stream.feed(event({}, finish_reason="tool_calls")))) == []
    assert shape(read(stream.feed(usage() + DONE))) == ["stop 1", "message_delta", "message_stop"]
    assert stream.finish(None) == b""


CALLS = ['look(a):{"x": 1}', 'look(b):{"y": 2}', "look(c):{}"]
SPLIT: dict[int, list[tuple[str | None, str]]] = {
    0: [("a", '{"x"'), (None, ": 1}")],
    1: [("b", '{"y"'), (None, ": 2}")],
    2: [("c", "{}")],
}


@pytest.mark.parametrize(
    "order",
    sorted({order for order in itertools.permutations([0, 0, 1, 1, 2]) if order.index(0) < order.index(1) < order.index(2)}),
)
def test_mixed_fragments_of_calls(order: tuple[int, ...]) -> None:
    """However the fragments of parallel calls are mixed, each call arrives whole, one block after the other."""
    left = {index: iter(parts) for index, parts in SPLIT.items()}
    fragments = [(index, *next(left[index])) for index in order]
    parts = [fragment(index, text, call, "look" if call else None) for index, call, text in fragments]
    assert blocks(translate(*parts, event({}, finish_reason="tool_calls"), DONE)) == CALLS


@pytest.mark.parametrize(
    "parts",
    [
        [fragment(0, '{"x": 1}', "a", "look"), fragment(0, '{"y": 2}', "b", "look"), fragment(0, "{}", "c", "look")],
        [fragment(None, '{"x": 1}', "a", "look"), fragment(None, '{"y": 2}', "b", "look"), fragment(None, "{}", "c", "look")],
        [
            *(fragment(0, part, "a", "look" if not at else None) for at, part in enumerate(('{"x"', ": 1}"))),
            *(fragment(1, part, "b", "look") for part in ('{"y": 2', "}")),
            fragment(2, "{}", "c", "look"),
        ],
        [
            fragment(None, '{"x"', "a", "look"),
            fragment(None, ": 1}"),
            fragment(None, '{"y": 2}', "b", "look"),
            fragment(2, "{}", "c", "look"),
        ],
    ],
)
def test_calls_as_engines_send_them(parts: list[bytes]) -> None:
    """Whole calls that share an index or have none, and ids that are repeated with each fragment."""
    assert blocks(translate(*parts, DONE)) == CALLS


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([event({"role": "assistant", "content": ""})], []),
        ([event({"content": None}), event({"content": "a"})], ["text:a"]),
        ([event({"content": "a"}), event({"reasoning": "r"}), event({"content": "b"})], ["text:a", "thinking:r", "text:b"]),
        ([event({"content": "a", "reasoning_content": "r"})], ["thinking:r", "text:a"]),
        ([event({"refusal": "No."})], ["text:No."]),
        ([fragment(0, "", "a", "look")], ["look(a):"]),
        ([fragment(0, "", "a", "look"), fragment(1, "{}", "b", "look")], ["look(a):", "look(b):{}"]),
        ([fragment(0, '{"x"', "a", "look")], ['look(a):{"x"']),
        ([fragment(0, "{}", "a", "look"), event({"content": "done"})], ["look(a):{}", "text:done"]),
        ([fragment(0, '{"x"', "a", "look"), event({"content": "t"}), fragment(0, ":1}")], ['look(a):{"x":1}', "text:t"]),
        ([fragment(0, "", "a"), fragment(0, "{}", None, "look")], ["look(a):{}"]),
        ([fragment(0, "{}", None, "look")], ["look(toolu_ab_0):{}"]),
        ([event({"function_call": {"name": "look", "arguments": "{}"}})], ["look(toolu_ab_0):{}"]),
        ([event({"content": "other"}, index=1), event({"content": "first"})], ["text:first"]),
        ([b'data: {"choices":[{"index":0,"message":{"content":"whole"}}]}\n\n'], ["text:whole"]),
        ([b": waiting\n\n", event({"content": "a"})], ["text:a"]),
        ([b"\xef\xbb\xbf" + event({"content": "a"})], ["text:a"]),
        ([event({"content": "\ud83d"}), event({"content": "\ude00"})], ["text:\ud83d\ude00"]),
    ],
)
def test_blocks(parts: list[bytes], expected: list[str]) -> None:
    """Every kind of delta ends up in its block; nothing makes an empty one."""
    events = translate(*parts, DONE)
    assert blocks(events) == expected
    assert shape(events)[-2:] == ["message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("ends", "billed", "expected"),
    [
        ([event({}, finish_reason="stop"), usage(), DONE], None, ("end_turn", None, 4)),
        ([event({"content": "b"}, finish_reason="length"), usage(), DONE], None, ("max_tokens", None, 4)),
        ([event({}, finish_reason="stop", stop_reason="###"), usage(), DONE], None, ("stop_sequence", "###", 4)),
        ([event({}, finish_reason="content_filter"), DONE], None, ("refusal", None, 0)),
        ([event({"refusal": "No."}, finish_reason="stop"), DONE], None, ("refusal", None, 0)),
        ([event({}, finish_reason="stop"), DONE], Usage(9, 0, 7), ("end_turn", None, 7)),
        ([event({}, finish_reason="stop")], Usage(9, 0, 7), ("end_turn", None, 7)),
        ([event({}, finish_reason="stop"), usage()[:-2]], Usage(9, 0, 7), ("end_turn", None, 4)),
        (
            [event({}, finish_reason="stop"), usage(prompt_tokens=0, completion_tokens=0), DONE],
            Usage(9, 0, 7),
            ("end_turn", None, 7),
        ),
        ([event({}, finish_reason="stop"), event({}), usage(), DONE], None, ("end_turn", None, 4)),
    ],
)
def test_ends(ends: list[bytes], billed: Usage | None, expected: tuple[str, str | None, int]) -> None:
    """The reason may come with text, alone, or before further events; usage may be missing, zero, or in a last half event."""
    *_, last, stop = translate(event({"content": "a"}), *ends, billed=billed)
    assert (last["delta"]["stop_reason"], last["delta"]["stop_sequence"], last["usage"]["output_tokens"]) == expected
    assert stop == {"type": "message_stop"}


def test_usage_at_the_beginning() -> None:
    """Engines that report usage with every event have the input at the beginning, where Anthropic's streams have it."""
    first = b'data: {"choices":[{"index":0,"delta":{}}],"usage":{"prompt_tokens":9,"completion_tokens":0}}\n\n'
    start = translate(first, event({"content": "a"}), DONE)[0]
    assert start["message"]["usage"]["input_tokens"] == 9
    assert translate(event({"content": "a"}))[0]["message"]["usage"]["input_tokens"] == 0


def test_reasoning_that_the_caller_hides_shows_that_the_model_works() -> None:
    """A ping keeps the connection alive, as comments of the engine do."""
    events = translate(event({"reasoning_content": "r"}), b": waiting\n\n", event({"content": "a"}), DONE, request=HIDING)
    assert blocks(events) == ["text:a"]
    assert [document["type"] for document in events].count("ping") == 3


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (b'data: {"error":{"message":"out of memory","code":500}}\n\n', "api_error"),
        (b'data: {"error":{"message":"slow down","code":429}}\n\n', "rate_limit_error"),
        (b'data: {"error":"overloaded","code":503}\n\n', "overloaded_error"),
        (b'data: {"object":"error","message":"images are not supported","code":400}\n\n', "invalid_request_error"),
        (b"data: {not json}\n\n", "api_error"),
        (b"data: [1]\n\n", "api_error"),
    ],
)
def test_an_error_ends_a_stream(broken: bytes, kind: str) -> None:
    """The last event is the error in Anthropic's form; nothing follows, and the stream counts as failed."""
    stream = MessageStream(REQUEST, job="ab")
    output = stream.feed(event({"content": "a"}) + broken + event({"content": "b"}) + DONE) + stream.finish(None)
    *before, error = read(output)
    assert shape(before) == ["message_start", "start 0 text", "delta 0 a"]
    assert (error["type"], error["error"]["type"], stream.failed) == ("error", kind, True)
    assert error["error"]["message"]


def test_an_event_that_is_too_long() -> None:
    """It ends the stream with an error instead of filling the memory."""
    stream = MessageStream(REQUEST, job="ab")
    output = b"".join(stream.feed(b"x" * (1 << 22)) for _ in range(5))
    assert read(output)[-1]["type"] == "error"
    assert (stream.failed, stream.feed(b"\n\n"), stream.finish(None)) == (True, b"", b"")
