"""The replicas of one coordinator: how they are listed, which may be dialled, and which one an account prefers. Pure.

Several processes may serve one coordinator, with one account and one database, and without a load balancer. GET /v1/info lists
them for clients. WELCOME and REPLICAS list them for nodes that announced `replicas` in HELLO. A lone coordinator lists none.

Every client orders the replicas by rendezvous hashing (Thaler and Ravishankar, 1998) on its payer's address, and uses the first
that answers. So all clients of a payer meet at one replica, where the payer's exposure is counted. The loss of a replica moves
only the payers of that replica.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_items, read_members, read_text
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.types import Address

MAX_REPLICAS = 64
MAX_REPLICA_URL = 512
MAX_REPLICA_ID = 64
_THIS_HOST = ipaddress.IPv4Network("0.0.0.0/8")
_COMPATIBLE, _NAT64 = ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.IPv6Network("64:ff9b:1::/48")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAME = re.compile(r"[a-z0-9_.-]+")
_OWN_NAMES = ("localhost", "localdomain", "localdomain4", "localdomain6")
_LOCALHOST = re.compile(r"(localhost[46]?|ip6-(localhost|loopback))(\.|$)")


@dataclass(frozen=True, slots=True)
class Replica:
    """One process of a coordinator, as /v1/info lists it: its id, which is new at each start, and its base URL."""

    id: str
    url: str

    def to_json(self) -> dict[str, str]:
        """The wire form."""
        return {"id": self.id, "url": self.url}


def read_replica_url(raw: object, member: str) -> str:
    """Reads the base URL of a replica, http or https, without a slash at its end. Raises BadMessage."""
    text = read_text(raw, member, MAX_REPLICA_URL)
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or not (text.isascii() and text.isprintable()) or any(mark in text for mark in "?#@\\ "):
        raise BadMessage(f"{member}: expected a URL such as https://coordinator.example, got {text[:200]!r}")
    return text.rstrip("/")


def read_replica_urls(raw: object, member: str) -> tuple[str, ...]:
    """Reads the base URLs of at most MAX_REPLICAS replicas, each once. Raises BadMessage."""
    listed = read_items(raw, member, MAX_REPLICAS)
    return tuple(dict.fromkeys(read_replica_url(url, f"{member}[{i}]") for i, url in enumerate(listed)))


def read_welcome(raw: object) -> tuple[str, ...]:
    """Reads the URLs in a node's WELCOME; none from a lone coordinator, or one that is older. Raises BadMessage."""
    if not isinstance(raw, dict):
        raise BadMessage("welcome: expected a JSON object")
    return read_replica_urls(raw.get("replicas", []), "welcome.replicas")


def read_replicas(raw: Any, member: str) -> tuple[Replica, ...]:
    """Reads the `replicas` of /v1/info: at most MAX_REPLICAS, each URL once. Raises BadMessage."""
    replicas: dict[str, Replica] = {}
    for i, entry in enumerate(read_items(raw, member, MAX_REPLICAS)):
        name, url = read_members(entry, f"{member}[{i}]", "id", "url")
        replica = Replica(read_text(name, f"{member}[{i}].id", MAX_REPLICA_ID), read_replica_url(url, f"{member}[{i}].url"))
        replicas.setdefault(replica.url, replica)
    return tuple(replicas.values())


def replica_order(account: Address, urls: Iterable[str]) -> list[str]:
    """Orders replicas for a payer, or a provider: the one to use first comes first (rendezvous hashing).

    The rank of a URL is the SHA-256 of the account's 20 bytes and the URL's UTF-8; the highest comes first. The order of `urls`
    does not matter.
    """
    seed = bytes.fromhex(account.removeprefix("0x"))
    return sorted(dict.fromkeys(urls), key=lambda url: (hashlib.sha256(seed + url.encode()).digest(), url), reverse=True)


class Reach(IntEnum):
    """From where an address can be reached: the lower, the wider."""

    ANYWHERE = 0
    NETWORK = 1
    LINK = 2
    MACHINE = 3


def reach_of(address: str) -> Reach:
    """From where an IP address can be reached; for IPv6 also by the IPv4 address in it. MACHINE for what is no IP address.

    Sources: the special-purpose registries of IANA (RFC 6890); RFC 4291, 3056, 4380, 6052 and 8215 for IPv4 in IPv6.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return Reach.MACHINE
    if isinstance(ip, ipaddress.IPv6Address):
        return max(_reach(ip), *map(_reach, _inner(ip)), Reach.ANYWHERE)
    return _reach(ip)


def _reach(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Reach:
    if ip.is_loopback or ip.is_unspecified or (isinstance(ip, ipaddress.IPv4Address) and ip in _THIS_HOST):
        return Reach.MACHINE
    if ip.is_link_local or ip.is_multicast:
        return Reach.LINK
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped is not None or ip in _NAT64):
        return Reach.ANYWHERE  # the address in it decides
    return Reach.ANYWHERE if ip.is_global and ip not in _LOCAL_NAT64 else Reach.NETWORK


def _inner(ip: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """Yields the IPv4 addresses to which a packet to this address may come."""
    if ip.ipv4_mapped is not None:
        yield ip.ipv4_mapped
    if ip.sixtofour is not None:
        yield ip.sixtofour
    if ip.teredo is not None:
        yield from ip.teredo
    if (ip in _COMPATIBLE and int(ip) > 1) or ip in _NAT64 or ip in _LOCAL_NAT64:
        yield ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)


def split_allowed(seed: str, urls: Sequence[str], reach: Reach = Reach.MACHINE) -> tuple[list[str], list[str]]:
    """Splits the URLs that the coordinator at `seed` listed into those that may be dialled, and those that may not.

    A coordinator cannot lower the protection that was configured: an https seed allows https replicas only. Nor can it choose
    the path of a request: a replica has the path of the seed, or none. Nor can a coordinator elsewhere send its peers to services
    of their own machine, link or network. This judges what a URL shows; whoever connects also compares `reach_of` the address
    that the name led to. `reach`: that of the address at which the seed was reached, if it is known.
    """
    encrypted, path = urlsplit(seed).scheme in ("https", "wss"), _base_path(seed)
    limit = min(_seed_reach(seed), reach)
    allowed: list[str] = []
    refused: list[str] = []
    for url in urls:
        fits = (url.startswith("https://") or not encrypted) and _base_path(url) in ("", path)
        (allowed if fits and _named_reach(url) <= limit else refused).append(url)
    return allowed, refused


def _base_path(url: str) -> str:
    return urlsplit(url).path.rstrip("/").removesuffix("/v1/node").rstrip("/")


def _seed_reach(seed: str) -> Reach:
    """The nearest address that the coordinator at this URL may list, as far as the URL shows it."""
    if not uses_proxy(seed):
        return Reach.MACHINE
    try:
        return reach_of(str(ipaddress.ip_address(urlsplit(seed).hostname or "")))
    except ValueError:
        return Reach.NETWORK


def _named_reach(url: str) -> Reach:
    """From where the host of a URL can be reached, as far as the URL shows it."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    try:
        return reach_of(str(ipaddress.ip_address(host.partition("%")[0])))
    except ValueError:
        pass
    label = host.rpartition(".")[2]
    if _NUMBER.fullmatch(label) or not _NAME.fullmatch(host):  # such as 127.1 or 0x7f000001: some resolvers read IPv4 addresses
        return Reach.MACHINE
    return Reach.MACHINE if label in _OWN_NAMES or _LOCALHOST.match(host) else Reach.ANYWHERE
