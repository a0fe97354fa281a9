"""An engine of the node with its job slots, its health and its recent load.

What an engine takes now follows from what it does: each job that begins, ends or is refused changes it, and is reported at once.
A look at the load that the engine reports can close the engine for a moment only, until one of its jobs ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType

from node.domain.slot_limiter import SlotLimiter
from node.domain.usage_meter import Throughput
from node.ports import Engine, EngineLoad
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.link import Capacity

LOAD_WEIGHT = 0.2
"""Weight of the newest sample in `load`. With a sample every ten seconds, `load` averages about a minute."""
MAX_WAITING = 64
LOOK_SECONDS = 2.0
"""How long a look at the engine's load counts."""


def _later(seconds: float, act: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_later(seconds, act)


class PooledEngine:
    """An engine and the jobs that it may have at once.

    `number`: its slot group on the link; `assigned`: jobs that it has or that wait for it; `up`: the last health check succeeded;
    `load`: recent share of the slots that were taken; `returns`: how often the engine came back after it was down; `throughput`:
    its measured speed.
    """

    def __init__(
        self,
        engine: Engine,
        slots: SlotLimiter | int,
        *,
        number: int = 0,
        on_change: Callable[[], None] = lambda: None,
        later: Callable[[float, Callable[[], None]], object] = _later,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is called when the capacity changed for another reason than a job's begin or end. `later` calls a function
        after some seconds; `now`: a monotonic clock in seconds.
        """
        self.engine, self.number = engine, number
        self.slot_limiter = slots if isinstance(slots, SlotLimiter) else SlotLimiter(slots)
        self.assigned = 0
        self.up = True
        self.load, self.returns = 0.0, 0
        self.throughput = Throughput()
        self._on_change, self._later, self._now = on_change, later, now
        self._others_waiting = self._look = 0
        self._pauses = 0

    @property
    def slots(self) -> int:
        """Number of jobs that may run at once, as currently known."""
        return self.slot_limiter.limit

    @property
    def queue(self) -> int:
        """Number of further jobs that may wait in the engine's own queue."""
        return self.slot_limiter.queue

    @property
    def free(self) -> int:
        """Number of further jobs that the engine could take now, into its slots or its queue."""
        if not self.up:
            return 0
        places = self.slot_limiter.places - self.assigned
        if self._others_waiting:
            places = min(places, self.queue - self._others_waiting)
        return max(0, places)

    @property
    def most_jobs(self) -> int:
        """Number of jobs that the node has at most for this engine, those included that wait here for a slot."""
        return 4 * self.slot_limiter.places + MAX_WAITING

    def check_room(self, model: str) -> None:
        """Raises Unavailable (`node_busy`) if the node accepts no job for this engine.

        Some jobs beyond those that the engine takes may wait here for a moment: several coordinators may give away the same slot,
        and a job that its coordinator gave up may still be ending.
        """
        if self.assigned >= self.most_jobs:
            text = f"the engine of {model!r} is full: it has {self.slots} slots and {self.assigned} jobs"
            raise Unavailable(Code.NODE_BUSY, text, fault=Fault.PROVIDER)

    def capacity(self, *, draining: bool = False) -> Capacity:
        """Returns what coordinators get to know of this engine. It has a slot, even if it takes no job for a moment."""
        if not self.up:
            return Capacity(0, 0)
        free, speed = 0 if draining else self.free, self.throughput
        return Capacity(free, max(1, self.slots), speed.tokens_per_second, speed.first_token_ms, self.queue)

    def job_ended(self) -> None:
        """Frees the slot of a job. The engine has room for another one now, whatever it said before."""
        self.assigned -= 1
        self._others_waiting = 0

    def refused(self, retry_after: float | None = None) -> None:
        """Notes that the engine refused a job of this node, which still holds its slot, because it is busy."""
        pause = self.slot_limiter.refused(self._now(), retry_after)
        self._pauses += 1
        self._try_more_after(pause, self._pauses)
        self._on_change()

    def _try_more_after(self, pause: float, number: int) -> None:
        def act() -> None:
            if number != self._pauses:  # refused again meanwhile
                return
            if self.slot_limiter.try_more():
                self._try_more_after(pause, number)
            self._on_change()

        self._later(pause, act)

    def observe(self, load: EngineLoad | None) -> None:
        """Takes what the engine says of its load at a health check; updates `load`.

        Requests that wait may be this node's own: those close the engine by their number alone, and an idle engine has none.
        """
        waiting = 0 if load is None else load.waiting
        if waiting > self.assigned:
            self._others_waiting = waiting - self.assigned
        else:
            self._others_waiting = int(load is not None and load.has_queue and not self.assigned)
        self._look += 1
        if self._others_waiting:
            self._forget_look_after(self._look)
            self._on_change()
        self.load += LOAD_WEIGHT * (min(1.0, self.assigned / max(1, self.slots)) - self.load)

    def _forget_look_after(self, number: int) -> None:
        def act() -> None:
            if number == self._look and self._others_waiting:
                self._others_waiting = 0
                self._on_change()

        self._later(LOOK_SECONDS, act)

    def slot(self, seconds: float) -> Slot:
        """Holds a slot for a block. Raises Unavailable (`node_busy`) if none becomes free within `seconds`.

        An engine that refuses the job meanwhile because it is busy is taken at its word at once.
        """
        return Slot(self, seconds)


class Slot:
    """See PooledEngine.slot."""

    def __init__(self, pool: PooledEngine, seconds: float) -> None:
        self._pool, self._seconds = pool, seconds

    async def __aenter__(self) -> None:
        limiter = self._pool.slot_limiter
        if limiter.try_acquire():
            return
        try:
            async with asyncio.timeout(self._seconds):
                await limiter.acquire()
        except TimeoutError:
            raise Unavailable(Code.NODE_BUSY, f"no slot was free within {self._seconds} s", fault=Fault.PROVIDER) from None

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if isinstance(error, Unavailable) and (error.code, error.fault) == (Code.NODE_BUSY, Fault.ENGINE):
                self._pool.refused(error.retry_after)
        finally:
            self._pool.slot_limiter.release()
