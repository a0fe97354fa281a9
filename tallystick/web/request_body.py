"""The body of a request to a page, which anybody may send."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from tallystick.protocol.errors import BadMessage

BODY_SECONDS = 10.0
"""How long a body may take to arrive."""


async def read_body(request: Request, subject: str, limit: int) -> bytes:
    """Returns the body. Raises BadMessage for one of more than `limit` bytes, or that does not arrive within BODY_SECONDS."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                data += piece
                if len(data) > limit:
                    raise BadMessage(f"{subject}: expected a body of at most {limit} bytes")
    except (TimeoutError, ClientDisconnect):
        raise BadMessage(f"{subject}: expected the whole body within {BODY_SECONDS:g} s") from None
    return bytes(data)
