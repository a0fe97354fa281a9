"""The ask publisher: keeps the published asks in line with the engines' health and models.

It withdraws the asks of an engine that stops responding, publishes them again when the engine returns, and signs asks anew long
before they expire.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from node.domain.published_asks import Offer, PublishedAsks
from node.domain.upstream_models import UpstreamModel
from node.jobs.pooled_engine import PooledEngine
from node.service.engine_health import EngineHealth
from tallystick.protocol.types import format_amount

log = structlog.get_logger()
MakeOffers = Callable[[str, tuple[UpstreamModel, ...]], Awaitable[Sequence[Offer]]]
"""Makes the offers of an engine: its name and the models that it lists -> offers."""


class AskPublisher:
    """See the module's docstring.

    `on_change` is called when the asks changed. `engine_suspected` requests a check now, because a job failed. `check_interval`:
    seconds between checks; `max_failures`: consecutive failed checks after which an engine is down.
    """

    def __init__(
        self,
        *,
        asks: PublishedAsks,
        engines: Mapping[str, PooledEngine],
        make_offers: MakeOffers,
        on_change: Callable[[], None],
        engine_suspected: asyncio.Event,
        check_interval: float = 10.0,
        max_failures: int = 2,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._asks, self._engines, self._make_offers, self._on_change = asks, engines, make_offers, on_change
        self._check_interval, self._now = check_interval, now
        self._health = EngineHealth(engines, max_failures)
        self._offers_by_engine: dict[str, Sequence[Offer]] = {}
        self._engine_suspected = engine_suspected

    async def run(self) -> None:
        """Checks the engines until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._check_interval):
                    await self._engine_suspected.wait()
            except TimeoutError:
                pass
            self._engine_suspected.clear()
            await self.check_engines()

    async def check_engines(self, *, first: bool = False) -> None:
        """Checks the engines once and updates the asks; on the `first` check, one failure takes an engine down."""
        models = await self._health.check(first=first)
        await asyncio.gather(*(self._update_offers(name, listed) for name, listed in models.items()))
        self._offers_by_engine = {name: offers for name, offers in self._offers_by_engine.items() if name in self._engines}
        offers = [offer for name, offers in self._offers_by_engine.items() if self._engines[name].up for offer in offers]
        if self._asks.publish(offers, int(self._now())):
            log.info("asks changed", offers=[_describe(offer) for offer in self._asks.offers])
            if len(self._asks.offers) < len(offers):
                text = "too many or too large asks for one node; only the first ones are offered"
                log.warning(text, models=len(offers), offered=len(self._asks.offers))
            self._on_change()

    async def _update_offers(self, name: str, models: tuple[UpstreamModel, ...]) -> None:
        offers = await self._make_offers(name, models)
        if not offers and (name not in self._offers_by_engine or self._offers_by_engine[name]):
            log.warning("the engine lists no model that can be offered", engine=name)
        self._offers_by_engine[name] = offers


def _describe(offer: Offer) -> str:
    prices = offer.prices
    return f"{offer.model}: {format_amount(prices.input)} in, {format_amount(prices.output)} out per million tokens"
