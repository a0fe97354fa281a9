"""Who may see pages that need no login: a browser on this machine that no other site sent here.

A page of another site can point a browser to this machine, or a name of its own (DNS rebinding), but it cannot change the headers
Host and Sec-Fetch-Site (https://www.w3.org/TR/fetch-metadata/).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from tallystick.protocol.origins import is_loopback_name

_OWN_SITES = {"", "none", "same-origin"}


def objection(request: Request) -> str:
    """Why a request may not see local pages; empty if it may."""
    host = request.headers.get("host", "")
    if not is_loopback_name(host):
        return f"Host: expected localhost or a loopback address, got {host[:100]!r}: these pages are for this machine alone"
    origin = request.headers.get("origin")
    if origin is not None and origin.lower() != f"{request.url.scheme}://{host.lower()}":
        return f"Origin: pages of {origin[:100]!r} may not read this"
    if request.headers.get("sec-fetch-site", "").lower() not in _OWN_SITES:
        return "Sec-Fetch-Site: another site sent this request"
    return ""


def local_only(serve: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A route that answers 403 unless the request may see local pages."""

    async def guarded(request: Request) -> Response:
        problem = objection(request)
        return PlainTextResponse(problem, 403) if problem else await serve(request)

    return guarded
