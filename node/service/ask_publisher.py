"""The storefront: keeps what is offered in line with what the engines can do. An engine that stops answering has its asks
withdrawn, one that returns has them put back, and asks are signed afresh long before they expire.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from node.domain.published_asks import Offer, PublishedAsks
from node.domain.upstream_models import UpstreamModel
from node.jobs.job import PooledEngine
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import format_amount

log = structlog.get_logger()
MOST_PASSED = 3
"""Rounds in a row in which an engine that stays down is passed over."""
MakeOffers = Callable[[str, tuple[UpstreamModel, ...]], Awaitable[Sequence[Offer]]]
"""What to sell of an engine: its name and the models that it says it has -> offers."""


class AskPublisher:
    """See the module's docstring. `changed` is called when the asks have changed; `suspicion` asks for a look now, since a job
    failed; `seconds` is how often engines are looked at anyway, `failures` how many looks in a row must fail for one to be down.
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
        self._check_interval, self._max_failures, self._now = check_interval, max_failures, now
        self._failed: Counter[str] = Counter()
        self._rounds_to_skip: Counter[str] = Counter()
        self._offers_by_engine: dict[str, Sequence[Offer]] = {}
        self._engine_suspected = engine_suspected

    async def run(self) -> None:
        """Looks at the engines until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._check_interval):
                    await self._engine_suspected.wait()
            except TimeoutError:
                pass
            self._engine_suspected.clear()
            await self.check_engines()

    async def check_engines(self, *, first: bool = False) -> None:
        """Looks at the engines once, and brings the asks in line. On the `first` look one failure is enough; an engine that stays
        down is looked at less and less often.
        """
        due = [(name, pool) for name, pool in self._engines.items() if not self._skips_round(name)]
        await asyncio.gather(*(self._check_engine(name, pool, first=first) for name, pool in due))
        self._offers_by_engine = {name: sold for name, sold in self._offers_by_engine.items() if name in self._engines}
        offers = [offer for name, sold in self._offers_by_engine.items() if self._engines[name].up for offer in sold]
        if self._asks.publish(offers, int(self._now())):
            log.info("asks changed", offers=[_describe(offer) for offer in self._asks.offers])
            if len(self._asks.offers) < len(offers):
                text = "more or larger asks than a coordinator takes of one node; the first are offered"
                log.warning(text, models=len(offers), offered=len(self._asks.offers))
            self._on_change()

    def _skips_round(self, name: str) -> bool:
        """Whether this round passes over an engine that is down."""
        if not self._rounds_to_skip[name]:
            return False
        self._rounds_to_skip[name] -= 1
        return True

    async def _check_engine(self, name: str, pool: PooledEngine, *, first: bool) -> None:
        try:
            models = await pool.engine.models()
        except Unavailable as error:
            self._failed[name] += 1
            if pool.up and (first or self._failed[name] >= self._max_failures):
                pool.up = False
                log.warning("engine down, its asks are withdrawn", engine=name, reason=str(error))
            if not pool.up:
                self._rounds_to_skip[name] = min(max(0, self._failed[name] - self._max_failures), MOST_PASSED)
            return
        self._failed[name] = 0
        load = await pool.engine.load()
        pool.has_queue = load is not None and load.has_queue
        pool.update_load()
        if not pool.up:
            log.info("engine back", engine=name)
        pool.up = True
        offers = await self._make_offers(name, models)
        if not offers and (name not in self._offers_by_engine or self._offers_by_engine[name]):
            log.warning("engine has no model to offer", engine=name)
        self._offers_by_engine[name] = offers


def _describe(offer: Offer) -> str:
    prices = offer.prices
    return f"{offer.model}: {format_amount(prices.input)} in, {format_amount(prices.output)} out per million tokens"
