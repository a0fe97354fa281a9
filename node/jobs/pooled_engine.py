"""An engine of the node with its job slots, its health and its recent load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from node.domain.slot_limiter import SlotLimiter
from node.ports import Engine, EngineLoad
from tallystick.protocol.errors import Code, Fault, Unavailable

LOAD_WEIGHT = 0.2
"""Weight of the newest sample in `load`. With a sample every ten seconds, `load` averages about a minute."""


class PooledEngine:
    """An engine and the jobs that it may run at once.

    `assigned`: jobs that run or wait; `up`: the last health check succeeded; `has_queue`: requests of others wait at the engine,
    as far as it said; `load`: recent share of the slots that were taken; `returns`: how often the engine came back after it was
    down.
    """

    def __init__(self, engine: Engine, slots: SlotLimiter | int) -> None:
        self.engine = engine
        self.slot_limiter = slots if isinstance(slots, SlotLimiter) else SlotLimiter(slots)
        self.assigned = 0
        self.up, self.has_queue = True, False
        self.load, self.returns = 0.0, 0

    @property
    def slots(self) -> int:
        """Number of jobs that may run at once, as currently known."""
        return self.slot_limiter.limit

    @property
    def free(self) -> int:
        """Number of further jobs that the engine could take now."""
        return max(0, self.slots - self.assigned) if self.up and not self.has_queue else 0

    def job_ended(self) -> None:
        """Frees the slot of a job. The engine has room for another one now, whatever it said before."""
        self.assigned -= 1
        self.has_queue = False

    def observe(self, load: EngineLoad | None) -> None:
        """Takes what the engine says of its load at a health check; updates `load`.

        Requests that wait may be this node's own: those close the node by their number alone, and an idle engine has none.
        """
        others_wait = load is not None and load.waiting > self.assigned
        self.has_queue = others_wait or (load is not None and load.has_queue and not self.assigned)
        self.load += LOAD_WEIGHT * (min(1.0, self.assigned / self.slots) - self.load)

    @asynccontextmanager
    async def slot(self, seconds: float) -> AsyncIterator[None]:
        """Holds a slot. Raises Unavailable (`node_busy`) if none becomes free within `seconds`."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(seconds):
                    await held.enter_async_context(self.slot_limiter.hold())
            except TimeoutError:
                raise Unavailable(Code.NODE_BUSY, f"no slot was free within {seconds} s", fault=Fault.PROVIDER) from None
            yield
