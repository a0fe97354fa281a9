"""Turns at the coordinator: if it has as many jobs of this payer or address as it takes, further ones wait here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tallystick.protocol.errors import Code, Fault, Unavailable

T = TypeVar("T")
_ALL = 1 << 62
POLL_SECONDS = 1.0
"""Between two attempts while no job of this client ends, if the coordinator does not say when to come again."""


class AdmissionTurns:
    """Lets submissions wait for their turn, first come, first served. `clock`: a monotonic clock in seconds; `most`: how many may
    wait.

    Only the first of them tries, whenever a job of this client ends, so the others cost neither orders nor requests.
    """

    def __init__(self, clock: Callable[[], float], most: int) -> None:
        self._clock, self._most = clock, most
        self._turn, self._ended = asyncio.Lock(), asyncio.Event()
        self._room = 0
        """Jobs of this client that ended and whose places nobody has tried to take yet."""
        self.waiting = 0
        """Submissions that wait."""

    def job_ended(self) -> None:
        """Lets the first submission that waits try again."""
        if self.waiting:
            self._room += 1
            self._ended.set()

    def close(self) -> None:
        """Lets all that wait try now, one after the other."""
        self._room = _ALL
        self._ended.set()

    async def take(self, submit: Callable[[int], Awaitable[T]], wait: int) -> T:
        """Returns the result of `submit`, which gets the seconds that are left of `wait`. Raises what it raises.

        It is called again while the coordinator takes no more of this client, until `wait` seconds are over.
        """
        until, full = self._clock() + wait, None
        if not self.waiting:
            try:
                return await submit(wait)
            except Unavailable as error:
                if not wait or not _is_full(error):
                    raise
                full = error
        if self.waiting >= self._most:
            text = f"{self.waiting} requests wait until the coordinator takes more of this client, the most (max_jobs)"
            raise Unavailable(Code.CLIENT_BUSY, f"{text}; send it again later", fault=Fault.CLIENT)
        self._room = self._room if self.waiting else 1
        self.waiting += 1
        try:
            async with asyncio.timeout(max(0.0, until - self._clock())):
                await self._turn.acquire()
        except TimeoutError:
            text = f"the coordinator took no more of this client's requests within {wait} s (wait_seconds); send it again later"
            raise full or Unavailable(Code.CLIENT_BUSY, text, fault=Fault.CLIENT) from None
        else:
            return await self._take_in_turn(submit, until, full)
        finally:
            self.waiting -= 1

    async def _take_in_turn(self, submit: Callable[[int], Awaitable[T]], until: float, full: Unavailable | None) -> T:
        try:
            while True:
                pause = POLL_SECONDS if full is None or full.retry_after is None else full.retry_after
                await self._until_room(min(pause, until - self._clock()))
                try:
                    return await submit(max(0, int(until - self._clock())))
                except Unavailable as error:
                    if not _is_full(error) or self._clock() >= until:
                        raise
                    full = error
        finally:
            self._turn.release()

    async def _until_room(self, seconds: float) -> None:
        """Waits until a job of this client has ended, for some seconds at most: other clients of this payer end some too."""
        if not self._room:
            self._ended.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, seconds)):
                    await self._ended.wait()
        self._room = max(0, self._room - 1)


def _is_full(error: Unavailable) -> bool:
    """Whether the coordinator has as much of this client as it takes."""
    return error.code is Code.RATE_LIMITED and error.fault is Fault.CLIENT
