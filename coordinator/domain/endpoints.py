"""Where nodes may have dialled this coordinator: its public addresses, and loopback where they came over that. Pure.

A node signs the host and port that it dialled. A relay in between was dialled under another name, so what it passes on is
refused here. Nothing that a connection says of itself (a Host header, a forwarded name) counts: a relay would say it, too.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

from tallystick.protocol.errors import Code, Fault, Refusal
from tallystick.protocol.link import endpoint_of

_LONGEST = 300
"""Characters of an endpoint: a host name has at most 253."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that host: `localhost`, or an address of loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def endpoints_of(urls: Iterable[str]) -> frozenset[str]:
    """The endpoints of these URLs, each in one spelling. Raises BadMessage."""
    return frozenset(_spelled(endpoint_of(url)) for url in urls)


def check_endpoint(dialled: str, public: Collection[str], bound: tuple[str, int | None] | None) -> None:
    """Checks `Connect.endpoint`: one of `public` (from `endpoints_of`), or loopback with the port at which the connection came
    in, if it came over loopback. `bound`: the local address and port of the connection. Raises Refusal that names both sides.
    """
    spelled = _spelled(dialled) if len(dialled) <= _LONGEST else ""
    if spelled in public:
        return
    local = bound is not None and bound[1] is not None and is_loopback(bound[0])
    host, _, port = spelled.rpartition(":")
    if local and bound is not None and is_loopback(host) and port == str(bound[1]):
        return
    known = sorted(public) + ([f"localhost:{bound[1]}"] if local and bound is not None else [])
    where = ", ".join(known) or "no address"
    text = (
        f"hello.connect.endpoint: the node dialled {dialled[:200]!r}, but this coordinator is at {where}. "
        "If that is this coordinator's address, its operator adds it to public_urls; if not, something stands between the two"
    )
    raise Refusal(Code.UNAUTHENTICATED, text, fault=Fault.NOBODY)


def _spelled(endpoint: str) -> str:
    """One spelling of a host and port: in lower case, without a last dot, IP addresses and international names as machines
    write them.
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
