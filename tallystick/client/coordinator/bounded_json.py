"""Reading a coordinator's JSON in bounds: what is too long in a list is left out while it arrives, and the rest stays readable.

What a coordinator lists comes from strangers. One of them must not be able to take the others' offers away, so an oversized
item becomes null, and a list that does not end is cut. Pure.
"""

from __future__ import annotations

import re

from tallystick.protocol.errors import BadMessage, Fault

MAX_ITEM = 32 * 1024
"""Bytes of an item of a list: an ask of 16 KiB with what is said beside it."""
MAX_ITEMS = 4_096
MAX_CONTROL = 8 * 1024 * 1024
"""Bytes of an answer without what was left out; more is refused unread."""
MAX_RAW = 32 * 1024 * 1024
"""Bytes of an answer that are read at all, what is left out included."""
MAX_TOKENS = 4_000_000
"""Strings and brackets of an answer that are looked at: about two seconds of work."""

_DEEP = re.compile(rb'["{}\[\]]')
_SHALLOW = re.compile(rb'["{}\[\],]')
_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


class BoundedJsonReader:
    """Takes the text of a JSON object piece by piece. Items of the lists that are its members come out as null where they are
    longer than `item` bytes.
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
        """Whether no more is to be read: the answer, or its work, is beyond all bounds."""
        return self.seen >= MAX_RAW or self._items >= MAX_ITEMS or self._tokens > MAX_TOKENS

    def feed(self, data: bytes) -> None:
        """Takes the next bytes; ignores them once it is full. Raises BadMessage where what is kept grows too long."""
        self.seen += len(data)
        begin = at = 0
        while not self.full and len(self._out) <= MAX_CONTROL:
            if self._in_string:
                at = self._skip_string(data, at)
            found = (_SHALLOW if self._listing and self._depth == 2 else _DEEP).search(data, at)
            if found is None or self._in_string:
                break
            at = found.end()
            begin = self._structure(data, begin, found.start())
        self._keep(data[begin:])
        if len(self._out) > MAX_CONTROL or (self.full and not self._listing):
            raise BadMessage(f"coordinator: an answer longer than {MAX_CONTROL} bytes", fault=Fault.COORDINATOR)

    def close(self) -> bytes:
        """The text that was kept. A list that was cut ends with a null."""
        if not self.full:
            return bytes(self._out + self._item)
        self.dropped += 1
        return bytes(self._out + b"null]}")

    def _skip_string(self, data: bytes, at: int) -> int:
        """Where the string that `data` is inside of at `at` ends."""
        if self._escaped and at < len(data):
            self._escaped, at = False, at + 1
        found = _STRING.match(data, at)
        at = found.end() if found is not None else at
        if at < len(data):
            self._escaped = data[at : at + 1] == b"\\"
            self._in_string = self._escaped
            return at + 1
        return at

    def _structure(self, data: bytes, begin: int, at: int) -> int:
        """Takes the bracket, comma or quote at `at`; from where on `data` was not kept yet."""
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
