"""Shares the gateway's running jobs among its API keys, so that a flood of one key keeps no other key waiting.

While slots are free, any key takes them. Then the next free slot goes to the waiting key that has used them for the shortest time
for its weight, and of equal ones to the one served longest ago. A key that comes back begins where the others are, so it cannot
save up time. So it waits for one job to end, however many requests another key has (as in Linux' CFS).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tallystick.client.config import ClientConfig
from tallystick.protocol.errors import Code, Fault, Unavailable

OWN_KEY_LABEL = ""
"""Stands for the gateway's own key, and for its pages."""


@dataclass(slots=True)
class KeyShare:
    """The jobs of one key now. `refused`: requests of which too many waited, or for too long.

    `used`: seconds of slots for each unit of its weight. `served`: the number of the last slot that it was given.
    """

    weight: int
    running: int = 0
    refused: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    used: float = 0.0
    served: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        """The waiting key with the lowest gets the next slot."""
        return self.used, self.served


class KeyShares:
    """`slots` running jobs of all keys together, and as many waiting requests of each. `weights`: of each key, by its label.

    Without keys there is nobody to share with, and nothing is counted. `clock`: monotonic seconds. For one event loop.
    """

    def __init__(self, slots: int, weights: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._slots, self._free, self._given = slots, slots, 0
        self._clock, self._counted_at = clock, clock()
        self.shares = {label: KeyShare(weight) for label, weight in weights.items()}

    @classmethod
    def of(cls, config: ClientConfig) -> KeyShares:
        """Those of the config's [[api_keys]]; the gateway's own key weighs 1."""
        weights = {key.label: key.weight for key in config.api_keys}
        return cls(config.key_slots, {OWN_KEY_LABEL: 1, **weights} if weights else {})

    @asynccontextmanager
    async def slot(self, label: str, wait: int) -> AsyncIterator[int]:
        """Holds a slot, for which it waits up to `wait` seconds. Yields how many of them are left. Raises Unavailable."""
        if not self.shares:
            yield wait
            return
        began, share = self._clock(), self.shares[label]
        await self._acquire(share, label, wait)
        try:
            yield max(0, wait - int(self._clock() - began))
        finally:
            self._release(share)

    async def _acquire(self, share: KeyShare, label: str, wait: int) -> None:
        self._count()
        if not (share.running or share.waiting):
            share.used = max(share.used, min((other.used for other in self.shares.values() if other.running), default=0.0))
        if self._free:
            self._free -= 1
            self._give(share)
            return
        if len(share.waiting) >= self._slots:
            share.refused += 1
            raise self._full(label, f"{len(share.waiting)} more of its requests wait, the maximum")
        granted = asyncio.get_running_loop().create_future()
        share.waiting.append(granted)
        try:
            async with asyncio.timeout(wait):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self._release(share)
            elif granted in share.waiting:
                share.waiting.remove(granted)
            if isinstance(error, TimeoutError):
                share.refused += 1
                raise self._full(label, f"none became free within {wait} s (wait)") from None
            raise

    def _release(self, share: KeyShare) -> None:
        self._count()
        share.running -= 1
        for other in self.shares.values():  # a request that gave up may not have had its turn to leave
            while other.waiting and other.waiting[0].done():
                other.waiting.popleft()
        following = min((other for other in self.shares.values() if other.waiting), key=lambda other: other.rank, default=None)
        if following is None:
            self._free += 1
            return
        granted = following.waiting.popleft()
        self._give(following)
        granted.set_result(None)

    def _give(self, share: KeyShare) -> None:
        self._given += 1
        share.served = self._given
        share.running += 1

    def _count(self) -> None:
        """Counts the time that has passed since the last change."""
        now = self._clock()
        for share in self.shares.values():
            share.used += share.running * (now - self._counted_at) / share.weight
        self._counted_at = now

    def _full(self, label: str, reason: str) -> Unavailable:
        name = f"the API key {label!r}" if label else "the gateway's own key"
        text = f"{name}: all {self._slots} jobs of this gateway (key_slots) are taken, and {reason}; send the request again later"
        return Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT)


class KeyShareCollector(Collector):
    """The metrics of shares; `label` is empty for the gateway's own key."""

    def __init__(self, prefix: str, shares: KeyShares) -> None:
        self._prefix, self._shares = prefix, shares

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        running = GaugeMetricFamily(f"{self._prefix}_key_jobs", "Running jobs of an API key", labels=["label"])
        waiting = GaugeMetricFamily(f"{self._prefix}_key_waiting", "Waiting requests of an API key", labels=["label"])
        text = "Requests of an API key that got no slot, because too many of it waited, or for too long"
        refused = CounterMetricFamily(f"{self._prefix}_key_refused", text, labels=["label"])
        for label, share in self._shares.shares.items():
            running.add_metric([label], share.running)
            waiting.add_metric([label], len(share.waiting))
            refused.add_metric([label], share.refused)
        yield from (running, waiting, refused)
