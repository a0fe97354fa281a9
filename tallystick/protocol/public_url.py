"""URLs as messages and logs show them. The URL of a hosted service often contains an API key, which must not be printed. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "…"
_SCHEMES = ("http", "https", "ws", "wss")
_KEY_LENGTH, _KEY_LENGTH_WITH_DIGITS = 16, 6


def public_url(url: str) -> str:
    """Scheme, host and port of a URL. A path, query or user name is replaced by an ellipsis, since each can be a key."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return HIDDEN
    if parts.scheme not in _SCHEMES or not host:
        return HIDDEN
    place = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{'' if port is None else f':{port}'}"
    return f"{place}/{HIDDEN}" if parts.path.strip("/") or parts.query or parts.fragment else place


def has_secret(url: str) -> bool:
    """Whether a URL has a part that looks like a key: a user name, a value in its query, or a long segment of its path."""
    return any(True for _ in _secrets(url))


def without_secrets(text: str, url: str) -> str:
    """A text from elsewhere, such as a server's error message, without the URL's keys."""
    shown = text.replace(url, public_url(url)) if url else text
    for secret in sorted(_secrets(url), key=len, reverse=True):
        shown = shown.replace(secret, HIDDEN)
    return shown


def _secrets(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        values = [parts.username or "", parts.password or "", *(value for _, value in parse_qsl(parts.query))]
    except ValueError:
        return
    for value in (*values, *(segment for segment in parts.path.split("/") if _is_key(segment)), parts.fragment):
        yield from {text for text in (value, unquote(value)) if len(text) >= _KEY_LENGTH_WITH_DIGITS}


def _is_key(segment: str) -> bool:
    return len(segment) >= _KEY_LENGTH or (len(segment) >= _KEY_LENGTH_WITH_DIGITS and re.search(r"\d", segment) is not None)
