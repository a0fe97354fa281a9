"""Reads a coordinator's JSON within bounds: oversized list items are left out on arrival, and the rest stays readable.

The items of a coordinator's lists come from strangers. None of them may suppress the offers of others, so an oversized item
becomes null and an endless list is cut. Pure.
"""

from __future__ import annotations

import re

from tallystick.protocol.errors import BadMessage, Fault

MAX_ITEM = 32 * 1024
"""Bytes of a list item: an ask of 16 KiB with its surroundings."""
MAX_ITEMS = 4_096
MAX_CONTROL = 8 * 1024 * 1024
"""Bytes of a response without the omitted items; a longer response is refused."""
MAX_RAW = 32 * 1024 * 1024
"""Bytes of a response that are read at all, omitted items included."""
MAX_TOKENS = 4_000_000
"""Strings and brackets of a response that are examined: about two seconds of work."""

_DEEP = re.compile(rb'["{}\[\]]')
_SHALLOW = re.compile(rb'["{}\[\],]')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class BoundedJsonReader:
    """Reads the text of a JSON object in pieces.

    Items of the object's member lists that are longer than `item` bytes become null. `seen`: bytes read. `dropped`: items
    omitted.
    """

    def __init__(self, item: int = MAX_ITEM) -> None:
        self.seen = 0
        self.dropped = 0
        self._limit = item
        self._out, self._item = bytearray(), bytearray()
        self._depth = self._items = self._tokens = 0
        self._listing = self._long = self._in_string = self._escaped = False

    @property
    def full(self) -> bool:
        """Whether reading must stop, because the response or the work on it exceeds a bound."""
        return self.seen >= MAX_RAW or self._items >= MAX_ITEMS or self._tokens > MAX_TOKENS

    def feed(self, data: bytes) -> None:
        """Reads the next bytes, unless it is full. Raises BadMessage if the kept text exceeds MAX_CONTROL."""
        self.seen += len(data)
        begin = at = 0
        while not self.full and len(self._out) <= MAX_CONTROL:
            if self._in_string:
                at = self._skip_string(data, at)
            match = (_SHALLOW if self._listing and self._depth == 2 else _DEEP).search(data, at)
            if match is None or self._in_string:
                break
            at = match.end()
            begin = self._structure(data, begin, match.start())
        self._keep(data[begin:])
        if len(self._out) > MAX_CONTROL or (self.full and not self._listing):
            raise BadMessage(
                f"coordinator: expected a response of at most {MAX_CONTROL} bytes, got more", fault=Fault.COORDINATOR
            )

    def close(self) -> bytes:
        """Returns the kept text. A list that was cut ends with null."""
        if not self.full:
            return bytes(self._out + self._item)
        self.dropped += 1
        return bytes(self._out + b"null]}")

    def _skip_string(self, data: bytes, at: int) -> int:
        """Returns where the string that contains position `at` of `data` ends."""
        if self._escaped and at < len(data):
            self._escaped, at = False, at + 1
        rest = _STRING.match(data, at)
        at = rest.end() if rest is not None else at
        if at < len(data):
            self._escaped = data[at : at + 1] == b"\\"
            self._in_string = self._escaped
            return at + 1
        return at

    def _structure(self, data: bytes, begin: int, at: int) -> int:
        """Handles the bracket, comma or quote at `at`. Returns the start of the part of `data` that was not kept yet."""
        self._tokens += 1
        mark = data[at : at + 1]
        if mark == b'"':
            self._in_string = True
        elif mark in b"{[":
            self._depth += 1
            if mark == b"[" and self._depth == 2:
                self._out += data[begin : at + 1]
                self._listing = True
                return at + 1
        elif self._listing and self._depth == 2:
            self._keep(data[begin:at])
            self._end_item()
            if mark == b",":
                self._items += 1
            else:
                self._depth, self._listing = 1, False
            self._out += mark
            return at + 1
        else:
            self._depth -= 1
        return begin

    def _keep(self, data: bytes) -> None:
        if not self._listing:
            self._out += data
        elif len(self._item) + len(data) > self._limit:
            self._item.clear()
            self._long = True
        elif not self._long:
            self._item += data

    def _end_item(self) -> None:
        self.dropped += self._long
        self._out += b"null" if self._long else self._item
        self._item.clear()
        self._long = False
