"""What a dialect is: an API whose requests can be translated to chat completions, and their answers back. Pure.

The gateway sends a request as it is to providers that sell its route. It is translated only if there are none. Orders, receipts
and commitments are of the bytes that went to the provider: those of the chat completion if the request was translated.
"""

from __future__ import annotations

from typing import Protocol

from tallystick.client.openai.errors import ErrorResponse, render_error, render_error_event
from tallystick.protocol.errors import TallyError
from tallystick.protocol.pricing import Usage
from tallystick.protocol.routes import CHAT


class ErrorFormat(Protocol):
    """Renders errors as the clients of an API read them. `retry` overrides the error's own word on whether a retry can help."""

    @property
    def id_header(self) -> str:
        """The response header that names a request."""
        ...

    def render_error(self, error: TallyError, *, request_id: str, retry: bool | None = None) -> ErrorResponse:
        """An error instead of an answer. `request_id`: names the request to the caller and in the log."""
        ...

    def render_error_event(self, error: TallyError, *, request_id: str, retry: bool | None = None) -> bytes:
        """An error as the last event of a stream that has begun."""
        ...

    def engine_error(self, status: int, body: bytes, *, request_id: str) -> bytes:
        """The body of an engine's error answer in this API's form; as it is if it has that form already."""
        ...


class StreamTranslator(Protocol):
    """Translates the event stream of one chat completion. It never raises: a malformed stream ends with an error event.

    `failed`: whether the translated stream ended with an error.
    """

    failed: bool

    def feed(self, data: bytes) -> bytes:
        """The events that these bytes complete. `data` may be split anywhere, also within a character."""
        ...

    def finish(self, billed: Usage | None) -> bytes:
        """The events that are left at the clean end of the stream. `billed`: counts for an engine that reported no usage."""
        ...


class Translation(Protocol):
    """One translated request, and what translating its answer takes. `job`: the job's id in hex, from which ids are made."""

    @property
    def body(self) -> bytes:
        """The request to the route of chat completions. The same request always gives the same bytes."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the request asks for a stream."""
        ...

    @property
    def accepts_less(self) -> bool:
        """Whether less output may be ordered than the request's limit, if no provider sells as much."""
        ...

    def answer(self, body: bytes, *, job: str, billed: Usage | None) -> bytes:
        """Translates a whole chat completion. Raises BadMessage, the engine's fault, for anything else."""
        ...

    def open_stream(self, *, job: str) -> StreamTranslator:
        """Begins to translate an event stream."""
        ...


class Dialect(ErrorFormat, Protocol):
    """An API whose requests can be translated to chat completions."""

    def translate(self, body: bytes) -> Translation:
        """Translates a request. Raises BadMessage, which names the member that cannot be translated."""
        ...


class OpenAiErrors:
    """The errors of OpenAI's API. `path`: the route, because streams of responses have another error event than chats."""

    id_header = "x-request-id"

    def __init__(self, path: str = CHAT) -> None:
        self._path = path

    def render_error(self, error: TallyError, *, request_id: str, retry: bool | None = None) -> ErrorResponse:  # noqa: ARG002 - in headers
        """See ErrorFormat."""
        return render_error(error, retry=retry)

    def render_error_event(self, error: TallyError, *, request_id: str, retry: bool | None = None) -> bytes:  # noqa: ARG002
        """See ErrorFormat."""
        return render_error_event(error, path=self._path, retry=retry)

    def engine_error(self, status: int, body: bytes, *, request_id: str) -> bytes:  # noqa: ARG002 - engines speak this API
        """See ErrorFormat."""
        return body
