"""All links of a node: one to each configured coordinator or, if that lists replicas, one to each of its replicas.

Links to replicas that are no longer listed are not opened again. They close once their jobs have had time to end. A configured
URL that is not itself listed, such as that of a load balancer, is dialled only while no listed replica is connected.

A list changes who is dialled and nothing else. Each replica must give the account of the coordinator that listed it. Coordinator
credit and state recovery stay with the configured URL.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from node.coordinator.coordinator_http import base_url
from node.coordinator.link import NodeLink
from node.coordinator.link_settings import LinkSettings, node_url
from node.ports import Link
from tallystick.protocol.replicas import Reach, replica_order, split_allowed
from tallystick.protocol.types import Address

log = structlog.get_logger()
PACE_SECONDS = 1.0
"""Changes of the lists within this time are applied together, so that a coordinator cannot make nodes dial faster."""


class LinkMaker(Protocol):
    """Makes the link to a URL. `seed`: the configured URL whose coordinator listed it; None for a configured URL itself."""

    def __call__(self, url: str, *, seed: str | None, coordinator: Address | None) -> NodeLink:
        """See the class."""
        ...


@dataclass(slots=True)
class _Group:
    """A configured coordinator, and the replicas that it listed last."""

    seed: str
    account: Address | None = None
    listed: tuple[str, ...] = ()
    reach: Reach = Reach.ANYWHERE
    """Of the address at which the configured URL was reached last: a replica is not nearer."""
    impostors: set[str] = field(default_factory=set)
    """Listed URLs at which another coordinator answers."""


class CoordinatorLinks:
    """See the module's docstring. An observer of its links (link.LinkObserver)."""

    def __init__(
        self,
        provider: Address,
        seeds: Iterable[str],
        settings: LinkSettings,
        *,
        pace_seconds: float = PACE_SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`seeds`: the configured URLs; `make_link` must be set before `run`."""
        self._provider, self._settings, self._pace, self._now = provider, settings, pace_seconds, now
        self._groups = {url: _Group(url) for url in map(node_url, seeds)}
        self._links: dict[str, NodeLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._retired: dict[str, float] = {}
        """When each retired link closes at the latest, oldest first."""
        self._unapplied: dict[str, tuple[Address, tuple[str, ...]]] = {}
        self._changed = asyncio.Event()
        self._running: asyncio.TaskGroup | None = None
        self._closed = False
        self.make_link: LinkMaker | None = None

    # For the daemon

    def __iter__(self) -> Iterator[NodeLink]:
        """All links, connected or not."""
        return iter(tuple(self._links.values()))

    def __len__(self) -> int:
        """The number of links."""
        return len(self._links)

    @property
    def shares_slots(self) -> bool:
        """See link.LinkObserver."""
        return len(self._links) > 1

    def announce_capacity(self) -> None:
        """Reports the changed capacity on every link."""
        for link in self._links.values():
            link.announce_capacity()

    def announce_asks(self) -> None:
        """Sends the changed asks and capacity on every link."""
        for link in self._links.values():
            link.announce_asks()
            link.announce_capacity()

    def session(self, coordinator: Address) -> Link | None:
        """An open connection to a coordinator, if there is one."""
        return next((link.session for link in self._connected(coordinator)), None)

    def coordinators(self) -> list[Address]:
        """The accounts of the connected coordinators, each once."""
        return list(dict.fromkeys(link.session.coordinator for link in self._links.values() if link.session is not None))

    def seed_of(self, session: Link) -> str:
        """The configured URL of a session's coordinator; empty if the session has ended."""
        return next((link.seed for link in self._links.values() if link.session is session), "")

    def url_of(self, coordinator: Address) -> str:
        """The URL of an open connection to a coordinator; empty without one."""
        return next((link.url for link in self._connected(coordinator)), "")

    def limit_of(self, url: str) -> Reach:
        """The nearest address to which an HTTP URL of a coordinator may lead: any for a configured one."""
        known = [(link.url, link.nearest) for link in self._links.values()]
        known += [(seed, Reach.MACHINE) for seed in self._groups]
        return max((nearest for link, nearest in known if url.startswith(f"{base_url(link)}/")), default=Reach.ANYWHERE)

    def _connected(self, coordinator: Address) -> Iterator[NodeLink]:
        for link in self._links.values():
            if link.session is not None and link.session.coordinator == coordinator:
                yield link

    async def run(self) -> None:
        """Keeps the links until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._running = group
            try:
                while True:
                    self._changed.clear()
                    unapplied, self._unapplied = self._unapplied, {}
                    for seed, (account, urls) in unapplied.items():
                        self._apply(self._groups[seed], account, urls)
                    self._update()
                    await asyncio.sleep(self._pace)
                    await self._wait_for_change()
            finally:
                self._running = None

    async def close(self) -> None:
        """Sends what is queued on the links and closes them. No link is opened any more."""
        self._closed = True
        await asyncio.gather(*(link.close() for link in self._links.values()))

    async def _wait_for_change(self) -> None:
        first = min(self._retired.values(), default=None)
        try:
            async with asyncio.timeout(None if first in (None, math.inf) else max(first - self._now(), 0)):
                await self._changed.wait()
        except TimeoutError:
            pass

    # For the links

    def replicas_listed(self, link: NodeLink, coordinator: Address, urls: tuple[str, ...]) -> None:
        """See link.LinkObserver. A replica that is no longer listed changes nothing: its list is out of date."""
        if not link.retired:
            if link.url == link.seed:
                self._groups[link.seed].reach = link.reach
            self._unapplied[link.seed] = coordinator, urls
            self._changed.set()

    def link_changed(self) -> None:
        """See link.LinkObserver."""
        self._update()

    # What is dialled

    def _apply(self, group: _Group, account: Address, urls: tuple[str, ...]) -> None:
        """Takes a coordinator's list of replicas."""
        if (account, urls) == (group.account, group.listed):
            return
        if account != group.account:  # the links to its replicas expect the former account
            group.impostors.clear()
            for link in self._links.values():
                if link.seed == group.seed != link.url:
                    self._close_link(link)
        known = bool(group.listed)
        group.account, group.listed = account, urls
        group.impostors &= set(map(node_url, urls))
        for link in self._links.values():
            if link.seed == group.seed:
                link.limit = group.reach
        _, refused = split_allowed(group.seed, urls)
        if refused:
            text = (
                "replicas not used: plain http after a https coordinator, another path, or an address of this machine or network"
            )
            log.warning(text, coordinator=group.seed, urls=refused)
        if urls or known:
            log.info("replicas of a coordinator", coordinator=group.seed, listed=len(urls), dialled=len(self._chosen(group)))

    def _chosen(self, group: _Group) -> list[str]:
        """The replicas of a coordinator to dial: those that this provider prefers, if there are too many."""
        allowed, _ = split_allowed(group.seed, group.listed)
        ordered = replica_order(self._provider, allowed)
        return [url for url in map(node_url, ordered) if url not in group.impostors][: self._settings.max_replicas]

    def _wanted(self) -> dict[str, _Group]:
        """The URLs to dial, each with the coordinator for whose sake it is dialled; configured URLs for their own."""
        wanted: dict[str, _Group] = {}
        for group in self._groups.values():
            chosen = self._chosen(group)
            if not any(self._serves(url, group) for url in chosen):
                chosen.insert(0, group.seed)
            for url in chosen:
                wanted.setdefault(url, self._groups.get(url, group))
        return wanted

    def _serves(self, url: str, group: _Group) -> bool:
        """Whether a link to a replica of this coordinator is open."""
        link = self._links.get(url)
        return link is not None and link.session is not None and link.session.coordinator == group.account

    def _update(self) -> None:
        """Opens the links that are wanted, and retires the others."""
        if self._running is None or self._closed:
            return
        for url, task in list(self._tasks.items()):
            if task.done():
                self._remove(url)
        wanted = self._wanted()
        for url, link in self._links.items():
            if url not in wanted and url not in self._retired:
                link.retired = True
                self._retired[url] = self._now() + self._settings.replica_grace_seconds
        for url, group in wanted.items():
            if url in self._links:
                self._links[url].retired = False
                self._retired.pop(url, None)
            else:
                self._open(url, group)
        self._close_overdue()

    def _open(self, url: str, group: _Group) -> None:
        if self._running is None or self.make_link is None:
            raise RuntimeError("links open only while `run` runs, and once `make_link` is set")
        listed = url != group.seed
        link = self.make_link(url, seed=group.seed if listed else None, coordinator=group.account if listed else None)
        link.limit = group.reach
        self._links[url] = link
        task = self._tasks[url] = self._running.create_task(link.run(), name=f"link to {url}")
        task.add_done_callback(lambda _task: self._changed.set())

    def _remove(self, url: str) -> None:
        link = self._links.pop(url)
        del self._tasks[url]
        self._retired.pop(url, None)
        if link.is_impostor:
            self._groups[link.seed].impostors.add(url)

    def _close_overdue(self) -> None:
        """Closes the retired links whose time is over, and the oldest ones if there are too many."""
        now = self._now()
        waiting = [url for url, until in self._retired.items() if until < math.inf]
        surplus = len(waiting) - self._settings.max_replicas * len(self._groups)
        for number, url in enumerate(waiting):
            if self._retired[url] <= now or number < surplus:
                self._retired[url] = math.inf
                self._close_link(self._links[url])

    def _close_link(self, link: NodeLink) -> None:
        async def close(task: asyncio.Task[None]) -> None:
            await link.close()
            task.cancel()  # which may still be in the handshake

        if self._running is not None:
            self._running.create_task(close(self._tasks[link.url]), name=f"close {link.url}")

    # For the status report

    def status(self) -> dict[str, dict[str, Address | None]]:
        """By configured URL: the account that each of its links is connected to; None for one that is not connected."""
        report: dict[str, dict[str, Address | None]] = {seed: {} for seed in self._groups}
        for url, link in self._links.items():
            report[link.seed][url] = None if link.session is None else link.session.coordinator
        return report
