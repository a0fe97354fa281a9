"""Reads the bodies of engines' answers as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

from node.engines.http_connection import EngineResponse

_MAX_BLANK_BYTES = 64 << 10
"""White space that an engine may send before its answer, to keep the connection open."""


async def read_start(response: EngineResponse) -> bytes:
    """The bytes of a body up to its first that is no white space; all of them if it has no other."""
    start = bytearray()
    while data := await response.readany():
        start += data
        if start.strip() or len(start) > _MAX_BLANK_BYTES:
            break
    return bytes(start)


async def read_on(response: EngineResponse, start: bytes) -> AsyncIterator[bytes]:
    """A body that begins with `start`, as it comes."""
    if start:
        yield start
    while data := await response.readany():
        yield data
