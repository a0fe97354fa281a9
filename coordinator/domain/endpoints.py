"""Endpoints under which nodes may dial this coordinator: its public addresses, and loopback for local connections. Pure.

A node signs the host and port that it dialled. A relay in between was dialled under another name, so the connections that it
passes on are refused here. What a connection says about itself (a Host header, a forwarded name) proves nothing: a relay would
say the same.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

from tallystick.protocol.errors import Code, Fault, Refusal
from tallystick.protocol.link import endpoint_of

_MAX_ENDPOINT = 300
"""Characters of an endpoint: a host name has at most 253."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host: `localhost`, or a loopback address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def endpoints_of(urls: Iterable[str]) -> frozenset[str]:
    """Returns the normalised endpoints of these URLs. Raises BadMessage."""
    return frozenset(_normalised(endpoint_of(url)) for url in urls)


def check_endpoint(dialled: str, public: Collection[str], bound: tuple[str, int | None] | None) -> None:
    """Checks `Connect.endpoint`: it must be one of `public` (from `endpoints_of`). A connection over loopback may also name
    loopback and the port at which it arrived. `bound`: the local address and port of the connection. Raises Refusal.
    """
    normalised = _normalised(dialled) if len(dialled) <= _MAX_ENDPOINT else ""
    if normalised in public:
        return
    local = bound is not None and bound[1] is not None and is_loopback(bound[0])
    host, _, port = normalised.rpartition(":")
    if local and bound is not None and is_loopback(host) and port == str(bound[1]):
        return
    known = sorted(public) + ([f"localhost:{bound[1]}"] if local and bound is not None else [])
    where = ", ".join(known) or "no address"
    text = (
        f"hello.connect.endpoint: the node dialled {dialled[:200]!r}, but this coordinator is at {where}. "
        "If that is this coordinator's address, its operator must add it to public_urls; if not, a relay stands between the two"
    )
    raise Refusal(Code.UNAUTHENTICATED, text, fault=Fault.NOBODY)


def _normalised(endpoint: str) -> str:
    """Returns a host and port in lower case, without a trailing dot, with IP addresses and international names in canonical
    form.
    """
    host, _, port = endpoint.rpartition(":")
    plain = host.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(plain)
    except ValueError:
        try:
            return f"{plain.encode('idna').decode()}:{port}"
        except UnicodeError:
            return f"{plain}:{port}"
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
