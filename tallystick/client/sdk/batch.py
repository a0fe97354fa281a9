"""Runs many jobs with bounded concurrency: retries where that can help, and loses no result when another request fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result, require_success
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.types import Amount, JobId

RequestBody = bytes | Mapping[str, Any]
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 8.0
"""The longest wait before the first retry, which doubles with each retry up to the second value."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """How one request ended: with a `result`, or with the `error` of its last attempt. `index` counts the requests from 0."""

    index: int
    request: RequestBody = field(repr=False)
    attempts: int
    result: Result | None = None
    error: TallyError | None = None

    def unwrap(self) -> Result:
        """Returns the result. Raises the error if there is none."""
        if self.result is None:
            raise self.error or RuntimeError("neither a result nor an error")
        return self.result


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How to run a batch. `retries` are per request; the first waits up to `first_retry_seconds`. Raises BadMessage."""

    concurrency: int = 16
    ordered: bool = True
    retries: int = 2
    first_retry_seconds: float = FIRST_RETRY_SECONDS

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise BadMessage(f"concurrency: expected at least 1, got {self.concurrency}")
        if self.retries < 0:
            raise BadMessage(f"retries: expected at least 0, got {self.retries}")


class Batch:
    """One run over an iterable of requests.

    `submit` places one job. `possible_cost` returns what a failed job may still cost, in base units; a request whose failed
    attempt may still cost something is not retried. `random` returns bytes, which spread the retries. While `stopping` returns
    True, no new attempt starts.
    """

    def __init__(
        self,
        submit: Callable[[RequestBody], Awaitable[Job]],
        possible_cost: Callable[[JobId], Awaitable[Amount]],
        options: BatchOptions,
        random: Callable[[int], bytes],
        stopping: Callable[[], bool],
    ) -> None:
        self._submit, self._possible_cost = submit, possible_cost
        self._options, self._random, self._stopping = options, random, stopping
        self._running_slots = asyncio.Semaphore(options.concurrency)
        self._held_slots = asyncio.Semaphore(2 * options.concurrency)  # also bounds results that nobody took yet
        self._running: set[asyncio.Task[BatchResult]] = set()
        self._ready: asyncio.Queue[asyncio.Task[BatchResult] | None] = asyncio.Queue()

    async def run(self, requests: Iterable[RequestBody] | AsyncIterable[RequestBody]) -> AsyncGenerator[BatchResult, None]:
        """Yields how each request ended. Raises an error of `requests` itself after all earlier requests have ended."""
        feeder = asyncio.create_task(self._feed(requests))
        try:
            while (job_task := await self._ready.get()) is not None:
                result = await job_task
                self._held_slots.release()
                yield result
            await feeder
        finally:
            unfinished = (feeder, *self._running)
            for background in unfinished:
                background.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _feed(self, requests: Iterable[RequestBody] | AsyncIterable[RequestBody]) -> None:
        source, index = _iterate(requests), 0
        try:
            while not self._stopping():
                await self._held_slots.acquire()
                await self._running_slots.acquire()
                request = await anext(source, None)
                if request is None:
                    return
                job_task = asyncio.create_task(self._run_request(index, request))
                self._running.add(job_task)
                job_task.add_done_callback(self._finished)
                if self._options.ordered:
                    self._ready.put_nowait(job_task)
                index += 1
        finally:
            if self._running and not self._options.ordered:
                await asyncio.wait(self._running)
            self._ready.put_nowait(None)
            await source.aclose()

    def _finished(self, job_task: asyncio.Task[BatchResult]) -> None:
        self._running.discard(job_task)
        self._running_slots.release()
        if not self._options.ordered:
            self._ready.put_nowait(job_task)

    async def _run_request(self, index: int, request: RequestBody) -> BatchResult:
        attempts = 0
        while True:
            attempts += 1
            job: Job | None = None
            try:
                async with await self._submit(request) as job:
                    return BatchResult(index, request, attempts, require_success(await job.result()))
            except TallyError as error:
                final = not error.retry or attempts > self._options.retries or self._stopping()
                if final or (job is not None and await self._possible_cost(job.id)):
                    return BatchResult(index, request, attempts, error=error)
            longest = min(LONGEST_RETRY_SECONDS, self._options.first_retry_seconds * 2 ** (attempts - 1))
            await asyncio.sleep(longest * (1 + self._random(1)[0] / 255) / 2)


async def _iterate(requests: Iterable[RequestBody] | AsyncIterable[RequestBody]) -> AsyncGenerator[RequestBody, None]:
    if isinstance(requests, AsyncIterable):
        async for request in requests:
            yield request
    else:
        for request in requests:
            yield request
