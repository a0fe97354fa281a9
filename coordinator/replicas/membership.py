"""The list of replicas: each writes a beat to the database once a second, and reads who else does.

A replica whose last beat is older than GONE_SECONDS by the database's clock is gone. While the database is away, the last known
list stays, and for as long again after it is back, since the others may not have had their turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from tallystick.protocol.errors import Unavailable
from tallystick.protocol.replicas import MAX_REPLICAS, Replica

log = structlog.get_logger()
BEAT_SECONDS = 1.0
GONE_SECONDS = 3.0
MIN_LOOK_SECONDS = 0.05
"""Shortest time between two beats, however many notices say that the list changed."""


class ReplicaStore(Protocol):
    """The table of replicas."""

    async def beat(self, own: Replica, gone_seconds: float) -> list[Replica]:
        """Writes that `own` lives now. Returns the replicas whose last beat is at most `gone_seconds` old, the oldest beat first.

        Raises Unavailable.
        """
        ...

    async def remove(self, replica: str) -> None:
        """Removes a replica. Raises Unavailable."""
        ...


class Membership:
    """The replicas of this coordinator as this process knows them. `tick` is a monotonic clock in seconds."""

    def __init__(self, replica: str, store: ReplicaStore, tick: Callable[[], float]) -> None:
        """`replica`: the id of this one, new at each start."""
        self.id, self._store, self._tick = replica, store, tick
        self._own: Replica | None = None
        self._others: dict[str, Replica] = {}
        """By URL: a replica that was started again has the place of its former process."""
        self._answering_since: float | None = None
        self._changed = asyncio.Event()
        self._warned = False
        self.clash: str | None = None
        """The id of another live replica that claims this one's URL, or None."""
        self.on_change: Callable[[Sequence[Replica]], None] = lambda _: None
        """Called with the list after each change."""

    @property
    def listed(self) -> tuple[Replica, ...]:
        """The replicas that take jobs, by id: this one too, from `join` to `leave`."""
        own = () if self._own is None else (self._own,)
        return tuple(sorted((*own, *self._others.values()), key=lambda replica: replica.id)[:MAX_REPLICAS])

    @property
    def joined(self) -> bool:
        """Whether this replica is on the list: from `join` to `leave`."""
        return self._own is not None

    @property
    def answered(self) -> bool:
        """Whether the database took the last beat."""
        return self._answering_since is not None

    async def join(self, url: str) -> None:
        """Puts this replica on the list, with its own URL, and reads the others. Raises Unavailable."""
        own = Replica(self.id, url)
        live = await self._store.beat(own, GONE_SECONDS)
        self._own, self._answering_since = own, self._tick() - GONE_SECONDS
        self._read(own, live)
        self.on_change(self.listed)

    def look(self) -> None:
        """Has the list read now, since somebody said that it changed."""
        self._changed.set()

    async def run(self) -> None:
        """Beats until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._changed.wait()
                await asyncio.sleep(MIN_LOOK_SECONDS)
            self._changed.clear()
            await self.beat()

    async def beat(self) -> None:
        """Beats once, and follows the list. Does nothing before `join` and after `leave`."""
        own = self._own
        if own is None:
            return
        try:
            live = await self._store.beat(own, GONE_SECONDS)
        except Unavailable as error:
            self._answering_since = None
            if not self._warned:
                self._warned = True
                log.warning("replicas not read: the last known list stays", listed=len(self.listed), error=str(error))
            return
        if self._own is None:  # it left meanwhile: the row must not outlive this process
            await self._remove()
            return
        self._warned = False
        if self._answering_since is None:
            self._answering_since = self._tick()
        before = self.listed
        self._read(own, live)
        if self.listed != before:
            log.info("replicas", urls=[replica.url for replica in self.listed])
            self.on_change(self.listed)

    def _read(self, own: Replica, live: Sequence[Replica]) -> None:
        """Takes over the list. Right after the database was away, a replica that is missing in it stays."""
        others = {replica.url: replica for replica in live if replica.url != own.url}
        claims = [replica.id for replica in live if replica.url == own.url and replica.id != own.id]
        self.clash = claims[-1] if claims else None
        since = self._answering_since
        complete = since is None or self._tick() - since >= GONE_SECONDS
        self._others = others if complete else self._others | others

    async def leave(self) -> None:
        """Takes this replica off the list, so that clients and nodes go elsewhere, before it stops."""
        self._own = None
        await self._remove()
        self.on_change(self.listed)

    async def _remove(self) -> None:
        try:
            await self._store.remove(self.id)
        except Unavailable as error:
            log.warning("replica not removed from the list; it is gone in a few seconds", error=str(error))
