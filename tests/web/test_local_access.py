"""Pages without a login are for a browser on this machine that no other site sent."""

from __future__ import annotations

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tallystick.web.local_access import local_only


async def _page(_request: Request) -> Response:
    return PlainTextResponse("secret")


async def _status(headers: dict[str, str]) -> int:
    app = Starlette(routes=[Route("/", local_only(_page))])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:9420") as http:
        answer = await http.get("/", headers=headers)
    assert ("secret" in answer.text) == (answer.status_code == 200)
    return answer.status_code


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost"},
        {"host": "node.localhost:1"},
        {"host": "[::1]:9420"},
        {"host": "LOCALHOST."},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1:9420"},
    ],
)
async def test_this_machine(headers: dict[str, str]) -> None:
    """Names and addresses of this machine, and the pages' own links."""
    assert await _status(headers) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "localhost.evil.example"},
        {"host": "192.168.0.7"},
        {"host": ""},
        {"host": "[::1"},
        {"host": "127.0.0.1.evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "https://127.0.0.1:9420"},
    ],
)
async def test_others(headers: dict[str, str]) -> None:
    """Rebound names, other machines, and what other sites' pages send."""
    assert await _status(headers) == 403
