"""The engine pool: connections and slots of the configured engines, their identification, and the offers made from them.

The pool can be reconfigured while the node works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from urllib.parse import urlsplit

import structlog

from node.domain.published_asks import Offer, PublishedAsks
from node.domain.slot_limiter import SlotLimiter
from node.domain.tier_prices import TierPrices
from node.domain.upstream_models import UpstreamModel
from node.engines.discover import discover
from node.engines.kinds import slots_in_environment
from node.engines.openai_http import OpenAIEngine
from node.jobs.pooled_engine import PooledEngine
from node.service.config import EngineConfig
from node.service.engine_findings import EngineFindings
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.link import Capacities, Listing
from tallystick.protocol.tiers import Tiers
from tallystick.runtime.plaintext import is_loopback

log = structlog.get_logger()


class EnginePool:
    """See the module's docstring. `engines` is by label and changes when the pool is reconfigured. Call `close` when done.

    `on_change` is called when what an engine takes changed for another reason than a job's begin or end.
    """

    def __init__(
        self, engines: Sequence[EngineConfig], environment: Mapping[str, str], findings: EngineFindings | None = None
    ) -> None:
        self.engines: dict[str, PooledEngine] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._numbers = count()
        self._environment = environment
        self._configs: dict[str, EngineConfig] = {}
        self._adapters: dict[str, OpenAIEngine] = {}
        self._retired: list[OpenAIEngine] = []
        self._findings = EngineFindings() if findings is None else findings
        self._reported_slots: dict[str, int | None] = {}
        self._missing: set[str] = set()
        self.tier_prices = TierPrices(Tiers(()))
        self.reconfigure(engines)

    def url_of(self, label: str) -> str:
        """The configured URL of an engine; "" for one that was removed."""
        config = self._configs.get(label)
        return "" if config is None else config.url

    def reconfigure(self, engines: Sequence[EngineConfig]) -> None:
        """Replaces the engines; jobs under way end on their former engine. Raises BadMessage if the config is wrong; nothing
        changes then.
        """
        wanted = {engine.label: engine for engine in engines}
        settings = {label: engine.settings(self._environment) for label, engine in wanted.items()}
        for label in self._configs.keys() - wanted.keys():
            self._retired.append(self._adapters.pop(label))
            del self.engines[label]
            self._forget(label)
        for label, engine in wanted.items():
            former = self._configs.get(label)
            moved = former is None or former.settings(self._environment) != settings[label]
            if moved:
                if label in self._adapters:
                    self._retired.append(self._adapters[label])
                self._adapters[label] = OpenAIEngine(settings[label])
            if former is None or moved or former.probe != engine.probe:
                self._forget(label)
            slots = engine.slots_at_start(self._reported_slots.get(label))
            if label not in self.engines:
                limiter = SlotLimiter(slots, engine.max_slots, engine.queue_depth)
                number = next(self._numbers)
                self.engines[label] = PooledEngine(self._adapters[label], limiter, number=number, on_change=self._changed)
            else:
                self.engines[label].engine = self._adapters[label]
                if former is not None and former.limits != engine.limits:
                    self.engines[label].slot_limiter.reset(slots, engine.max_slots, engine.queue_depth)
                    self._changed()
        self._configs = wanted

    def _changed(self) -> None:
        self.on_change()

    def _forget(self, label: str) -> None:
        """Forgets what an engine reported and what its models can do."""
        self._findings.forget(label)
        self._reported_slots.pop(label, None)

    async def close(self) -> None:
        """Closes all connections."""
        for adapter in (*self._adapters.values(), *self._retired):
            await adapter.close()

    async def make_offers(self, name: str, models: tuple[UpstreamModel, ...]) -> Sequence[Offer]:
        """Returns the offers of an engine (ask_publisher.MakeOffers): the configured models, or all that the engine lists."""
        engine = self._configs.get(name)
        if engine is None:
            return ()
        listed = engine.models or tuple(engine.model_defaults(model.name) for model in models)
        findings = await self._findings.find(
            name,
            engine.url,
            engine.settings(self._environment).api_key,
            [model.name for model in listed],
            returns=self.engines[name].returns,
            may_probe=engine.probe,
        )
        if self._configs.get(name) is not engine:  # reconfigured meanwhile
            return await self.make_offers(name, models)
        identified = findings.engine
        on_this_machine = is_loopback(urlsplit(engine.url).hostname or "")
        known_here = slots_in_environment(identified.kind, self._environment) if on_this_machine else None
        self._set_slots(name, engine, identified.slots or known_here)
        contexts = {model.name: model.context_tokens for model in models}
        reported = {model.name: model.context_tokens for model in identified.models if model.context_tokens}
        contexts |= {name: tokens for name, tokens in reported.items() if name in contexts}
        missing = {model.name for model in listed if contexts and model.name not in contexts}
        if missing - self._missing:
            log.warning("the engine does not list configured models", engine=name, models=sorted(missing))
        self._missing |= missing
        when, load = datetime.now(UTC), self.engines[name].load
        offers: list[Offer] = []
        for model in listed:
            offer = engine.offer(
                model,
                contexts.get(model.name),
                identified.spec(model.name),
                when,
                load,
                capabilities=findings.capabilities.get(model.name),
            )
            priced = engine.priced_offers(offer, model, when, load)
            offers += *priced, *self.tier_prices.offers(priced[0], when, load)
        return offers

    def listing(self, asks: PublishedAsks, capacities: Capacities) -> Listing:
        """Returns the current asks with their slot groups, which are the engines, and the capacity of each."""
        offered = [(ask, self.engines[offer.engine].number) for ask, offer in asks.listed if offer.engine in self.engines]
        numbers = tuple(number for _, number in offered)
        return Listing(tuple(ask for ask, _ in offered), numbers, {number: capacities[number] for number in numbers})

    def _set_slots(self, name: str, engine: EngineConfig, reported: int | None) -> None:
        """Takes over the slots that the engine reports, unless the config sets them."""
        if reported is None or reported == self._reported_slots.get(name):
            return
        self._reported_slots[name] = reported
        if engine.slots is None:
            self.engines[name].slot_limiter.reset(engine.slots_at_start(reported), engine.max_slots, engine.queue_depth)
            self._changed()


async def discover_engines(environment: Mapping[str, str]) -> tuple[EngineConfig, ...]:
    """Returns the engine that OPENAI_BASE_URL names, else the engines on the default ports. Raises Unavailable if there is
    none.
    """
    named = environment.get("OPENAI_BASE_URL", "").strip()
    if named:
        return (EngineConfig(url=named, api_key=environment.get("OPENAI_API_KEY") or None),)
    engines = await discover(environment)
    for engine in engines:
        log.info("engine found", kind=engine.kind.value, url=engine.url, models=[model.name for model in engine.models])
    if not engines:
        raise Unavailable(
            Code.ENGINE_UNAVAILABLE,
            "no engine responds on the default ports; start one, set OPENAI_BASE_URL, or name one in the config: [[engines]] "
            "url = …",
            fault=Fault.ENGINE,
        )
    return tuple(EngineConfig(url=engine.url) for engine in engines)
