"""The addresses of an engine's routes, from the base URL that its provider gave. Pure.

OpenAI's SDKs append a route to the base URL as it is, and hosted APIs have versions other than /v1 or a path behind the version.
Local engines are often named without any path. So a URL with a version in its path is used as it is, and others get /v1 first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

_VERSION = re.compile(r"v\d+([a-z]+\d*)?")
_ROUTES = ("/chat/completions", "/completions", "/embeddings", "/models", "/responses", "/messages")
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class BaseAddress:
    """The addresses of one engine. `api`: the URL before /chat/completions; `root`: the URL before the engine's own endpoints."""

    api: str
    root: str
    query: str = ""

    def route(self, path: str) -> str:
        """The address of a route of the market, such as /v1/chat/completions."""
        return self.api + path.removeprefix("/v1") + self.query

    def endpoint(self, path: str) -> str:
        """The address of an endpoint beside the routes, such as /metrics; of one under /v1, beside the models."""
        return self.route(path) if path.startswith("/v1/") else self.root + path + self.query


def base_addresses(url: str) -> tuple[BaseAddress, ...]:
    """The meanings of a base URL, the likelier one first. It may also be the address of a route."""
    scheme, host, path, query, _ = urlsplit(url)
    path = path.rstrip("/")
    for route in _ROUTES:
        path = path.removesuffix(route)
    segments = path.split("/")
    query = f"?{query}" if query else ""

    def join(*parts: str) -> str:
        return urlunsplit((scheme, host, "".join(parts), "", ""))

    version = next((i for i, segment in enumerate(segments) if _VERSION.fullmatch(segment)), None)
    if version is not None:
        return (BaseAddress(join(path), join("/".join(segments[:version])), query),)
    return BaseAddress(join(path, "/v1"), join(path), query), BaseAddress(join(path), join(path), query)


def uses_proxy(url: str) -> bool:
    """Whether the proxies of the environment apply: not to this machine. NO_PROXY applies to all others."""
    return (urlsplit(url).hostname or "") not in _LOCAL_HOSTS
