"""Many jobs at once: a bounded number under way, each tried again where that can help, no result lost when another fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result, require_success
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Amount, JobId

Body = bytes | Mapping[str, Any]
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds before the first retry, which double up to the longest."""


@dataclass(frozen=True, slots=True)
class Done:
    """How one request ended: with a `result`, or with the `error` of its last try. `index` counts the requests from 0."""

    index: int
    request: Body = field(repr=False)
    tries: int
    result: Result | None = None
    error: TallyError | None = None

    def unwrap(self) -> Result:
        """The result. Raises the error where there is one."""
        if self.result is None:
            raise self.error or RuntimeError("neither a result nor an error")
        return self.result


@dataclass(frozen=True, slots=True)
class Manner:
    """How to go about it. `retries` are per request and wait `first_wait` seconds at first. Raises BadMessage."""

    at_once: int = 16
    ordered: bool = True
    retries: int = 2
    first_wait: float = FIRST_WAIT

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise BadMessage("at_once: expected at least 1")
        if self.retries < 0:
            raise BadMessage("retries: expected at least 0")


class Many:
    """One run over some requests. `submit` places one; `at_stake` tells what a failed one may still cost (base units): where that
    is something, it is not tried again. `random` gives bytes, which spread the retries; while `stopping`, nothing new begins.
    """

    def __init__(
        self,
        submit: Callable[[Body], Awaitable[Job]],
        at_stake: Callable[[JobId], Awaitable[Amount]],
        manner: Manner,
        random: Callable[[int], bytes],
        stopping: Callable[[], bool],
    ) -> None:
        self._submit, self._at_stake = submit, at_stake
        self._manner, self._random, self._stopping = manner, random, stopping
        self._slots = asyncio.Semaphore(manner.at_once)
        self._room = asyncio.Semaphore(2 * manner.at_once)  # those that ended and were not taken yet are bounded, too
        self._running: set[asyncio.Task[Done]] = set()
        self._ready: asyncio.Queue[asyncio.Task[Done] | None] = asyncio.Queue()

    async def run(self, requests: Iterable[Body] | AsyncIterable[Body]) -> AsyncGenerator[Done, None]:
        """Each request's end. Raises what `requests` raises, once all that it had given has ended."""
        feeder = asyncio.create_task(self._feed(requests))
        try:
            while (task := await self._ready.get()) is not None:
                done = await task
                self._room.release()
                yield done
            await feeder
        finally:
            left = (feeder, *self._running)
            for each in left:
                each.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _feed(self, requests: Iterable[Body] | AsyncIterable[Body]) -> None:
        source, index = _each(requests), 0
        try:
            while not self._stopping():
                await self._room.acquire()
                await self._slots.acquire()
                request = await anext(source, None)
                if request is None:
                    return
                task = asyncio.create_task(self._one(index, request))
                self._running.add(task)
                task.add_done_callback(self._ended)
                if self._manner.ordered:
                    self._ready.put_nowait(task)
                index += 1
        finally:
            if self._running and not self._manner.ordered:
                await asyncio.wait(self._running)
            self._ready.put_nowait(None)
            await source.aclose()

    def _ended(self, task: asyncio.Task[Done]) -> None:
        self._running.discard(task)
        self._slots.release()
        if not self._manner.ordered:
            self._ready.put_nowait(task)

    async def _one(self, index: int, request: Body) -> Done:
        tries = 0
        while True:
            tries += 1
            job: Job | None = None
            try:
                async with await self._submit(request) as job:
                    return Done(index, request, tries, require_success(await job.result()))
            except TallyError as error:
                final = not error.retry or tries > self._manner.retries or self._stopping()
                if final or (job is not None and await self._at_stake(job.id)):
                    return Done(index, request, tries, error=error)
            longest = min(LONGEST_WAIT, self._manner.first_wait * 2 ** (tries - 1))
            await asyncio.sleep(longest * (1 + self._random(1)[0] / 255) / 2)


async def _each(requests: Iterable[Body] | AsyncIterable[Body]) -> AsyncGenerator[Body, None]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
