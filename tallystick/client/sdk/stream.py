"""A chat completion whose text is read while it streams in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result


class TextStream:
    """`async for text in stream`, then `await stream.result()` for the receipt and the cost.

    The first of these calls submits the job. Leaving the loop or an `async with` block before the end cancels it; the block
    cancels it at once, even after an error.
    """

    def __init__(self, submit: Callable[[], Awaitable[Job]]) -> None:
        self._submit = submit
        self._job: Job | None = None

    @property
    def job(self) -> Job | None:
        """The job; None before it was submitted."""
        return self._job

    async def start(self) -> Job:
        """Submits the job if that has not happened yet. Raises TallyError."""
        if self._job is None:
            self._job = await self._submit()
        return self._job

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yields the text piece by piece; see `Job.text`."""
        async with await self.start() as job:
            async for text in job.text():
                yield text

    async def result(self) -> Result:
        """Reads to the end and returns the result, whose body is what iterating left; see `Job.result`. Raises TallyError."""
        return await (await self.start()).result()

    async def cancel(self) -> Result | None:
        """Cancels the job; see `Job.cancel`. Returns None also if it was not submitted."""
        return None if self._job is None else await self._job.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._job is not None:
            await self._job.__aexit__(kind, error, trace)
