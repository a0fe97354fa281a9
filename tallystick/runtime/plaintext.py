"""Detection of URLs whose traffic crosses a network without TLS, and the warning about them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether a host name or an address literal denotes this machine."""
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
    """Whether a URL is plain http or ws to another machine: others on the network path can read and change the traffic."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return False
    return parts.scheme.lower() in ("http", "ws") and host is not None and not is_loopback(host)


def warn_if_plaintext(url: str, leaks: str) -> bool:
    """Warns if a coordinator's URL is plaintext. `leaks` lists the data that others can read. Returns whether it warned."""
    if not is_plaintext(url):
        return False
    import structlog  # noqa: PLC0415 - slow to import, and every command asks whether an address is of this machine

    structlog.get_logger().warning(
        "PLAIN HTTP to a coordinator on another machine: others on the network path can read and change the traffic",
        url=url,
        exposed=leaks,
        hint="use an https:// URL; use http only inside a VPN or your own network",
    )
    return True
