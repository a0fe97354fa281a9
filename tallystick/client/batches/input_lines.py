"""Reads the input of a batch: one JSON object a line, each a request. Pure.

Lines end with LF or CRLF; a byte order mark before the first one is ignored, and so are lines of white space. Source: OpenAI's
Batch guide, "Prepare your batch file". Error codes are OpenAI's where it has one.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tallystick.client.batches.output_lines import longest_unanswered
from tallystick.client.batches.records import InputLine, LineError
from tallystick.client.openai.requests import MAX_MODEL_NAME
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient, is_encodable, parse_lenient
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES

ENDPOINTS: Final = (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES)
"""Routes that a batch may ask."""
MAX_LINES: Final = 50_000
"""Requests of one batch."""
MAX_ERRORS: Final = 100
"""Faults of the input that a batch reports; the rest of the file is not read."""
MAX_CUSTOM_ID: Final = 512
"""Characters of a custom_id."""
_WHITE: Final = b" \t\r\n\v\f"


def normal_endpoint(value: object) -> str | None:
    """The endpoint that a text names, with or without /v1; None if a batch cannot ask it."""
    if not isinstance(value, str):
        return None
    path = value if value.startswith("/v1/") else f"/v1{value}"
    return path if path in ENDPOINTS else None


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line of the file, without its end. `content` is None if it is longer than a line may be."""

    number: int
    offset: int
    content: bytes | None


class LineSplitter:
    """Cuts a file into lines as its pieces come. It never holds more than one line of `longest` bytes."""

    def __init__(self, longest: int) -> None:
        self._longest, self._held, self._skipping = longest, bytearray(), False
        self._number, self._offset = 1, 0

    def feed(self, data: bytes) -> Iterator[RawLine]:
        """The lines that end in `data`."""
        begin = 0
        while (end := data.find(b"\n", begin)) >= 0:
            yield self._line(data[begin:end], 1)
            begin = end + 1
        self._keep(data[begin:])

    def finish(self) -> Iterator[RawLine]:
        """The last line, if it has no end."""
        if self._held or self._skipping:
            yield self._line(b"", 0)

    def _keep(self, data: bytes) -> None:
        if self._skipping or len(self._held) + len(data) > self._longest:
            self._offset += len(self._held) + len(data)
            self._held.clear()
            self._skipping = True
        else:
            self._held += data

    def _line(self, rest: bytes, end: int) -> RawLine:
        offset, skipped = self._offset, self._skipping
        self._keep(rest)
        line = RawLine(self._number, offset, None if skipped or self._skipping else bytes(self._held))
        self._offset += len(self._held) + end
        self._held.clear()
        self._number, self._skipping = self._number + 1, False
        return line


@dataclass(slots=True)
class InputCheck:
    """Checks the lines of one batch. `errors`: what is wrong; `models`: up to two of the models that it names; `output_bytes`: of
    its error file if no line is answered.
    """

    endpoint: str
    batch: str = ""
    errors: list[LineError] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    count: int = 0
    output_bytes: int = 0
    _seen: dict[bytes, int] = field(default_factory=dict)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is gained by reading on."""
        return len(self.errors) >= MAX_ERRORS or self.count > MAX_LINES

    def check(self, raw: RawLine) -> InputLine | None:
        """Returns the request of a line; None for an empty or a wrong one, whose fault is added to `errors`."""
        content = raw.content
        if content is not None:
            if raw.number == 1:
                content = content.removeprefix(codecs.BOM_UTF8)
            if not content.strip(_WHITE):
                return None
        self.count += 1
        if self.count > MAX_LINES:
            self.errors.append(
                LineError("too_many_requests", f"The input has more than {MAX_LINES} requests, the most of one batch.", None)
            )
            return None
        error = self._fault(raw.number, content)
        if error is not None:
            self.errors.append(error)
            return None
        return InputLine(raw.number, raw.offset, len(raw.content or b""))

    def finish(self) -> None:
        """Adds the fault of a file without requests."""
        if not self.count:
            text = "The batch input file is empty. Please ensure that the batch contains at least one request."
            self.errors.append(LineError("empty_file", text))

    def _fault(self, number: int, content: bytes | None) -> LineError | None:
        if content is None:
            return LineError("line_too_long", "This line is longer than a request may be (max_body_bytes).", number)
        try:
            document = read_json(content)
        except BadMessage as error:
            return LineError("invalid_json_line", f"This line is not parseable as valid JSON: {error}", number)
        if not isinstance(document, dict):
            return LineError("invalid_json_line", "This line is JSON, but not an object.", number)
        return self._fault_of_members(number, document)

    def _fault_of_members(self, number: int, document: dict[str, Any]) -> LineError | None:
        for name in ("custom_id", "method", "url", "body"):
            if document.get(name) is None:
                return LineError("missing_required_parameter", f"Missing required parameter: '{name}'.", number, name)
        custom_id, body = document["custom_id"], document["body"]
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
            text = f"custom_id: expected a text of 1 to {MAX_CUSTOM_ID} characters."
            return LineError("invalid_custom_id", text, number, "custom_id")
        if str(document["method"]).upper() != "POST":
            return LineError("invalid_method", f"method: expected POST, got {str(document['method'])[:60]!r}.", number, "method")
        if normal_endpoint(document["url"]) != self.endpoint:
            text = f"The URL provided for this request ({str(document['url'])[:100]!r}) does not match the batch endpoint "
            return LineError("mismatched_endpoint", f"{text}({self.endpoint}).", number, "url")
        if not isinstance(body, dict):
            return LineError("invalid_body", "body: expected a JSON object.", number, "body")
        return self._fault_of_body(number, body) or self._fault_of_id(number, custom_id)

    def _fault_of_body(self, number: int, body: dict[str, Any]) -> LineError | None:
        model = body.get("model")
        if not isinstance(model, str) or not 0 < len(model) <= MAX_MODEL_NAME or not is_encodable(model):
            return LineError("missing_required_parameter", "body.model: expected the name of a model.", number, "body.model")
        for name in ("stream", "background"):
            if body.get(name):
                return LineError("invalid_body", f"body.{name}: a batch cannot use it; leave it out.", number, f"body.{name}")
        if len(self.models) < 2:
            self.models.add(model)
        return None

    def _fault_of_id(self, number: int, custom_id: str) -> LineError | None:
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = self._seen.setdefault(digest, number)
        if first == number:
            self.output_bytes += longest_unanswered(self.batch, number, custom_id)
            return None
        text = f"The custom_id {custom_id[:100]!r} is that of line {first} already; each request needs one of its own."
        return LineError("duplicate_custom_id", text, number, "custom_id")


def read_json(content: bytes) -> Any:
    """The JSON of a line, in UTF-8. Raises BadMessage."""
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise BadMessage(f"expected UTF-8, got the byte 0x{content[error.start]:02x} at {error.start}") from None
    return parse_lenient(content, "line")


@dataclass(frozen=True, slots=True)
class LineRequest:
    """The request of a line that was checked. `body` is the same for the same line, however often it is read."""

    custom_id: str
    model: str
    body: bytes = field(repr=False)

    @classmethod
    def of(cls, content: bytes, endpoint: str) -> LineRequest:
        """Reads a line. A response is not kept at the gateway unless the line asks for it. Raises BadMessage."""
        document = read_json(content)
        body = document["body"]
        if endpoint == RESPONSES:
            body.setdefault("store", False)
        return cls(document["custom_id"], body["model"], dump_lenient(body))
