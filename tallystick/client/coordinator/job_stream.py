"""The frames of one job as they arrive, over whichever transport."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import aiohttp

from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.wire import Candidate, FrameReader, Kind

Sink = Callable[[bytes], bool]
"""Takes the payload of a chunk at once, and returns whether it did. It must not raise."""
Frame = tuple[Kind, bytes]
Watching = Callable[[], contextlib.AbstractAsyncContextManager[None]]


class StreamLost(Unavailable):
    """The stream of a job broke, or ended before its job. What became of the job is not known."""

    def __init__(self, reason: str) -> None:
        super().__init__(Code.COORDINATOR_UNAVAILABLE, reason)


class LinkLost(StreamLost):
    """The link was lost before anything of the job's response came."""


class JobStream(Protocol):
    """The frames of one job. Read it from one place."""

    async def read(self, *, whole: bool = False, sink: Sink | None = None) -> Sequence[Frame]:
        """Waits for frames and returns those that have come. Raises StreamLost at the end, BadMessage for bytes that are none.

        `whole`: the reader wants the answer at its end only. Then the stream may keep matches and chunks until another frame
        comes, as far as it has room for them. `sink`: may get chunks while this waits, instead of the reader.
        """
        ...

    def close(self) -> None:
        """Reads no further. The coordinator takes that for the client's departure, unless the job has ended."""
        ...

    def cancel(self) -> bool:
        """Stops the job, whose receipt still ends the stream. Returns False if this stream cannot do that."""
        ...

    async def add_orders(self, candidates: Sequence[Candidate]) -> bool:
        """Adds orders to the job while it waits. Returns False if this stream cannot do that. Raises TallyError."""
        ...


class HttpJobStream:
    """The frames of an open response to POST /v1/jobs. `watching` wraps each wait for a provider, and may raise TimeoutError."""

    def __init__(self, response: aiohttp.ClientResponse, watching: Watching = contextlib.nullcontext) -> None:
        self._response, self._reader, self._watching = response, FrameReader(), watching
        self._matched = False

    async def read(self, *, whole: bool = False, sink: Sink | None = None) -> Sequence[Frame]:  # noqa: ARG002 - both are optional
        """See JobStream."""
        frames: list[Frame] = []
        while not frames:
            try:
                async with contextlib.nullcontext() if self._matched else self._watching():
                    data = await self._response.content.readany()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise StreamLost(str(error) or type(error).__name__) from error
            if not data:
                raise StreamLost("the coordinator closed it")
            frames.extend(self._reader.feed(data))
        self._matched = self._matched or any(kind is not Kind.BEAT for kind, _ in frames)
        return frames

    def close(self) -> None:
        """See JobStream."""
        if not self._response.content.at_eof():  # at its end the connection went back to the pool by itself
            self._response.close()

    def cancel(self) -> bool:
        """See JobStream: POST /v1/jobs/{id}/cancel does."""
        return False

    async def add_orders(self, _candidates: Sequence[Candidate]) -> bool:
        """See JobStream: POST /v1/jobs/{id}/orders does."""
        return False
