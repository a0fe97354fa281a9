"""JSON as engines and clients write it, beyond what RFC 8259 allows. Pure.

Python's parser accepts lone UTF-16 surrogates, NaN and Infinity, control characters in strings and integers of any size. It runs
only for documents that the fast parser refuses or would change.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from tallystick.protocol.errors import BadMessage

_DIGITS = bytes(ord("0") if chr(byte).isascii() and chr(byte).isdigit() else ord(" ") for byte in range(256))
_LONG_INTEGER = b"0" * 19
"""Nineteen digits may exceed 64 bits, which the fast parser would turn into a floating-point number."""
MAX_DEPTH = 512
"""Nested arrays and objects. Python's parser recurses: without a limit of its own, a program that raised Python's recursion limit
would overflow its stack.
"""
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)


def load_lenient(data: bytes) -> Any:
    """Parses JSON; invalid UTF-8 becomes U+FFFD. Raises ValueError if the document is no JSON even by these rules."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if _LONG_INTEGER not in data.translate(_DIGITS):  # a twentieth of a regular expression's time
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            pass
    if _is_too_deep(data):
        raise ValueError("nested too deeply")
    try:
        return json.loads(data.decode(errors="replace"), strict=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _is_too_deep(data: bytes) -> bool:
    """Whether brackets outside of strings are nested deeper than MAX_DEPTH."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        mark = data[match.start()]
        depth += (mark in b"[{") - (mark in b"]}")
        if depth > MAX_DEPTH:
            return True
    return False


def parse_lenient(data: bytes, name: str) -> Any:
    """`load_lenient` for a document that is called `name` in errors. Raises BadMessage."""
    try:
        return load_lenient(data)
    except ValueError as error:
        raise BadMessage(f"{name}: not JSON: {error}") from None


def is_encodable(text: str) -> bool:
    """Whether a text is Unicode: without lone surrogates, which JSON's escapes allow."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def dump_lenient(value: Any) -> bytes:
    """Compact JSON of what `load_lenient` returned. Lone surrogates become escapes again.

    Raises BadMessage for a value that cannot be written, such as one that is nested too deeply.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        pass
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadMessage(f"JSON: {error}") from None
