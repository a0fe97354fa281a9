"""Fields of a multipart form (RFC 7578): reads a field, or replaces its text or adds one and leaves all other bytes as
they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from tallystick.protocol.errors import BadMessage

_MAX_PARTS = 1_000


@dataclass(slots=True)
class _Part:
    name: bytes = b""
    begin: int = -1
    end: int = -1
    filename: bool = False


@dataclass(slots=True)
class _Reader:
    """Records the position of each part's content."""

    body: bytes
    parts: list[_Part] = field(default_factory=list)
    header: bytes = b""
    whole: bool = False

    def begin(self) -> None:
        if len(self.parts) >= _MAX_PARTS:
            raise BadMessage(f"request body: expected at most {_MAX_PARTS} parts of a form")
        self.parts.append(_Part())

    def name(self, data: bytes, start: int, end: int) -> None:
        self.header = data[start:end].lower()

    def value(self, data: bytes, start: int, end: int) -> None:
        if self.header == b"content-disposition":
            _, options = parse_options_header(data[start:end])
            self.parts[-1].name, self.parts[-1].filename = options.get(b"name", b""), b"filename" in options

    def finish(self) -> None:
        self.whole = True

    def data(self, _data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        part.begin = start if part.begin < 0 else part.begin
        part.end = end


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise BadMessage("request.contentType: expected multipart/form-data with a boundary")
    return boundary


def _parse(content_type: str, body: bytes) -> list[_Part]:
    reader = _Reader(body)
    callbacks: Any = {
        "on_part_begin": reader.begin,
        "on_header_field": reader.name,
        "on_header_value": reader.value,
        "on_part_data": reader.data,
        "on_end": reader.finish,
    }
    parser = MultipartParser(_boundary(content_type), callbacks)
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise BadMessage("request body: expected a multipart form") from None
    if not reader.whole:
        raise BadMessage("request body: the multipart form is cut off")
    return reader.parts


def _single_field(parts: list[_Part], name: str) -> _Part | None:
    matching = [part for part in parts if part.name == name.encode() and not part.filename]
    if len(matching) > 1:
        raise BadMessage(f"request body: {name}: expected one field, got {len(matching)}")
    return matching[0] if matching else None


def read_field(content_type: str, body: bytes, name: str) -> str | None:
    """The text of a field; None if the form has no such field. Raises BadMessage for a malformed form."""
    part = _single_field(_parse(content_type, body), name)
    if part is None:
        return None
    try:
        return body[part.begin : part.end].decode() if part.begin >= 0 else ""
    except UnicodeDecodeError:
        raise BadMessage(f"request body: {name}: expected UTF-8") from None


def replace_field(content_type: str, body: bytes, name: str, value: str) -> bytes:
    """The form with another text in an existing field. Raises BadMessage if the field is missing or empty."""
    part = _single_field(_parse(content_type, body), name)
    if part is None or part.begin < 0:
        raise BadMessage(f"request body: {name}: expected a text, the field is missing or empty")
    return b"".join((body[: part.begin], value.encode(), body[part.end :]))


def add_field(content_type: str, body: bytes, name: str, value: str) -> bytes:
    """The form with another field before the others. Raises BadMessage for a content type that is no form's."""
    head = b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n' % (_boundary(content_type), name.encode())
    return b"".join((head, value.encode(), b"\r\n", body))
