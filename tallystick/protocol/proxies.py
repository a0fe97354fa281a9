"""Which addresses are reached through the proxies of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY). Pure."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def uses_proxy(url: str) -> bool:
    """Whether the environment's proxies apply to a URL: not on this machine. The HTTP client applies NO_PROXY to all others."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"
