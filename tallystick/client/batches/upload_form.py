"""Reads an uploaded file out of a multipart form (RFC 7578) as its bytes come. Pure.

Fields other than the file are short and bounded; the file's content goes to a sink and is never held.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from tallystick.protocol.errors import BadMessage

MAX_FIELDS: Final = 32
MAX_FIELD_BYTES: Final = 4_096
MAX_FILENAME: Final = 255
_PLAIN_ENCODINGS: Final = (b"", b"7bit", b"8bit", b"binary")
FILE: Final = "file"
_EXTENDED = re.compile(rb";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^;\s]+)", re.IGNORECASE)


@dataclass(slots=True)
class _Part:
    name: str = ""
    filename: str | None = None
    content: bytearray = field(default_factory=bytearray)


class UploadForm:
    """One form, fed piece by piece. `sink` gets the content of the part `file`. Raises BadMessage for a malformed form."""

    def __init__(self, content_type: str, sink: Callable[[bytes], None]) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
            raise BadMessage(f"content-type: expected multipart/form-data with a boundary, got {content_type[:100]!r}")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """The name of the file; None before its part came."""
        self._sink, self._part, self._parts = sink, _Part(), 0
        self._header, self._value = bytearray(), bytearray()
        self._ended = False
        callbacks: Any = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        self._parser = MultipartParser(boundary, callbacks)

    def feed(self, data: bytes) -> None:
        """Reads more of the form."""
        if not data:
            return
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise BadMessage(f"request body: expected a multipart form: {str(error)[:200]}") from None

    def finish(self) -> None:
        """Checks that the form is whole and has a file."""
        if not self._ended:
            raise BadMessage("request body: the multipart form is cut off")
        if self.filename is None:
            raise BadMessage(f"{FILE}: expected a file in the form")

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_FIELDS:
            raise BadMessage(f"request body: expected at most {MAX_FIELDS} parts of a form")
        self._part = _Part()

    def _end_header(self) -> None:
        name, value = bytes(self._header).strip().lower(), bytes(self._value)
        self._header.clear()
        self._value.clear()
        if name == b"content-disposition":
            _, options = parse_options_header(value)
            self._part.name = options.get(b"name", b"").decode(errors="replace")
            self._part.filename = _filename(value, options)
        elif name == b"content-transfer-encoding" and value.strip().lower() not in _PLAIN_ENCODINGS:
            text = (
                f"request body: content-transfer-encoding: expected none or binary, got {value[:40].decode(errors='replace')!r}"
            )
            raise BadMessage(text)

    def _end_headers(self) -> None:
        if self._part.name == FILE:
            if self.filename is not None:
                raise BadMessage(f"{FILE}: expected one file, got several")
            self.filename = self._part.filename or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.name == FILE:
            self._sink(data[start:end])
            return
        self._part.content += data[start:end]
        if len(self._part.content) > MAX_FIELD_BYTES:
            raise BadMessage(f"{self._part.name[:60]}: expected at most {MAX_FIELD_BYTES} bytes")

    def _end_part(self) -> None:
        if self._part.name == FILE:
            return
        if self._part.name in self.fields:
            raise BadMessage(f"{self._part.name[:60]}: expected one field, got several")
        try:
            self.fields[self._part.name] = self._part.content.decode()
        except UnicodeDecodeError:
            raise BadMessage(f"{self._part.name[:60]}: expected UTF-8") from None

    def _end(self) -> None:
        self._ended = True


def _filename(header: bytes, options: dict[bytes, bytes]) -> str | None:
    """The name of a file without its folders; None if the header has none. `filename*` (RFC 8187) goes before `filename`."""
    raw, extended = options.get(b"filename"), _EXTENDED.search(header)
    if extended is not None:
        raw = unquote_to_bytes(extended[2]).decode(extended[1].decode().lower(), "replace").encode()
    if raw is None:
        return None
    name = raw.decode(errors="replace").replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:MAX_FILENAME] or "upload"
