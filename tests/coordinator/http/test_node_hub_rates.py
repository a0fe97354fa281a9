"""What a node's frames count as, against the rate of its address."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, cast

from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.resource_bounds import BEAT_ASKS
from coordinator.http.node_hub import NodeHub
from coordinator.http.node_link import NodeLink
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.link import Beat, Capacity
from tallystick.protocol.wire import Kind, dumps, pack_link
from tests.coordinator.harness import World, make_ask, person


class RecordingLimiter(RateLimiter):
    def __init__(self) -> None:
        super().__init__(IntakeLimits(), time.monotonic)
        self.counted: list[float] = []

    def count_frame(self, address: str, units: float) -> float:
        self.counted.append(units)
        return super().count_frame(address, units)


async def _accept_claim(*_: Any) -> None:
    raise NotImplementedError


async def test_a_report_of_capacity_counts_by_the_asks_that_it_moves(world: World) -> None:
    """A node with many asks reports its capacity at a price: each report may move all of them in the index."""
    limiter = RecordingLimiter()
    hub = NodeHub(world.market, world.bus, MemoryStore(), _accept_claim, rate_limiter=limiter)
    link = NodeLink(cast(Any, None), cast(Any, None), "192.0.2.1", Counter())
    beat = pack_link(Kind.BEAT, payload=dumps(Beat({0: Capacity(0, 1)}).to_json()))
    for count in (1, 2 * BEAT_ASKS):
        key = person(f"sells {count}")
        world.market.matchmaker.replace_asks(key.address, [make_ask(key, seq=seq) for seq in range(count)], Capacity(1, 1))
        await hub._handle(link, key.address, beat)
        (group,) = world.market.book.groups_of((key.address, None))
        assert group.capacity == Capacity(0, 1)
    assert limiter.counted == [1, 3]
