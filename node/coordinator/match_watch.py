"""Watches the match logs of this node's coordinators: an order that was dispatched here must be logged as a match.

A coordinator that shows orders without logging them leaves evidence in the node's folder `match-log`. The newest head of a log
goes with each response to the client, and the client's comes with its request, both sealed: a coordinator that shows its clients
and its nodes two logs cannot keep them apart. Nodes tell the coordinator the heads that they saw, too, in their beats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from node.coordinator.coordinator_http import CoordinatorHttp, base_url
from node.ports import Link
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.log_monitor import LogQuestion
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Address
from tallystick.runtime.log_watch import LogWatch


class MatchWatch:
    """See the module's docstring. `url_of`: the URL of an open link to a coordinator; empty without one. `folder`: where
    evidence is kept. `http`: asks for proofs.
    """

    def __init__(self, domain: Domain, folder: Path, url_of: Callable[[Address], str], http: CoordinatorHttp) -> None:
        self._domain, self._folder, self._url_of, self._http = domain, folder, url_of, http
        self._watches: dict[Address, LogWatch] = {}
        self._urls: dict[Address, str] = {}

    def on_match(self, link: Link, match: Match, order: Signed[Order]) -> None:
        """Takes a match that the admission checked, and gives the link the newest head of the log."""
        watch = self._watch_of(link)
        watch.add_match(match, order)
        link.log_head = watch.packed_head

    def on_connected(self, link: Link) -> None:
        """Watches the log of a link's coordinator from what an earlier process kept of it."""
        self._watch_of(link).start()

    def on_client_head(self, link: Link, packed: bytes) -> None:
        """Takes the head that a client passed on in its request, which is untrusted."""
        self._watch_of(link).add_head(packed)

    def head_of(self, coordinator: Address) -> bytes:
        """The newest head that is known of a coordinator's log, as it is passed on; empty if none is known."""
        watch = self._watches.get(coordinator)
        return b"" if watch is None else watch.packed_head

    def _watch_of(self, link: Link) -> LogWatch:
        coordinator = link.coordinator
        self._remember_url(coordinator)
        watch = self._watches.get(coordinator)
        if watch is None:
            watch = self._watches[coordinator] = LogWatch(
                self._domain, coordinator, self._folder, lambda question: self._ask(coordinator, question)
            )
        return watch

    async def _ask(self, coordinator: Address, question: LogQuestion) -> object:
        """Asks the coordinator over any open link to it, or where it was last. Raises TallyError."""
        self._remember_url(coordinator)
        return await self._http.ask_proof(self._urls[coordinator], question)

    def _remember_url(self, coordinator: Address) -> None:
        if url := self._url_of(coordinator):
            self._urls[coordinator] = base_url(url)

    async def close(self) -> None:
        """Stops watching; matches that were not checked yet are checked by the next process."""
        await asyncio.gather(*(watch.close() for watch in self._watches.values()))
