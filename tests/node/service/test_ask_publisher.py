from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

from structlog.testing import capture_logs

from node.domain.published_asks import Offer
from node.domain.upstream_models import UpstreamModel
from node.jobs.pooled_engine import PooledEngine
from node.service.ask_publisher import AskPublisher
from node.testing.memory import ScriptedEngine
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.link import MAX_ASKS, MAX_NODE_ASK_BYTES, read_asks
from tallystick.protocol.wire import dumps
from tests.node.harness import NOW, OFFER, make_asks

DOWN = Unavailable(Code.ENGINE_UNAVAILABLE, "connection refused", fault=Fault.ENGINE)


class World:
    """Two engines with a model each, with a clock that the test sets."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.engines = {name: ScriptedEngine(models=[f"model-{name}"]) for name in ("a", "b")}
        self.pooled = {name: PooledEngine(engine, 1) for name, engine in self.engines.items()}
        self.asks = make_asks()
        self.asks.publish([], NOW)
        self.now = NOW
        self.changes = 0
        self.changed, self.suspicion = asyncio.Event(), asyncio.Event()
        self.publisher = AskPublisher(
            asks=self.asks,
            engines=self.pooled,
            make_offers=self._offers,
            on_change=self._changed,
            engine_suspected=self.suspicion,
            check_interval=seconds,
            now=lambda: self.now,
        )

    async def _offers(self, name: str, models: tuple[UpstreamModel, ...]) -> Sequence[Offer]:
        return [replace(OFFER, model=model.name, engine=name, upstream=model.name) for model in models]

    def _changed(self) -> None:
        self.changes += 1
        self.changed.set()

    @property
    def sold(self) -> list[str]:
        """The models of the current asks."""
        return [ask.message.model for ask in self.asks.current]


async def test_every_listed_model_is_offered() -> None:
    """Every model of every engine that responds has an ask; checking again changes nothing."""
    world = World()
    await world.publisher.check_engines(first=True)
    assert world.sold == ["model-a", "model-b"]
    await world.publisher.check_engines()
    assert world.changes == 1


async def test_asks_follow_an_engine_down_and_up() -> None:
    """An engine that fails twice has its asks withdrawn and its slots hidden; both return with the engine."""
    world = World()
    await world.publisher.check_engines(first=True)
    world.engines["a"].fault = DOWN
    await world.publisher.check_engines()
    assert world.sold == ["model-a", "model-b"]
    with capture_logs() as logs:
        await world.publisher.check_engines()
    assert (world.sold, world.pooled["a"].up) == (["model-b"], False)
    assert any(entry["event"] == "engine down; its asks are withdrawn" for entry in logs)
    world.engines["a"].fault = None
    await world.publisher.check_engines()
    assert (world.sold, world.pooled["a"].up) == (["model-a", "model-b"], True)


async def test_an_engine_that_stays_down_is_checked_less_often() -> None:
    """A failed engine is checked again after one, two and three rounds, and then every fourth; other engines in every round."""
    world = World()
    await world.publisher.check_engines(first=True)
    world.engines["a"].fault = DOWN
    asked = [world.engines["a"].checks]
    for _ in range(20):
        await world.publisher.check_engines()
        asked.append(world.engines["a"].checks)
    assert [later - before for before, later in itertools.pairwise(asked)] == [
        1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1
    ]  # fmt: skip
    assert world.engines["b"].checks == 21


async def test_an_engine_that_is_down_at_the_start() -> None:
    """An engine that does not respond at the start is not offered, and is as soon as it responds."""
    world = World()
    world.engines["b"].fault = DOWN
    await world.publisher.check_engines(first=True)
    assert world.sold == ["model-a"]
    world.engines["b"].fault = None
    await world.publisher.check_engines()
    assert world.sold == ["model-a", "model-b"]


async def test_new_models_are_offered() -> None:
    """A model that an engine loads later gets an ask; a removed one loses it."""
    world = World()
    await world.publisher.check_engines(first=True)
    world.engines["a"].model_names = ["another"]
    await world.publisher.check_engines()
    assert world.sold == ["another", "model-b"]


async def test_asks_are_renewed_in_time() -> None:
    """Past half of their validity, asks are signed anew and announced."""
    world = World()
    await world.publisher.check_engines(first=True)
    world.now += 1_800
    await world.publisher.check_engines()
    assert world.changes == 2
    assert all(ask.message.valid_until == NOW + 5_400 for ask in world.asks.current)


async def test_a_failed_job_triggers_a_check() -> None:
    """When a job fails on an engine, the engine is checked at once."""
    world = World()
    await world.publisher.check_engines(first=True)
    task = asyncio.create_task(world.publisher.run())
    world.engines["a"].model_names = ["another"]
    world.changed.clear()
    world.suspicion.set()
    async with asyncio.timeout(60):
        await world.changed.wait()
    assert world.sold == ["another", "model-b"]
    task.cancel()


async def test_run_notices_changes() -> None:
    """`run` notices changes."""
    world = World(seconds=0.01)
    task = asyncio.create_task(world.publisher.run())
    async with asyncio.timeout(60):
        await world.changed.wait()
    assert world.sold == ["model-a", "model-b"]
    task.cancel()


async def test_the_number_of_asks_is_limited() -> None:
    """An engine with hundreds of models does not make HELLO unreadable: the first asks that fit are offered."""
    world = World()
    world.engines["a"].model_names = [f"m{number}" for number in range(MAX_ASKS + 10)]
    await world.publisher.check_engines(first=True)
    published = [ask.to_json() for ask in world.asks.current]
    assert world.sold == [f"m{number}" for number in range(len(published))]
    assert MAX_NODE_ASK_BYTES - 2 * len(dumps(published[0])) < len(dumps(published)) <= MAX_NODE_ASK_BYTES
    assert read_asks(published)
    await world.publisher.check_engines()
    assert [ask.to_json() for ask in world.asks.current] == published
