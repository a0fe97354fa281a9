"""Access control of a local chain: programs on this machine may use it, and web pages only if the operator allows them.

A browser lets any page send requests to this machine, but adds headers that pages cannot change: Origin, Host and Sec-Fetch-Site
(https://fetch.spec.whatwg.org/, https://www.w3.org/TR/fetch-metadata/). Programs send only Host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

ANY_ORIGIN = "*"
_REFUSED = -32000
_CROSS_ORIGIN = {"cross-site", "same-site"}


class LocalAccessGuard:
    """An ASGI app that admits local programs and web pages of `origins` ("https://wallet.example", or "*" for all).

    `hosts` are further host names, besides localhost and IP addresses, that requests may use. All other requests get 403 and no
    CORS header.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str] = (), hosts: Iterable[str] = ()) -> None:
        self._origins, self._hosts = frozenset(origins), frozenset(host.lower() for host in hosts) | {"localhost"}
        pages = sorted(self._origins)
        cors = CORSMiddleware(app, allow_origins=pages, allow_methods=["POST"], allow_headers=["content-type"])
        self._app: ASGIApp = cors if pages else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards the request to the app, or refuses it."""
        objection = self._objection(Headers(scope=scope)) if scope["type"] == "http" else ""
        if objection:
            answer = {"jsonrpc": "2.0", "id": None, "error": {"code": _REFUSED, "message": objection}}
            await JSONResponse(answer, 403)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _objection(self, headers: Headers) -> str:
        """The reason to refuse a request, or an empty text."""
        host = headers.get("host", "")
        if not self._is_local(host):
            return (
                f"Host: expected localhost or an IP address, got {host[:100]!r}, which a web page may have pointed here. "
                "If the name is yours, start the chain with --allow-host NAME"
            )
        origin = headers.get("origin")
        if origin is not None and not self._origins & {origin, ANY_ORIGIN}:
            return (
                f"Origin: web pages of {origin[:100]!r} may not use this chain. If the page is yours, start the chain with "
                f"--allow-origin {origin[:100]}"
            )
        site = headers.get("sec-fetch-site", "").lower()
        if origin is None and site in _CROSS_ORIGIN:
            return f"Sec-Fetch-Site: {site}: a web page of unknown origin sent this request. Only pages of --allow-origin may"
        return ""

    def _is_local(self, host: str) -> bool:
        """Whether a Host header cannot come from a web page: a page's owner can point a name here, but not an IP address."""
        try:
            name = (urlsplit("//" + host).hostname or "").removesuffix(".")
        except ValueError:
            return False
        if name in self._hosts or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
