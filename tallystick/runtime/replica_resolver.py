"""Resolves the names of a coordinator's replicas, without the addresses to which the coordinator may not send its clients."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult

from tallystick.protocol.replicas import Reach, reach_of


class ReplicaResolver(AbstractResolver):
    """A listed replica is no nearer to this machine than the configured URLs were when they were resolved (`limit`).

    Configured hosts may have any address, and so may the proxies of the environment.
    """

    def __init__(self, seeds: Sequence[str], resolver: AbstractResolver | None = None, *, limit: Reach | None = None) -> None:
        """`seeds`: the configured URLs. `limit`: the nearest reach of a listed replica, if it is known already."""
        self._resolver, self._limit = resolver, limit
        self._seeds = {_host(url) for url in seeds}
        self._exempt = self._seeds | {_host(url) for url in getproxies().values()}
        self._seen = {host: reach_of(host) for host in self._seeds if _is_address(host)}
        """The widest reach that each configured host has had."""

    @property
    def limit(self) -> Reach:
        """The nearest reach that a listed replica may have; ANYWHERE while no configured host was resolved here."""
        if self._limit is not None:
            return self._limit
        return min(self._seen.values(), default=Reach.ANYWHERE)

    def check(self, address: str) -> None:
        """Raises OSError if a listed replica may not have this address."""
        check_reach(address, self.limit)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        """See aiohttp. Raises OSError if no permitted address is left."""
        resolver = self._resolver or ThreadedResolver()
        results, name = await resolver.resolve(host, port, family), host.lower().rstrip(".")
        reaches = [reach_of(result["host"]) for result in results]
        if name in self._seeds and reaches:
            self._seen[name] = min(self._seen.get(name, Reach.MACHINE), *reaches)
        if name in self._exempt:
            return results
        permitted = [result for result, reach in zip(results, reaches, strict=True) if reach <= self.limit]
        if results and not permitted:
            self.check(results[0]["host"])
        return permitted

    async def close(self) -> None:
        """See aiohttp."""
        if self._resolver is not None:
            await self._resolver.close()


def check_reach(address: str, limit: Reach) -> None:
    """Raises OSError if an address is nearer to this machine than a coordinator may list one."""
    if reach_of(address) > limit:
        raise OSError(f"{address} is nearer to this machine than the coordinator that listed it, so it is not used")


def _host(url: str) -> str:
    return (urlsplit(url if "//" in url else f"//{url}").hostname or "").rstrip(".")


def _is_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except OSError:
        return False
    return True
