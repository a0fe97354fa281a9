"""What a node finds out about its engines, and when it asks again."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from node.domain.upstream_models import UpstreamModel
from node.engines.api_key import Key
from node.engines.capabilities import Capabilities
from node.engines.discover import DiscoveredEngine
from node.engines.kinds import EngineKind
from node.service.config import EngineConfig, ModelConfig
from node.service.engine_findings import CHECKS_BETWEEN_INSPECTIONS, MAX_GENERATED, MAX_PROBED, RETRY_CHECKS, EngineFindings
from node.service.engine_pool import EnginePool
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.messages import Spec
from tallystick.protocol.routes import EMBEDDINGS, MESSAGES, RESPONSES

URL = "http://127.0.0.1:1"
FOUND = Capabilities(True, True, "usage", ("tools", RESPONSES, f"-{EMBEDDINGS}"))


class Site:
    """An engine and a pool that finds it, with every question that was asked."""

    def __init__(self, *models: str, kind: EngineKind = EngineKind.VLLM, slots: int | None = 2, **settings: object) -> None:
        self.engine = DiscoveredEngine(URL, kind, "1", tuple(map(UpstreamModel, models or ("m",))), slots=slots)
        self.fault: Unavailable | None = None
        self.capabilities = FOUND
        self.inspections = 0
        self.probes: list[tuple[str, bool]] = []
        config = EngineConfig(url=URL, name="e", **settings)  # type: ignore[arg-type]
        self.pool = EnginePool([config], {}, EngineFindings(self._inspect, self._probe))

    async def _inspect(self, _url: str, _key: Key) -> DiscoveredEngine:
        self.inspections += 1
        if self.fault:
            raise self.fault
        return self.engine

    async def _probe(self, _engine: DiscoveredEngine, model: str, generate: bool) -> Capabilities:
        self.probes.append((model, generate))
        return self.capabilities

    async def features(self) -> list[tuple[str, ...]]:
        """The features of the offers but for evidence, after one check."""
        offers = await self.pool.make_offers("e", self.engine.models)
        return [tuple(name for name in offer.spec.features if name.removeprefix("-") != "evidence") for offer in offers]


async def test_what_the_probe_found_is_sold_unasked() -> None:
    """Features, routes and slots come from the engine without any setting; it is asked once."""
    site = Site()
    for _ in range(3):
        assert await site.features() == [FOUND.features]
    assert site.pool.engines["e"].slots == 2
    assert (site.inspections, site.probes) == (1, [("m", True)])


async def test_settings_win() -> None:
    """A feature that the settings name, present or absent, replaces what the probe found; and so do slots."""
    site = Site(
        slots=2,
        spec=Spec(features=(f"-{RESPONSES}", "/v1/rerank")),
        models=(ModelConfig(name="m", spec=Spec(features=(EMBEDDINGS,))),),
    )
    site.pool.reconfigure([replace(config, slots=7) for config in site.pool._configs.values()])
    assert [set(features) for features in await site.features()] == [{"tools", f"-{RESPONSES}", "/v1/rerank", EMBEDDINGS}]
    assert site.pool.engines["e"].slots == 7


async def test_no_probe_if_the_settings_say_so() -> None:
    """With `probe = false`, the engine is identified and not probed."""
    site = Site(probe=False)
    assert await site.features() == [()]
    assert (site.probes, site.pool.engines["e"].slots) == ([], 2)


async def test_slots_of_an_engine_that_tells_none() -> None:
    """It has four, and a limit for learning bounds the slots to begin with."""
    site = Site(slots=None)
    await site.features()
    assert site.pool.engines["e"].slots == 4
    site = Site(slots=64, max_slots=8)
    await site.features()
    assert site.pool.engines["e"].slots == 8


async def test_an_engine_that_comes_back_is_probed_again() -> None:
    """It may have other routes and slots after a restart."""
    site = Site()
    await site.features()
    site.capabilities, site.engine = replace(FOUND, features=(MESSAGES,)), replace(site.engine, slots=5)
    assert await site.features() == [FOUND.features]
    site.pool.engines["e"].returns += 1
    assert await site.features() == [(MESSAGES,)]
    assert site.pool.engines["e"].slots == 5


async def test_another_model_is_probed() -> None:
    """The probe follows the models that the engine lists."""
    site = Site()
    await site.features()
    site.engine = replace(site.engine, models=(UpstreamModel("m"), UpstreamModel("n")))
    await site.features()
    assert site.probes == [("m", True), ("m", True), ("n", True)]


async def test_an_unnoticed_restart() -> None:
    """Now and then the engine is inspected again; only if it differs is it probed again."""
    site = Site()
    for _ in range(CHECKS_BETWEEN_INSPECTIONS + 2):
        await site.features()
    assert (site.inspections, len(site.probes)) == (2, 1)
    site.engine = replace(site.engine, version="2")
    for _ in range(CHECKS_BETWEEN_INSPECTIONS + 2):
        await site.features()
    assert (site.inspections, len(site.probes)) == (3, 2)


async def test_an_engine_without_a_model_list() -> None:
    """An engine that cannot be identified is probed all the same, and inspected again soon."""
    site = Site(models=(ModelConfig(name="m"),))
    site.fault = Unavailable(Code.ENGINE_UNAVAILABLE, "no list", fault=Fault.ENGINE)
    assert await site.features() == [FOUND.features]
    site.fault = None
    for _ in range(RETRY_CHECKS + 1):
        await site.features()
    assert site.inspections == 2
    site.fault = Unavailable(Code.ENGINE_UNAVAILABLE, "busy", fault=Fault.ENGINE)
    for _ in range(CHECKS_BETWEEN_INSPECTIONS + 2):
        assert await site.features() == [FOUND.features]


async def test_many_models() -> None:
    """More models than a few are not asked to generate; of very many, one stands for all, and only for routes that all share."""
    site = Site(*(f"m{i}" for i in range(MAX_GENERATED + 1)))
    await site.features()
    assert [generate for _, generate in site.probes] == [False] * (MAX_GENERATED + 1)
    site = Site(*(f"m{i}" for i in range(MAX_PROBED + 1)))
    assert await site.features() == [(RESPONSES,)] * (MAX_PROBED + 1)
    assert site.probes == [("m0", False)]


async def test_a_reload_during_a_probe() -> None:
    """Offers follow the settings that apply when the probe ends."""
    site = Site()
    started, go_on = asyncio.Event(), asyncio.Event()
    inspect = site._inspect

    async def slow(url: str, key: Key) -> DiscoveredEngine:
        started.set()
        await go_on.wait()
        return await inspect(url, key)

    site.pool._findings._inspect = slow
    checking = asyncio.create_task(site.features())
    await started.wait()
    site.pool.reconfigure([replace(config, spec=Spec(region="eu")) for config in site.pool._configs.values()])
    go_on.set()
    await checking
    offers = await site.pool.make_offers("e", site.engine.models)
    assert [offer.spec.region for offer in offers] == ["eu"]
