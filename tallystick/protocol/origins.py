"""The sites that a server is to browsers: scheme, host and port of its public URLs (RFC 6454). Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from tallystick.protocol.errors import BadMessage


def read_origin(url: str) -> str:
    """Scheme, host and port of a URL: in small letters, without the scheme's own port and without the dot of a root domain."""
    return _write_origin(urlsplit(url.lower()))


def same_host(scheme: str, host: str) -> str:
    """A host with or without a port, such as that of a Host header, as `read_origin` writes it; empty for none."""
    try:
        parts = urlsplit(f"{scheme}://{host.lower()}")
    except ValueError:
        return ""
    if "@" in parts.netloc or parts.path or parts.query or parts.fragment:
        return ""
    return _write_origin(parts).partition("://")[2]


def _write_origin(parts: SplitResult) -> str:
    own = {"http": "80", "https": "443"}.get(parts.scheme, "")
    host, colon, port = parts.netloc.rpartition(":")
    if not colon or not port.isdecimal():  # no port, or the last group of an IPv6 address
        host, port = parts.netloc, ""
    shown = host.removesuffix(".")
    return f"{parts.scheme}://{shown}:{port}" if port and port != own else f"{parts.scheme}://{shown}"


def is_loopback_name(host: str) -> bool:
    """Whether a host, with or without a port, names this machine: localhost, a name below it, or a loopback address."""
    try:
        name = (urlsplit("//" + host).hostname or "").removesuffix(".")
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def own_origins(urls: Collection[str], host: str, port: int) -> tuple[str, ...]:
    """The sites of a server: its public URLs, and the address on which it listens if that is one that others can name.

    A loopback address names another machine to each visitor, so it is none of the sites of a server that has public URLs.
    """
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return tuple(urls)
    own = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return tuple(urls) if urls and is_loopback_name(own.partition("://")[2]) else (*urls, own)


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
