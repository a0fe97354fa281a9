"""JSON beyond RFC 8259: what is read, what is written again, and what stays an error."""

from __future__ import annotations

import math

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient, load_lenient, parse_lenient


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
