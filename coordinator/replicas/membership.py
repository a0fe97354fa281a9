"""The list of replicas: each writes a beat to the database once a second, and reads who else does.

A replica whose last beat is older than GONE_SECONDS by the database's clock is gone. While the database is away, the last known
list stays, and for as long again after it is back, since the others may not have had their turn.

Nodes are told of a replica as soon as it beats. Clients are told READY_SECONDS later, when nodes are connected to it; at once if
no other replica is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import structlog

from tallystick.protocol.errors import Unavailable
from tallystick.protocol.replicas import MAX_REPLICAS, Replica

log = structlog.get_logger()
BEAT_SECONDS = 1.0
GONE_SECONDS = 3.0
READY_SECONDS = 5.0
"""How long nodes have to connect to a new replica before clients use it."""
JOIN_ATTEMPTS = 5
"""Of a process that starts: its first beat also opens a connection, which takes long on a busy machine."""
MIN_LOOK_SECONDS = 0.05
"""Shortest time between two beats, however many notices say that the list changed."""


class Member(NamedTuple):
    """A replica as the database has it. `ready`: whether clients may use it."""

    replica: Replica
    ready: bool


class ReplicaStore(Protocol):
    """The table of replicas."""

    async def beat(self, own: tuple[Replica, bool], gone_seconds: float) -> list[tuple[Replica, bool]]:
        """Writes that `own` lives now. Returns the replicas whose last beat is at most `gone_seconds` old, the oldest beat first.

        Each has whether clients may use it.

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
        self._own: Member | None = None
        self._ready_at = 0.0
        self._others: dict[str, Member] = {}
        """By URL: a replica that was started again has the place of its former process."""
        self._answering_since: float | None = None
        self._changed = asyncio.Event()
        self._warned = False
        self.clash: str | None = None
        """The id of another live replica that claims this one's URL, or None."""
        self.on_change: Callable[[Sequence[Replica]], None] = lambda _: None
        """Called after each change with `known`."""

    @property
    def known(self) -> tuple[Replica, ...]:
        """The replicas that live, by id: this one too, from `join` to `leave`."""
        return _sorted(self._members())

    @property
    def listed(self) -> tuple[Replica, ...]:
        """Those of them that clients may use."""
        return _sorted(member for member in self._members() if member.ready)

    def _members(self) -> list[Member]:
        return [*(() if self._own is None else (self._own,)), *self._others.values()]

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
        self._ready_at = self._tick() + READY_SECONDS
        own = Member(Replica(self.id, url), ready=False)
        live = await self._first_beat(own)
        self._answering_since = self._tick() - GONE_SECONDS
        self._own = own
        self._read(own.replica, live)
        if self._own.ready:
            await self.beat()
        self.on_change(self.known)

    async def _first_beat(self, own: Member) -> list[tuple[Replica, bool]]:
        for _ in range(JOIN_ATTEMPTS - 1):
            with contextlib.suppress(Unavailable):
                return await self._store.beat(own, GONE_SECONDS)
        return await self._store.beat(own, GONE_SECONDS)

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
        if self._own is None:
            return
        own = self._own = Member(self._own.replica, self._own.ready or self._tick() >= self._ready_at)
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
        before = self.known, self.listed
        self._read(own.replica, live)
        if (self.known, self.listed) != before:
            log.info("replicas", urls=[replica.url for replica in self.listed], starting=len(self.known) - len(self.listed))
            self.on_change(self.known)

    def _read(self, own: Replica, rows: Sequence[tuple[Replica, bool]]) -> None:
        """Takes over the list. Right after the database was away, a replica that is missing in it stays."""
        live = [Member(*row) for row in rows]
        others = {member.replica.url: member for member in live if member.replica.url != own.url}
        claims = [member.replica.id for member in live if member.replica.url == own.url and member.replica.id != own.id]
        self.clash = claims[-1] if claims else None
        since = self._answering_since
        complete = since is None or self._tick() - since >= GONE_SECONDS
        self._others = others if complete else self._others | others
        alone = not any(member.ready for member in self._others.values())
        if self._own is not None and alone and not self._own.ready:
            self._own = Member(own, ready=True)
            self.look()

    async def leave(self) -> None:
        """Takes this replica off the list, so that clients and nodes go elsewhere, before it stops."""
        self._own = None
        await self._remove()
        self.on_change(self.known)

    async def _remove(self) -> None:
        try:
            await self._store.remove(self.id)
        except Unavailable as error:
            log.warning("replica not removed from the list; it is gone in a few seconds", error=str(error))


def _sorted(members: Iterable[Member]) -> tuple[Replica, ...]:
    replicas = sorted((member.replica for member in members), key=lambda replica: replica.id)
    return tuple(replicas[:MAX_REPLICAS])
