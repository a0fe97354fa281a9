"""Notices that a replica hangs: its process was stopped, or its machine lost its power or its network.

Its connections stay open, so whoever waits for it would wait for tens of seconds. A replica that is alive says so to the others
each second, and they list it no more after three. So while something waits, a replica from which nothing came for a while is
asked for its health. If it does not answer, and another one does not list it any more, what waits for it is given up and goes
elsewhere. A job that a provider has is not: its replica may be back, and the answer is paid for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

log = structlog.get_logger()
LOOK_SECONDS = 1.0
QUIET_SECONDS = 2.0
"""Seconds without a sign of life after which a replica is asked for one."""


class ReplicaWatch:
    """See the module's docstring.

    `has_left` returns whether a replica is silent and no longer listed; `quiet_since` since when nothing has come on the link of
    a URL, None if no job waits for a provider there. `give_up` ends that wait.
    """

    def __init__(
        self,
        *,
        has_left: Callable[[str], Awaitable[bool]],
        quiet_since: Callable[[str], float | None],
        give_up: Callable[[str], None],
    ) -> None:
        self._has_left, self._quiet_since, self._give_up = has_left, quiet_since, give_up
        self._requests: dict[asyncio.Timeout, tuple[str, float]] = {}
        """Requests that wait, each with its URL and since when."""
        self._urls: set[str] = set()
        """Where jobs wait."""
        self._looking: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def waiting(self, url: str) -> AsyncIterator[None]:
        """Wraps a request to a replica. Raises TimeoutError once it has left."""
        async with asyncio.timeout(None) as deadline:
            self._requests[deadline] = url, asyncio.get_running_loop().time()
            self._look()
            try:
                yield
            finally:
                del self._requests[deadline]

    def watch(self, url: str) -> None:
        """Watches the connection that a job waits on, for as long as one does."""
        self._urls.add(url)
        self._look()

    def _look(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_around(), name="replica watch")

    async def _look_around(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._requests or self._urls:
            await asyncio.sleep(LOOK_SECONDS)
            for url, since in self._waits().items():
                if clock() - since >= QUIET_SECONDS and await self._has_left(url):
                    log.warning("a replica hangs; what waits for it goes to another one", url=url)
                    self._abandon(url)

    def _waits(self) -> dict[str, float]:
        """The URLs on which something waits, each with the time of its last sign of life."""
        waits: dict[str, float] = {}
        for url in tuple(self._urls):
            since = self._quiet_since(url)
            if since is None:
                self._urls.discard(url)
            else:
                waits[url] = since
        for url, since in self._requests.values():
            waits.setdefault(url, since)
        return waits

    def _abandon(self, url: str) -> None:
        self._urls.discard(url)
        self._give_up(url)
        now = asyncio.get_running_loop().time()
        for deadline, (at, _) in tuple(self._requests.items()):
            if at == url:
                deadline.reschedule(now)

    async def close(self) -> None:
        """Stops to look."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
