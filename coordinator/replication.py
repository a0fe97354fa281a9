"""Wires a replica of a coordinator: the list in the database, the notices over NATS, and the health of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from coordinator.bus.nats_address import parse_nats_address
from coordinator.bus.nats_bus import NatsBus
from coordinator.config import CoordinatorConfig
from coordinator.domain.endpoints import endpoints_of
from coordinator.http.node_hub import NodeHub
from coordinator.http.replica_view import Alone, ReplicaView
from coordinator.jobs.market import Market
from coordinator.jobs.market_load import MarketLoad
from coordinator.jobs.payer_totals import LoadTotals
from coordinator.replicas.membership import Membership
from coordinator.replicas.replica_set import ReplicaSet
from coordinator.storage.replica_store import SqlReplicaStore
from tallystick.runtime.health_monitor import Check

Loops = tuple[Callable[[], Coroutine[Any, Any, None]], ...]


class Replication:
    """The part of one process among the replicas. Of a lone coordinator (`replica` is empty) it does nothing."""

    def __init__(self, config: CoordinatorConfig, replica: str, market: Market, load_totals: LoadTotals) -> None:
        """`replica`: the id of this process, new at each start."""
        self._config = config
        self.load = MarketLoad(market, market.matchmaker.queue, time.monotonic)
        self._store: SqlReplicaStore | None = None
        self._set: ReplicaSet | None = None
        if config.bus is None:
            return
        self._store = SqlReplicaStore(config.db)
        bus = NatsBus(parse_nats_address(config.bus, "config: bus"), f"tallystick.{market.address.lower()}")
        membership = Membership(replica, self._store, time.monotonic)
        self._set = ReplicaSet(membership, bus, market, load_totals, time.monotonic, load=self.load)

    @property
    def view(self) -> ReplicaView:
        """The replicas for the API."""
        return self._set or Alone()

    @property
    def loops(self) -> Loops:
        """What runs in the background."""
        return self._set.loops if self._set else ()

    @property
    def checks(self) -> Mapping[str, Check]:
        """The health checks, by name."""
        return {"bus": self._set.check_bus, "replicas": self._set.check_replicas} if self._set else {}

    async def join(self, hub: NodeHub, port: int) -> None:
        """Puts this process, which serves on `port` by now, on the list of replicas. Raises Unavailable."""
        if self._set is None:
            return
        url = self._config.own_url(port)
        hub.add_endpoints(endpoints_of((url,)))
        self._set.membership.on_change = lambda listed: hub.set_replicas([replica.url for replica in listed])
        await self._set.join(url)

    async def leave(self) -> None:
        """Takes this process off the list, so that clients and nodes go to other replicas."""
        if self._set is not None:
            await self._set.leave()

    async def close(self) -> None:
        """Closes the connection of the list."""
        if self._store is not None:
            await self._store.close()
