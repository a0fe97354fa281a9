"""The storefront: keeps what is offered in line with what the engines can do. An engine that stops answering has its asks
withdrawn, one that returns has them put back, and asks are signed afresh long before they expire.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from node.domain.offers import AskBook, Offer
from node.domain.upstream_models import UpstreamModel
from node.jobs.job import Pool
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import format_amount

log = structlog.get_logger()
MOST_PASSED = 3
"""Rounds in a row in which an engine that stays down is passed over."""
OfferModels = Callable[[str, tuple[UpstreamModel, ...]], Awaitable[Sequence[Offer]]]
"""What to sell of an engine: its name and the models that it says it has -> offers."""


class Storefront:
    """See the module's docstring. `changed` is called when the asks have changed; `suspicion` asks for a look now, since a job
    failed; `seconds` is how often engines are looked at anyway, `failures` how many looks in a row must fail for one to be down.
    """

    def __init__(
        self,
        *,
        book: AskBook,
        pools: Mapping[str, Pool],
        offers: OfferModels,
        changed: Callable[[], None],
        suspicion: asyncio.Event,
        seconds: float = 10.0,
        failures: int = 2,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._book, self._pools, self._offers, self._changed = book, pools, offers, changed
        self._seconds, self._failures, self._now = seconds, failures, now
        self._failed: Counter[str] = Counter()
        self._asleep: Counter[str] = Counter()
        self._sold: dict[str, Sequence[Offer]] = {}
        self._suspicion = suspicion

    async def run(self) -> None:
        """Looks at the engines until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._seconds):
                    await self._suspicion.wait()
            except TimeoutError:
                pass
            self._suspicion.clear()
            await self.look()

    async def look(self, *, first: bool = False) -> None:
        """Looks at the engines once, and brings the asks in line. On the `first` look one failure is enough; an engine that stays
        down is looked at less and less often.
        """
        due = [(name, pool) for name, pool in self._pools.items() if not self._sleeps(name)]
        await asyncio.gather(*(self._look_at(name, pool, first=first) for name, pool in due))
        self._sold = {name: sold for name, sold in self._sold.items() if name in self._pools}
        offers = [offer for name, sold in self._sold.items() if self._pools[name].up for offer in sold]
        if self._book.offer(offers, int(self._now())):
            log.info("asks changed", offers=[_describe(offer) for offer in self._book.offers])
            if len(self._book.offers) < len(offers):
                text = "more or larger asks than a coordinator takes of one node; the first are offered"
                log.warning(text, models=len(offers), offered=len(self._book.offers))
            self._changed()

    def _sleeps(self, name: str) -> bool:
        """Whether this round passes over an engine that is down."""
        if not self._asleep[name]:
            return False
        self._asleep[name] -= 1
        return True

    async def _look_at(self, name: str, pool: Pool, *, first: bool) -> None:
        try:
            models = await pool.engine.models()
        except Unavailable as error:
            self._failed[name] += 1
            if pool.up and (first or self._failed[name] >= self._failures):
                pool.up = False
                log.warning("engine down, its asks are withdrawn", engine=name, reason=str(error))
            if not pool.up:
                self._asleep[name] = min(max(0, self._failed[name] - self._failures), MOST_PASSED)
            return
        self._failed[name] = 0
        load = await pool.engine.load()
        pool.crowded = load is not None and load.crowded
        pool.looked()
        if not pool.up:
            log.info("engine back", engine=name)
        pool.up = True
        offers = await self._offers(name, models)
        if not offers and (name not in self._sold or self._sold[name]):
            log.warning("engine has no model to offer", engine=name)
        self._sold[name] = offers


def _describe(offer: Offer) -> str:
    prices = offer.prices
    return f"{offer.model}: {format_amount(prices.input)} in, {format_amount(prices.output)} out per million tokens"
