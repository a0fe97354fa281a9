"""The sites that a server is to browsers: scheme, host and port of its public URLs (RFC 6454). Pure."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage


def read_origin(url: str) -> str:
    """Scheme, host and port of a public URL, as a browser writes them: in small letters, and without the scheme's own port."""
    parts = urlsplit(url.lower())
    own = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
    return f"{parts.scheme}://{parts.netloc.removesuffix(own) if own else parts.netloc}"


def own_origins(urls: Collection[str], host: str, port: int) -> tuple[str, ...]:
    """The sites of a server: its public URLs, and the address on which it listens if that is one that others can name."""
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return tuple(urls)
    return (*urls, f"http://{f'[{host}]' if ':' in host else host}:{port}")


def check_urls(urls: Collection[str], setting: str) -> None:
    """Raises BadMessage for a public URL that has no scheme http or https, or no host."""
    for url in urls:
        try:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
            _ = parts.port
        except ValueError:
            is_url = False
        if not is_url:
            raise BadMessage(f"config: {setting}: expected URLs such as https://pages.example, got {url[:200]!r}")
