"""JSON beyond RFC 8259: what is read, what is written again, and what stays an error."""

from __future__ import annotations

import json
import math
import sys

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import MAX_DEPTH, dump_lenient, load_lenient, parse_lenient


@pytest.mark.parametrize(
    "document",
    [b'{"a":"\\ud83d"}', b'{"a":1000000000000000000000007}', b'{"a":-9223372036854775809}', b'{"a":"x"}', b"[1.5,null,true]"],
)
def test_what_is_read_is_written_unchanged(document: bytes) -> None:
    """Lone surrogates and integers of any size survive."""
    assert dump_lenient(load_lenient(document)) == document


def test_what_the_fast_parser_refuses() -> None:
    """NaN, Infinity, control characters, invalid UTF-8 and a byte order mark."""
    assert math.isnan(load_lenient(b"[NaN]")[0])
    assert load_lenient(b"[-Infinity]") == [-math.inf]
    assert load_lenient(b'["a\nb"]') == ["a\nb"]
    assert load_lenient(b'["\xff"]') == ["\ufffd"]
    assert load_lenient(b"\xef\xbb\xbf[1]") == [1]


@pytest.mark.parametrize("before", [b'"', b'\\"\\\\"', b'"\\\n"', b"]" * 10_000, b'"' + b"[" * 10_000 + b'"', b"[1]," * 1_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"\\ud83d":'])
def test_depth_is_bounded_for_any_recursion_limit(before: bytes, opening: bytes) -> None:
    """A document that is nested too deeply is refused, also in a process that raised Python's recursion limit."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)
    try:
        with pytest.raises(ValueError, match=r"nested too deeply|Expecting|Extra data|Invalid"):
            load_lenient(before + opening * 1_000_000)
        with pytest.raises(ValueError, match="nested too deeply"):
            load_lenient(b"[" + b'"]]]",NaN,' * 10 + opening * 1_000_000)
    finally:
        sys.setrecursionlimit(limit)


def test_many_brackets_are_no_depth() -> None:
    """Documents with many brackets side by side, or inside of strings, are read."""
    wide = b"[NaN" + b',[{"a":[]}]' * 5_000 + b"]"
    assert len(load_lenient(wide)) == 5_001
    text = b'["' + b'[\\"{' * 5_000 + b'",NaN]'
    assert load_lenient(text)[0] == '["{'.replace("\\", "") * 5_000
    deep = b"[" * MAX_DEPTH + b"NaN" + b"]" * MAX_DEPTH
    load_lenient(deep)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_lenient(b"[" + deep + b"]")


def test_what_is_no_json() -> None:
    """The error names the document. Depth is bounded both ways."""
    with pytest.raises(BadMessage, match=r"^answer: not JSON: "):
        parse_lenient(b'{"a":}', "answer")
    with pytest.raises(BadMessage, match="answer: not JSON: nested too deeply"):
        parse_lenient(b"[" * 100_000 + b"]" * 100_000, "answer")
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(BadMessage, match="JSON: "):
        dump_lenient(endless)


@pytest.mark.parametrize("digits", [1, 16, 17, 18, 19, 20, 21, 40])
@pytest.mark.parametrize("text", ["{}", "[1, -{}, 2]", '{{"a": {}}}', '{{"a": "{}"}}', "[{}, 7777777]"])
def test_integers_of_any_length_are_exact(digits: int, text: str) -> None:
    """Wherever they stand, and whatever digits they have."""
    for digit in "1239":
        document = text.format(digit * digits)
        assert load_lenient(document.encode()) == json.loads(document)
