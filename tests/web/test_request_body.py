"""Bodies of requests to pages: whole, too long, too slow, and cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from starlette.requests import Request
from starlette.types import Message

from tallystick.protocol.errors import BadMessage
from tallystick.web import request_body
from tallystick.web.request_body import read_body

GONE: Message = {"type": "http.disconnect"}


def _request(pieces: Sequence[bytes], *, last: Message | None = None) -> Request:
    """A request whose body comes in pieces. `last`: what comes after them; without it, nothing ever does."""
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages += [] if last is None else [last]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


@pytest.mark.parametrize("pieces", [[], [b"a"], [b"ab", b"cd"], [b"", b"abcd"]])
async def test_a_body_up_to_the_limit_is_read_whole(pieces: list[bytes]) -> None:
    """In whatever pieces it comes."""
    end: Message = {"type": "http.request", "body": b"", "more_body": False}
    assert await read_body(_request(pieces, last=end), "form", 4) == b"".join(pieces)


@pytest.mark.parametrize("pieces", [[b"abcde"], [b"abcd", b"e"]])
async def test_a_longer_body_is_not_waited_for(pieces: list[bytes]) -> None:
    """The error names the form and its limit."""
    with pytest.raises(BadMessage, match="form: expected a body of at most 4 bytes"):
        await read_body(_request(pieces), "form", 4)


async def test_a_body_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a deadline."""
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.01)
    with pytest.raises(BadMessage, match=r"within 0\.01 s"):
        await read_body(_request([b"a"]), "form", 4)


async def test_a_client_that_goes_away() -> None:
    """Its part of a body is not taken for the whole."""
    with pytest.raises(BadMessage, match="the whole body"):
        await read_body(_request([b"a"], last=GONE), "form", 4)
