"""What is a good input of a batch, and how each fault of it is named."""

from __future__ import annotations

import codecs
import json
import random
from typing import Any

import pytest

from tallystick.client.batches.input_lines import (
    ENDPOINTS,
    MAX_ERRORS,
    MAX_LINES,
    InputCheck,
    LineRequest,
    LineSplitter,
    RawLine,
    normal_endpoint,
)
from tallystick.client.batches.records import InputLine, LineError
from tallystick.protocol.routes import CHAT, RESPONSES

GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m", "messages": []}}


def read(content: bytes, pieces: int = 7, longest: int = 1_000) -> tuple[list[InputLine], list[LineError], InputCheck]:
    """The lines and faults of an input that comes in pieces."""
    splitter, check, lines = LineSplitter(longest), InputCheck(CHAT), list[InputLine]()
    parts = [content[at : at + pieces] for at in range(0, len(content), pieces)]
    for raw in [line for part in parts for line in splitter.feed(part)] + list(splitter.finish()):
        line = check.check(raw)
        lines += [line] if line is not None else []
    check.finish()
    return lines, check.errors, check


def one_fault(line: bytes) -> LineError:
    """The only fault of an input of one line."""
    lines, errors, _ = read(line)
    assert not lines
    [error] = errors
    return error


def changed(**changes: Any) -> bytes:
    """A line that differs from a good one."""
    return json.dumps({name: value for name, value in (GOOD | changes).items() if value is not ...}).encode()


@pytest.mark.parametrize("pieces", [1, 2, 3, 64, 10_000])
def test_lines_are_found_wherever_the_pieces_end(pieces: int) -> None:
    """LF, CRLF, a byte order mark, empty lines and a missing last end make no difference; offsets lead to the lines."""
    first, second, third = (changed(custom_id=name) for name in "abc")
    content = codecs.BOM_UTF8 + first + b"\r\n\n  \t\r\n" + second + b"\n" + third
    lines, errors, check = read(content, pieces)
    assert not errors
    assert [line.number for line in lines] == [1, 4, 5]
    contents = [content[line.offset : line.offset + line.length] for line in lines]
    assert [LineRequest.of(part, CHAT).custom_id for part in contents] == ["a", "b", "c"]
    assert check.count == 3


@pytest.mark.parametrize(
    "line", [b"{", b"{}x", b"[1]", b"7", b'"text"', b"\xff{}", b'{"a": "\xc3"}', b"\xff\xfe{\0}\0", b"{} {}"]
)
def test_what_is_no_json_object(line: bytes) -> None:
    """Each line must be one JSON object in UTF-8."""
    error = one_fault(line)
    assert (error.code, error.line) == ("invalid_json_line", 1)


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"custom_id": ...}, "missing_required_parameter", "custom_id"),
        ({"custom_id": None}, "missing_required_parameter", "custom_id"),
        ({"custom_id": 7}, "invalid_custom_id", "custom_id"),
        ({"custom_id": ""}, "invalid_custom_id", "custom_id"),
        ({"custom_id": "x" * 513}, "invalid_custom_id", "custom_id"),
        ({"method": ...}, "missing_required_parameter", "method"),
        ({"method": "GET"}, "invalid_method", "method"),
        ({"method": ["POST"]}, "invalid_method", "method"),
        ({"url": ...}, "missing_required_parameter", "url"),
        ({"url": "/v1/embeddings"}, "mismatched_endpoint", "url"),
        ({"url": {}}, "mismatched_endpoint", "url"),
        ({"body": ...}, "missing_required_parameter", "body"),
        ({"body": "text"}, "invalid_body", "body"),
        ({"body": {}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": 7}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": "\ud800"}}, "missing_required_parameter", "body.model"),
        ({"body": {"model": "m", "stream": True}}, "invalid_body", "body.stream"),
        ({"body": {"model": "m", "stream": "yes"}}, "invalid_body", "body.stream"),
        ({"body": {"model": "m", "background": True}}, "invalid_body", "body.background"),
    ],
)
def test_faults_of_members(changes: dict[str, Any], code: str, param: str) -> None:
    """Each fault names the line and the member."""
    error = one_fault(changed(**changes))
    assert (error.code, error.param, error.line) == (code, param, 1)


@pytest.mark.parametrize(
    "changes",
    [{"method": "post"}, {"url": "/chat/completions"}, {"custom_id": "\ud800"}, {"body": {"model": "m", "stream": False}}],
)
def test_what_is_tolerated(changes: dict[str, Any]) -> None:
    """A method in lower case, a URL without /v1, a lone surrogate in an id, and `stream` that is false are no faults."""
    lines, errors, _ = read(changed(**changes))
    assert (len(lines), errors) == (1, [])


def test_ids_are_unique() -> None:
    """The same custom_id twice is a fault of the second line, which names the first."""
    _, errors, _ = read(b"\n".join([changed(), changed(custom_id="b"), changed()]))
    [error] = errors
    assert (error.code, error.line, error.param) == ("duplicate_custom_id", 3, "custom_id")
    assert "line 1" in error.message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n\t"])
def test_an_input_without_requests(content: bytes) -> None:
    """It is one fault, of no line."""
    _, errors, _ = read(content)
    assert [(error.code, error.line) for error in errors] == [("empty_file", None)]


def test_a_line_that_is_too_long() -> None:
    """It is a fault, is never held, and the lines after it are read."""
    long = changed(body={"model": "m", "x": "y" * 5_000})
    lines, errors, _ = read(long + b"\n" + changed(custom_id="b") + b"\n" + long, longest=200)
    assert [(error.code, error.line) for error in errors] == [("line_too_long", 1), ("line_too_long", 3)]
    assert [line.number for line in lines] == [2]


def test_bounds() -> None:
    """Neither more than MAX_ERRORS faults nor more than MAX_LINES requests are read."""
    check = InputCheck(CHAT)
    for number in range(1, MAX_ERRORS + 1):
        assert not check.exhausted
        check.check(RawLine(number, 0, b"{"))
    assert check.exhausted
    check = InputCheck(CHAT, count=MAX_LINES - 1)
    assert check.check(RawLine(1, 0, changed())) is not None
    assert not check.exhausted
    assert check.check(RawLine(2, 0, changed(custom_id="b"))) is None
    assert check.exhausted
    assert check.errors[-1].code == "too_many_requests"


def test_models() -> None:
    """The models are known as far as it matters whether there is one."""
    lines = [changed(custom_id=str(number), body={"model": f"m{number}"}) for number in range(4)]
    assert len(read(b"\n".join(lines))[2].models) == 2
    assert read(lines[0])[2].models == {"m0"}


def test_the_same_line_is_the_same_request() -> None:
    """A line gives the same bytes whenever it is read, so that its idempotency key fits."""
    line = changed(body={"model": "m", "n": 12345678901234567890123, "x": 1.0, "y": "\ud800é"})
    assert LineRequest.of(line, CHAT) == LineRequest.of(line, CHAT)
    assert b"12345678901234567890123" in LineRequest.of(line, CHAT).body
    kept = LineRequest.of(changed(body={"model": "m", "store": True}), RESPONSES)
    assert json.loads(kept.body)["store"] is True
    assert json.loads(LineRequest.of(changed(), RESPONSES).body)["store"] is False


def test_endpoints() -> None:
    """Endpoints are known with and without /v1, and nothing else is one."""
    for endpoint in ENDPOINTS:
        assert normal_endpoint(endpoint) == normal_endpoint(endpoint.removeprefix("/v1")) == endpoint
    assert [normal_endpoint(value) for value in ("/v1/models", "", None, 7, "/v1/messages", "https://x/v1/embeddings")] == [
        None
    ] * 6


def test_any_bytes_are_read_without_a_crash() -> None:
    """Random changes of an input give lines or faults, and every line that is accepted is a request."""
    chance = random.Random(1)
    base = b"\n".join(changed(custom_id=str(number)) for number in range(5))
    for _ in range(2_000):
        content = bytearray(base)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        lines, _, _ = read(bytes(content), chance.randint(1, 200))
        for line in lines:
            LineRequest.of(bytes(content[line.offset : line.offset + line.length]), CHAT)
