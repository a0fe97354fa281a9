"""Where a client reaches its coordinator: the configured URLs, and the replicas that the coordinator lists. Pure.

The replicas come in the order of the payer's rendezvous hash, so that all clients of a payer use the same one. One that failed
comes after the others for a while. The configured URLs that are not listed come last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tallystick.protocol.replicas import Reach, Replica, replica_order, split_allowed
from tallystick.protocol.types import Address

DOWN_SECONDS = 10.0
"""Seconds for which a replica that failed comes after the others. By then the coordinator lists it no more, or it works again."""
MAX_TRIES = 4
"""URLs that one request is sent to."""
MAX_FORMER = 64
"""URLs that are no longer listed and remembered."""
REFRESH_SECONDS, HASTY_REFRESH_SECONDS = 30.0, 2.0
"""Seconds after which the list is read again; while a replica is down."""


class ReplicaSet:
    """See the module's docstring. Times are those of the event loop, in seconds."""

    def __init__(self, seeds: Sequence[str], account: Address) -> None:
        """`seeds`: the configured URLs; `account`: the payer."""
        self.seeds, self._account = tuple(dict.fromkeys(url.rstrip("/") for url in seeds)), account
        self._listed: tuple[str, ...] = ()
        self._former: dict[str, None] = {}
        """URLs that were listed before, the latest last."""
        self.urls = self.seeds
        """All URLs, the listed replicas first."""
        self._refused: set[str] = set()
        self._down: dict[str, float] = {}
        self._hanging: dict[str, float] = {}
        self.read_at = float("-inf")
        """When the list was read last, or the reading of it began."""

    @property
    def has_several(self) -> bool:
        """Whether there is another URL to go to."""
        return len(self.urls) > 1

    @property
    def is_replicated(self) -> bool:
        """Whether the coordinator lists replicas."""
        return bool(self._listed)

    def learn(self, replicas: Iterable[Replica], reach: Reach = Reach.MACHINE) -> list[str]:
        """Takes the coordinator's list. Returns the URLs in it that may not be dialled. `reach`: see split_allowed."""
        allowed, refused = split_allowed(self.seeds[0], [replica.url for replica in replicas], reach)
        former = self._former | dict.fromkeys(self._listed)
        self._listed = tuple(replica_order(self._account, allowed))
        self._former = dict.fromkeys([url for url in former if url not in self._listed][-MAX_FORMER:])
        self._refused &= set(self._listed)
        self._list_urls()
        self._down = {url: until for url, until in self._down.items() if url in self.urls}
        self._hanging = {url: until for url, until in self._hanging.items() if url in self._down or url in self._former}
        return refused

    def has_left(self, url: str) -> bool:
        """Whether a URL was listed once and no longer is."""
        return url in self._former

    def others(self, url: str, now: float) -> list[str]:
        """The URLs beside this one that did not fail lately, at most MAX_TRIES."""
        return [other for other in self.urls if other != url and not self.is_down(other, now)][:MAX_TRIES]

    def refuse(self, url: str) -> None:
        """Leaves out a listed URL, as long as it is listed: another coordinator answers there."""
        self._refused.add(url)
        self._list_urls()

    def _list_urls(self) -> None:
        self.urls = tuple(dict.fromkeys((*(url for url in self._listed if url not in self._refused), *self.seeds)))

    def lose(self, url: str, now: float, *, hangs: bool = False) -> None:
        """Notes that a URL did not answer. `hangs`: it takes connections, but nobody is there."""
        self._down[url] = now + DOWN_SECONDS
        if hangs:
            self._hanging[url] = now + DOWN_SECONDS

    def is_down(self, url: str, now: float) -> bool:
        """Whether a URL did not answer lately."""
        return self._down.get(url, now) > now

    def hangs(self, url: str, now: float) -> bool:
        """Whether a URL was found to hang lately."""
        return self._hanging.get(url, now) > now

    def order(self, now: float, home: str | None = None) -> list[str]:
        """The URLs to try, at most MAX_TRIES: `home` first, if it did not fail; those that failed lately come last."""
        urls = self.urls
        down = [url for url in urls if self.is_down(url, now)]
        up = sorted((url for url in urls if url not in down), key=lambda url: url != home)
        return [*up, *down][:MAX_TRIES]

    def is_stale(self, now: float) -> bool:
        """Whether the list should be read again."""
        hasty = any(until > now for until in self._down.values())
        return self.is_replicated and now - self.read_at >= (HASTY_REFRESH_SECONDS if hasty else REFRESH_SECONDS)
