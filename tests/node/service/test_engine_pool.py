"""The engine pool: each engine has slots of its own, and a number that it keeps while it is in the config."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.domain.published_asks import PublishedAsks
from node.domain.upstream_models import UpstreamModel
from node.engines.discover import DiscoveredEngine
from node.engines.kinds import EngineKind
from node.service.config import EngineConfig
from node.service.engine_findings import EngineFindings
from node.service.engine_pool import EnginePool
from tallystick.protocol.link import Capacity, Listing
from tests.node.harness import NOW, OFFER, make_asks

FIRST = EngineConfig(url="http://127.0.0.1:1", name="first", slots=2, probe=False)
SECOND = EngineConfig(url="http://127.0.0.1:2", name="second", slots=1, queue_depth=3, probe=False)


def _capacities(pool: EnginePool) -> dict[int, Capacity]:
    return {engine.number: engine.capacity() for engine in pool.engines.values()}


def _asks(*engines: str) -> PublishedAsks:
    asks = make_asks()
    asks.publish([replace(OFFER, model=f"{engine} {number}", engine=engine) for engine in engines for number in range(2)], NOW)
    return asks


async def test_asks_share_the_slots_of_their_engine() -> None:
    """The listing has one slot group for each engine with asks, whose number stays when other engines come and go."""
    pool, reports = EnginePool([FIRST, SECOND], {}), list[int]()
    pool.on_change = lambda: reports.append(1)
    asks = _asks("first", "second")
    listing = pool.listing(asks, _capacities(pool))
    assert (listing.groups, dict(listing.capacities)) == ((0, 0, 1, 1), {0: Capacity(2, 2), 1: Capacity(4, 1, queue=3)})
    assert Listing.from_json(listing.to_json()).groups == listing.groups
    pool.engines["second"].assigned = 1
    pool.reconfigure([replace(SECOND, queue_depth=0), replace(FIRST, name="third")])
    listing = pool.listing(asks, _capacities(pool))
    assert (len(listing.asks), listing.groups, dict(listing.capacities)) == (2, (1, 1), {1: Capacity(0, 1)})
    assert (pool.engines["third"].number, reports) == (2, [1])
    await pool.close()


@pytest.mark.parametrize(
    ("url", "reported", "slots"),
    [("http://127.0.0.1:1", None, 3), ("http://localhost:1", 5, 5), ("http://10.0.0.1:1", None, 4)],
)
async def test_slots_follow_what_the_engine_says(url: str, reported: int | None, slots: int) -> None:
    """What the engine reports counts; else, on this machine, the variable that sets it; else four."""

    async def inspect(_url: str, _key: object) -> DiscoveredEngine:
        return DiscoveredEngine(url, EngineKind.OLLAMA, "0.20", (), None, reported)

    reports = list[int]()
    config = EngineConfig(url=url, name="ollama", probe=False, queue_depth=1)
    pool = EnginePool([config], {"OLLAMA_NUM_PARALLEL": "3"}, EngineFindings(inspect))
    pool.on_change = lambda: reports.append(1)
    for _ in range(2):
        await pool.make_offers("ollama", (UpstreamModel("m"),))
    assert pool.engines["ollama"].capacity() == Capacity(slots + 1, slots, queue=1)
    assert len(reports) == (slots != 4)
    await pool.close()
