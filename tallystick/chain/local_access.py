"""Who may use a local chain: the programs of this machine, and the web pages that its operator names.

A browser lets any page send requests to this machine. It says so in headers that pages cannot change: Origin, Host and
Sec-Fetch-Site (https://fetch.spec.whatwg.org/, https://www.w3.org/TR/fetch-metadata/). Of these, programs send only Host.
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
_OF_ANOTHER_PAGE = {"cross-site", "same-site"}


class LocalAccessGuard:
    """An app for local programs only, and for pages of `origins` ("https://wallet.example", or "*" for all). `hosts` are names,
    beside localhost and plain IP addresses, under which it may be asked. Others get 403 and no CORS header.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str] = (), hosts: Iterable[str] = ()) -> None:
        self._origins, self._hosts = frozenset(origins), frozenset(host.lower() for host in hosts) | {"localhost"}
        pages = sorted(self._origins)
        cors = CORSMiddleware(app, allow_origins=pages, allow_methods=["POST"], allow_headers=["content-type"])
        self._app: ASGIApp = cors if pages else app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or refuses it."""
        why = self._objection(Headers(scope=scope)) if scope["type"] == "http" else ""
        if why:
            answer = {"jsonrpc": "2.0", "id": None, "error": {"code": _REFUSED, "message": why}}
            await JSONResponse(answer, 403)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _objection(self, headers: Headers) -> str:
        """Why a request is refused, or nothing."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return (
                f"Host: expected localhost or an IP address, got {host[:100]!r}, a name that a web page may have pointed here. "
                "If the name is yours, start the chain with --allow-host NAME"
            )
        origin = headers.get("origin")
        if origin is not None and not self._origins & {origin, ANY_ORIGIN}:
            return (
                f"Origin: web pages of {origin[:100]!r} may not use this chain. If the page is yours, start the chain with "
                f"--allow-origin {origin[:100]}"
            )
        site = headers.get("sec-fetch-site", "").lower()
        if origin is None and site in _OF_ANOTHER_PAGE:
            return f"Sec-Fetch-Site: {site}: a web page sent this, and does not say which. Only pages of --allow-origin may"
        return ""

    def _is_ours(self, host: str) -> bool:
        """An address cannot be pointed anywhere else; a name can, by whoever owns it."""
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
