"""A chat whose text is read as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Self

from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result


class TextStream:
    """`async for text in stream`, then `await stream.result()` for receipt and cost. The job is submitted at the first of these.

    Leaving the loop or an `async with` block before the end cancels the job; the block does so at once, whatever happens.
    """

    def __init__(self, submit: Callable[[], Awaitable[Job]]) -> None:
        self._submit = submit
        self._job: Job | None = None

    @property
    def job(self) -> Job | None:
        """The job, once it was submitted."""
        return self._job

    async def start(self) -> Job:
        """Submits the job, unless that was done. Raises TallyError."""
        if self._job is None:
            self._job = await self._submit()
        return self._job

    async def __aiter__(self) -> AsyncIterator[str]:
        """The text, piece by piece; see `Job.text`."""
        async with await self.start() as job:
            async for text in job.text():
                yield text

    async def result(self) -> Result:
        """Reads to the end; then see `Job.result`. Its text and body are what iterating left. Raises TallyError."""
        return await (await self.start()).result()

    async def cancel(self) -> Result | None:
        """Stops the job; see `Job.cancel`. None also where it was not submitted."""
        return None if self._job is None else await self._job.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._job is not None:
            await self._job.__aexit__(kind, error, trace)
