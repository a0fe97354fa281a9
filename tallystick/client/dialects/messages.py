"""Anthropic's Messages as a dialect: requests to chat completions, and their answers back. Pure.

Sources: Anthropic's API reference (Messages, Streaming, Errors) and OpenAI's (Chat completions).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.client.dialects import messages_errors
from tallystick.client.dialects.dialect import StreamTranslator
from tallystick.client.dialects.messages_request import ChatRequest, to_chat
from tallystick.client.dialects.messages_response import to_message
from tallystick.client.dialects.messages_stream import MessageStream
from tallystick.client.openai.errors import ErrorResponse
from tallystick.protocol.errors import TallyError
from tallystick.protocol.pricing import Usage


class MessagesDialect:
    """See `Dialect`."""

    id_header = "request-id"

    def translate(self, body: bytes) -> MessagesTranslation:
        """See Dialect."""
        return MessagesTranslation(to_chat(body))

    def render_error(self, error: TallyError, *, request_id: str, retry: bool | None = None) -> ErrorResponse:
        """See ErrorFormat."""
        return messages_errors.render(error, request_id=request_id, retry=retry)

    def render_error_event(self, error: TallyError, *, request_id: str, retry: bool | None = None) -> bytes:
        """See ErrorFormat."""
        return messages_errors.render_event(error, request_id=request_id, retry=retry)

    def engine_error(self, status: int, body: bytes, *, request_id: str) -> bytes:
        """See ErrorFormat."""
        return messages_errors.translate_engine_error(status, body, request_id=request_id)


@dataclass(frozen=True, slots=True)
class MessagesTranslation:
    """See `Translation`."""

    request: ChatRequest = field(repr=False)
    accepts_less = True

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
        return to_message(self.request, body, job=job, billed=billed)

    def open_stream(self, *, job: str) -> StreamTranslator:
        """See Translation."""
        return MessageStream(self.request, job=job)
