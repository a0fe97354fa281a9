"""The headers of a request, read once for everything that asks for one of them."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Scope

_MEMBER = "tally.headers"


class RequestHeaders:
    """Headers by their lower-case names, as ASGI has them. Of several with one name, the first one counts."""

    __slots__ = ("_first", "_raw")

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self._raw = raw
        self._first = dict(reversed(raw))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.encode("latin-1") in self._first

    def get(self, name: str, default: str = "") -> str:
        """The value of a header; `default` without one."""
        value = self._first.get(name.encode("latin-1"))
        return default if value is None else value.decode("latin-1")

    def find(self, name: str) -> str | None:
        """The value of a header; None without one, which differs from an empty one."""
        value = self._first.get(name.encode("latin-1"))
        return None if value is None else value.decode("latin-1")

    def all(self, name: str) -> list[str]:
        """The values of all headers with a name."""
        wanted = name.encode("latin-1")
        return [value.decode("latin-1") for key, value in self._raw if key == wanted] if wanted in self._first else []


def headers_of(scope: Scope) -> RequestHeaders:
    """The headers of a request."""
    headers: RequestHeaders | None = scope.get(_MEMBER)
    if headers is None:
        headers = scope[_MEMBER] = RequestHeaders(list(scope["headers"]))
    return headers
