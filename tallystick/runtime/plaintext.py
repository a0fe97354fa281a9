"""Addresses that are dialled without TLS although they are not of this machine: who else reads along, and saying so."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import structlog

log = structlog.get_logger()


def is_loopback(host: str) -> bool:
    """Whether a host name or an address literal is this machine's own."""
    name = host.lower()
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_plaintext(url: str) -> bool:
    """Whether what is sent to a URL can be read and changed on its way: plain http or ws to another machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    return parts.scheme.lower() in ("http", "ws") and host is not None and not is_loopback(host)


def warn_if_plaintext(url: str, leaks: str) -> bool:
    """Logs what others on the way to a coordinator learn, where they can read along; whether they can."""
    if not is_plaintext(url):
        return False
    log.warning(
        "PLAIN HTTP to a coordinator on another machine: whoever is on the way can read along and change what it answers",
        url=url,
        they_learn=leaks,
        todo="use an https:// address; over http only inside a VPN or a network of your own",
    )
    return True
