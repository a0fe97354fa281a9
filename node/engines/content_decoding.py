"""The body of an engine that compresses its answer although the request asked for none of that (RFC 9110, 8.4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

from node.engines.http_connection import EngineResponse, MalformedResponse
from tallystick.protocol.errors import TallyError
from tallystick.runtime.content_encoding import decode, read_codings


class DecodedResponse:
    """A response without its content coding (EngineResponse). Its body is here only once all of it was received.

    `limit`: the most bytes of the body, before and after decoding.
    """

    def __init__(self, response: EngineResponse, coding: str, limit: int) -> None:
        self._response, self._coding, self._limit = response, coding, limit
        self._pieces: Iterator[bytes] | None = None

    @property
    def status(self) -> int:
        """See EngineResponse."""
        return self._response.status

    @property
    def content_type(self) -> str:
        """See EngineResponse."""
        return self._response.content_type

    def header(self, name: str) -> str:
        """See EngineResponse."""
        return self._response.header(name)

    async def readany(self) -> bytes:
        """See EngineResponse. Raises MalformedResponse if the body does not decode."""
        try:
            if self._pieces is None:
                self._pieces = decode(await self._read_all(), read_codings([self._coding]), self._limit)
            return next(filter(None, self._pieces), b"")
        except TallyError:
            raise MalformedResponse("a body that its Content-Encoding does not describe, or that is too large") from None

    async def _read_all(self) -> bytes:
        body = bytearray()
        while data := await self._response.readany():
            body += data
            if len(body) > self._limit:
                raise MalformedResponse(f"a body of more than {self._limit} bytes")
        return bytes(body)

    def finish_soon(self, seconds: float) -> None:
        """See EngineResponse."""
        self._response.finish_soon(seconds)

    def release(self) -> None:
        """See EngineResponse."""
        self._response.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
