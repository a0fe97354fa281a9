"""To which addresses the names of a coordinator's replicas may lead."""

from __future__ import annotations

import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from tallystick.protocol.replicas import Reach
from tallystick.runtime.replica_resolver import ReplicaResolver

SEED = "https://seed.test"


class Names(AbstractResolver):
    """A DNS that the coordinator controls."""

    def __init__(self, **names: list[str]) -> None:
        self.names = {f"{name}.test": addresses for name, addresses in names.items()}

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)
            for address in self.names[host.rstrip(".").lower()]
        ]

    async def close(self) -> None:
        """Nothing is open."""


async def _addresses(resolver: ReplicaResolver, host: str) -> list[str]:
    return [result["host"] for result in await resolver.resolve(host)]


@pytest.mark.parametrize(
    ("seed", "address", "permitted"),
    [
        ("8.8.8.8", "127.0.0.1", False),
        ("8.8.8.8", "::1", False),
        ("8.8.8.8", "::ffff:7f00:1", False),
        ("8.8.8.8", "169.254.169.254", False),
        ("8.8.8.8", "10.0.0.1", False),
        ("8.8.8.8", "1.1.1.1", True),
        ("10.0.0.1", "192.168.0.1", True),
        ("10.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.2", True),
    ],
)
async def test_a_name_leads_no_nearer_than_the_configured_one(seed: str, address: str, *, permitted: bool) -> None:
    """A replica's name that resolves to this machine, link or network is used only if the configured name does, too."""
    resolver = ReplicaResolver([SEED], Names(seed=[seed], replica=[address]))
    assert await _addresses(resolver, "seed.test") == [seed]
    if permitted:
        assert await _addresses(resolver, "Replica.test.") == [address]
    else:
        with pytest.raises(OSError, match="nearer to this machine"):
            await _addresses(resolver, "replica.test")


async def test_only_the_near_addresses_of_a_name_are_left_out() -> None:
    """A name with addresses of both kinds leads to the others."""
    resolver = ReplicaResolver([SEED], Names(seed=["8.8.8.8"], replica=["127.0.0.1", "1.1.1.1"]))
    await resolver.resolve("seed.test")
    assert await _addresses(resolver, "replica.test") == ["1.1.1.1"]


async def test_the_limit_only_falls() -> None:
    """A coordinator that owns the configured name cannot later move it to this machine so as to list addresses there."""
    names = Names(seed=["127.0.0.1", "8.8.8.8"], replica=["127.0.0.1"])
    resolver = ReplicaResolver([SEED], names)
    assert resolver.limit is Reach.ANYWHERE, "nothing is resolved yet"
    await resolver.resolve("seed.test")
    names.names["seed.test"] = ["127.0.0.1"]
    assert await _addresses(resolver, "seed.test") == ["127.0.0.1"], "the configured host may have any address"
    assert resolver.limit is Reach.ANYWHERE
    with pytest.raises(OSError, match="nearer"):
        await resolver.resolve("replica.test")


def test_configured_addresses_set_the_limit() -> None:
    """Addresses need no DNS; several configured ones give the widest."""
    for seeds, limit in ((["http://127.0.0.1:1"], Reach.MACHINE), (["http://[fd00::1]"], Reach.NETWORK)):
        assert ReplicaResolver(seeds).limit is limit
    assert ReplicaResolver(["http://127.0.0.1", "http://8.8.8.8"]).limit is Reach.ANYWHERE


async def test_a_limit_that_is_known_already() -> None:
    """It holds for every name, whatever is resolved."""
    resolver = ReplicaResolver((), Names(replica=["10.0.0.1", "1.1.1.1"], near=["127.0.0.1"]), limit=Reach.NETWORK)
    assert await _addresses(resolver, "replica.test") == ["10.0.0.1", "1.1.1.1"]
    with pytest.raises(OSError, match="nearer"):
        await resolver.resolve("near.test")


async def test_a_proxy_of_the_environment_may_be_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy was configured, not listed."""
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test:3128")
    resolver = ReplicaResolver([SEED], Names(proxy=["10.0.0.1"], replica=["10.0.0.1"]))
    assert await _addresses(resolver, "proxy.test") == ["10.0.0.1"]
    with pytest.raises(OSError, match="nearer"):
        await resolver.resolve("replica.test")
