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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_items, read_members, read_text
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.types import Address

MAX_REPLICAS = 64
MAX_REPLICA_URL = 512
MAX_REPLICA_ID = 64


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


def split_allowed(seed: str, urls: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the URLs that the coordinator at `seed` listed into those that may be dialled, and those that may not.

    A coordinator cannot lower the protection that was configured: an https seed allows https replicas only. Nor can a coordinator
    elsewhere send its peers to services of their own machine or link.
    """
    encrypted, local = urlsplit(seed).scheme in ("https", "wss"), not uses_proxy(seed)
    allowed: list[str] = []
    refused: list[str] = []
    for url in urls:
        secure = url.startswith("https://") or not encrypted
        (allowed if secure and (local or not _is_near(url)) else refused).append(url)
    return allowed, refused


def _is_near(url: str) -> bool:
    """Whether a URL names the machine or the link of whoever dials it."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.replace(".", "").isdigit() or host.startswith("0x")  # such as 2130706433, which resolvers read as 127.0.0.1
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_link_local or address.is_unspecified
