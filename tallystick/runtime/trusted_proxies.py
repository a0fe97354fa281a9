"""The address of a client behind reverse proxies, as `X-Forwarded-For` has it, and the scheme, as `X-Forwarded-Proto` has it.

Anybody can send these headers, so they count only in requests that come from a proxy of the settings. Each proxy appends the
address that it got the request from. So the client is the rightmost one that is not such a proxy; what is further left is only
what that client said. The standard's `Forwarded` (RFC 7239) is not read: a proxy that writes one of the two headers passes on the
other as the client sent it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tallystick.protocol.errors import BadMessage

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
MAX_HOPS = 16
"""Addresses of one request that are read, from the right."""
MAX_PROXIES = 64
_SETTING = "config: trusted_proxies"
_WITH_PORT = re.compile(r"\[([^\]]*)\](?::[0-9]{1,5})?|([0-9.]*):[0-9]{1,5}")
"""[IPv6], [IPv6]:port, or IPv4:port."""
_SCHEMES = {b"http": "http", b"https": "https"}


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """Networks of proxies that are believed whom they forward for. None by default."""

    networks: tuple[IpNetwork, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> TrustedProxies:
        """Reads the setting `trusted_proxies`: addresses and networks. Raises BadMessage."""
        networks: list[IpNetwork] = []
        for text in texts:
            try:
                network = ipaddress.ip_network(text.strip())
            except ValueError as error:
                raise BadMessage(f"{_SETTING}: expected addresses and networks, got {text[:60]!r}: {error}") from None
            if not network.prefixlen:
                raise BadMessage(f"{_SETTING}: expected the proxies alone, got {text!r}: all clients could name any address")
            networks.append(network)
        if len(networks) > MAX_PROXIES:
            raise BadMessage(f"{_SETTING}: expected at most {MAX_PROXIES} addresses and networks, got {len(networks)}")
        return cls(tuple(networks))

    def trust(self, host: str) -> bool:
        """Whether a peer's address is one of them."""
        if not self.networks:
            return False
        address = _read_address(host.partition("%")[0])
        return address is not None and self._contain(address)

    def client_address(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The client of a request that came from `peer`, which is one of them: `peer` itself unless the headers name it.

        If all named addresses are proxies, it is the leftmost. `headers`: names are in lower case.
        """
        text = b",".join([value for name, value in headers if name == b"x-forwarded-for"]).decode("latin-1")
        client = peer
        for hop in reversed(text.rsplit(",", MAX_HOPS)):
            address = _read_hop(hop.strip())
            if address is None:
                return peer
            client = str(address)
            if not self._contain(address):
                break
        return client

    def _contain(self, address: IpAddress) -> bool:
        return any(address in network for network in self.networks)


NO_PROXIES = TrustedProxies()


def forwarded_scheme(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The scheme, http or https, in which a client sent a request to a trusted proxy. None if the proxy does not say so."""
    values = [value for name, value in headers if name == b"x-forwarded-proto"]
    return _SCHEMES.get(values[0].strip().lower()) if len(values) == 1 else None


def _read_hop(text: str) -> IpAddress | None:
    match = _WITH_PORT.fullmatch(text)
    return _read_address(text if match is None else match[1] or match[2])


def _read_address(text: str | None) -> IpAddress | None:
    """An address without a zone; an IPv4-mapped IPv6 address as IPv4. None for any other text."""
    try:
        address = ipaddress.ip_address(text or "")
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return address
    return None if address.scope_id else address.ipv4_mapped or address
