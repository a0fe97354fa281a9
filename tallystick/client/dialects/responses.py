"""OpenAI's Responses as a dialect: requests to chat completions, and their answers back. Pure.

Source: OpenAI's API reference (Responses, Chat completions).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.client.dialects.dialect import OpenAiErrors, StreamTranslator
from tallystick.client.dialects.responses_request import ChatRequest, to_chat
from tallystick.client.dialects.responses_response import to_response
from tallystick.client.dialects.responses_stream import ResponseStream
from tallystick.protocol.pricing import Usage
from tallystick.protocol.routes import RESPONSES


class ResponsesDialect(OpenAiErrors):
    """See `Dialect`."""

    def __init__(self) -> None:
        super().__init__(RESPONSES)

    def translate(self, body: bytes) -> ResponsesTranslation:
        """See Dialect."""
        return ResponsesTranslation(to_chat(body))


@dataclass(frozen=True, slots=True)
class ResponsesTranslation:
    """See `Translation`."""

    request: ChatRequest = field(repr=False)

    accepts_less = False

    @property
    def body(self) -> bytes:
        """See Translation."""
        return self.request.body

    @property
    def stream(self) -> bool:
        """See Translation."""
        return self.request.stream

    def answer(self, body: bytes, *, job: str, billed: Usage | None) -> bytes:
        """See Translation."""
        return to_response(self.request, body, job=job, billed=billed)

    def open_stream(self, *, job: str) -> StreamTranslator:
        """See Translation."""
        return ResponseStream(self.request, job=job)
