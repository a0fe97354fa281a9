"""Reads a caller's request to an OpenAI route: its model, the most output it may ask for, and whether it streams.

Pure. A body is read and never rewritten: the engine gets the bytes that the caller sent.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tallystick.client.openai.needs import NO_NEEDS, RequestNeeds, derive_needs, round_up
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient, is_encodable, load_lenient, parse_lenient
from tallystick.protocol.openai_wire import OUTPUT_LIMITS, bounds_input, count_choices, find_output_limit
from tallystick.protocol.plaintext_heads import RequestHead, join_request
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, FORM, JSON, MESSAGES, SCORES, check_route, media_type
from tallystick.runtime.multipart import add_field, read_field

MAX_MODEL_NAME = 256
"""The most characters of a model's name."""


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """What a request asks for.

    `output_tokens`: the most output tokens of all choices together; None if the request sets no limit. `choices`: how many
    choices it asks for. `bounded`: whether its bytes bound its input tokens; false for images, audio and files. `needs`: what it
    needs of a provider. `accepts_less`: whether less output may be ordered than the limit: clients of Messages must set one, and
    set it as high as any model can answer.
    """

    model: str
    stream: bool
    output_tokens: int | None
    choices: int
    bounded: bool
    needs: RequestNeeds = NO_NEEDS
    accepts_less: bool = False

    @property
    def likely_context(self) -> int:
        """The tokens of context that each choice is likely to fill, rounded up; 0 if unknown."""
        likely = self.needs.likely_tokens
        return round_up(likely + (self.output_tokens or 0) // self.choices) if likely else 0

    def tokens_to_order(self, default: int, sold: int) -> int:
        """The output tokens to order from an ask that sells at most `sold` a request.

        `default` applies to each choice of a request that sets no limit.
        """
        wanted = default * self.choices if self.output_tokens is None else self.output_tokens
        return min(wanted, sold)

    def least_output(self, sold: int) -> int:
        """The output tokens that an ask must sell a request, if none sells more than `sold`."""
        needed = self.output_tokens or 0
        return min(needed, sold) if self.accepts_less else needed


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A request as its caller sent it, its summary, and the `label` of the workload that it belongs to."""

    head: RequestHead
    body: bytes = field(repr=False)
    summary: RequestSummary
    label: str = ""
    json: Mapping[str, Any] | None = field(default=None, repr=False)
    """The body if it is JSON, None if it is a form."""
    _plaintext: bytes | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, path: str, body: bytes, content_type: str = JSON, label: str = "", *, accepts_less: bool = False) -> ApiRequest:
        """Reads a request. Raises BadMessage or Refusal; see `summarise`."""
        summary, document = _read(path, body, content_type)
        if accepts_less and not summary.accepts_less:
            summary = replace(summary, accepts_less=True)
        return cls(RequestHead(path, content_type), body, summary, label, document)

    def with_log_head(self, packed: bytes) -> ApiRequest:
        """The request with a head of the match log for its provider, which the coordinator can neither read nor leave out."""
        if not packed:
            return self
        return self._with_head(RequestHead(self.head.path, self.head.content_type, packed, self.head.evidence))

    def with_evidence(self) -> ApiRequest:
        """The request, which asks for the rows of evidence with its answer, if its route has answers with rows."""
        if self.head.path not in (CHAT, COMPLETIONS):
            return self
        return self._with_head(RequestHead(self.head.path, self.head.content_type, self.head.log_head, evidence=True))

    def _with_head(self, head: RequestHead) -> ApiRequest:
        return ApiRequest(head, self.body, self.summary, self.label, self.json)

    @property
    def plaintext(self) -> bytes:
        """The bytes that are sealed for the provider."""
        joined = self._plaintext
        if joined is None:
            joined = join_request(self.head, self.body)
            object.__setattr__(self, "_plaintext", joined)
        return joined


def strip_bom(body: bytes) -> bytes:
    """A JSON body without the byte order mark that some clients put before it (RFC 8259, 8.1), because engines may refuse it.

    Raises BadMessage for UTF-16 and UTF-32.
    """
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in body[:4]:
        raise BadMessage("request body: not JSON in UTF-8, as it must be (RFC 8259, 8.1): it looks like UTF-16 or UTF-32")
    return body.removeprefix(codecs.BOM_UTF8)


def with_model(body: bytes, content_type: str, model: str | None) -> bytes:
    """The body of a request, with the model that the request's path names unless the body names one.

    Raises BadMessage for a malformed form.
    """
    if model is None:
        return body
    if media_type(content_type) == FORM:
        return body if read_field(content_type, body, "model") is not None else add_field(content_type, body, "model", model)
    try:
        document = load_lenient(body)
    except ValueError:
        return body  # whoever reads it says what is wrong
    if not isinstance(document, dict) or document.get("model"):
        return body
    return dump_lenient({**document, "model": model})


def summarise(path: str, body: bytes, content_type: str = JSON) -> RequestSummary:
    """Reads a request to a route of the market. Raises BadMessage that names the member, or Refusal (unknown_route)."""
    return _read(path, body, content_type)[0]


def body_bytes(body: object) -> bytes:
    """The body of a request that a program passes: bytes as they are, a mapping as JSON. Raises BadMessage."""
    if isinstance(body, bytes):
        return body
    if not isinstance(body, Mapping):
        raise BadMessage(f"request body: expected bytes or a mapping, got {type(body).__name__}")
    return dump_lenient(dict(body))


def load_body(body: bytes) -> Any:
    """The JSON of a request, as engines read it: with lone surrogates, and integers of any size. Raises BadMessage."""
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise BadMessage(f"request body: expected UTF-8, got the byte 0x{body[error.start]:02x} at {error.start}") from None
    return parse_lenient(body, "request body")


def _read(path: str, body: bytes, content_type: str) -> tuple[RequestSummary, dict[str, Any] | None]:
    if path not in OUTPUT_LIMITS:
        check_route(path)
    kind = content_type if content_type == JSON else media_type(content_type)
    if kind == FORM:
        model = _check_model(read_field(content_type, body, "model"))
        stream = read_field(content_type, body, "stream") == "true"
        return RequestSummary(model, stream, None, 1, bounded=False), None
    if kind != JSON:
        raise BadMessage(f"content-type: expected {JSON} or {FORM}, got {content_type[:60]!r}")
    document = load_body(body)
    if not isinstance(document, dict):
        raise BadMessage("request body: expected a JSON object")
    return _summarise_json(path, document), document


def _summarise_json(path: str, document: dict[str, Any]) -> RequestSummary:
    model = _check_model(document.get("model"))
    if path == EMBEDDINGS:
        needs = derive_needs(path, document)
        return RequestSummary(model, stream=False, output_tokens=0, choices=1, bounded=True, needs=needs)
    if path == SCORES:
        return RequestSummary(model, stream=False, output_tokens=0, choices=1, bounded=bounds_input(path, document))
    choices = count_choices(path, document) if path in (CHAT, COMPLETIONS) else 1
    limit = find_output_limit(path, document)
    total = None if limit is None else limit * choices
    bounded = bounds_input(path, document)
    needs = derive_needs(path, document)
    stream = _read_flag(document, "stream")
    return RequestSummary(model, stream, total, choices, bounded, needs, accepts_less=path == MESSAGES)


def _check_model(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_MODEL_NAME:
        raise BadMessage(f"model: expected the name of a model, 1 to {MAX_MODEL_NAME} characters")
    if not is_encodable(name):
        raise BadMessage("model: expected Unicode, got a lone surrogate")
    return name


def _read_flag(document: dict[str, Any], name: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadMessage(f"{name}: expected true or false, got {value!r:.60}")
    return bool(value)
