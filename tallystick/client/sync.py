"""The SDK without async: a thin face over `Market`, whose event loop runs in a thread of its own. Works in notebooks too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tallystick.client.config import ClientConfig
from tallystick.client.job import Job, Result
from tallystick.client.lookups import KnownJob
from tallystick.client.sdk import Market
from tallystick.client.transport import ModelOffer
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import ResponseHead

R = TypeVar("R")
Run = Callable[[Coroutine[Any, Any, Any]], Any]


class SyncMarket:
    """`with SyncMarket(url, wallet) as market: print(market.chat(model, messages).text)`. Takes and raises what `Market` does."""

    def __init__(self, coordinator_url: str, wallet: Signer, config: ClientConfig | None = None) -> None:
        self._market = Market(coordinator_url, wallet, config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tallystick-market", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._run(self._market.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._run(self._market.__aexit__(kind, error, trace))
        finally:
            self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, R]) -> R:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def models(self) -> list[ModelOffer]:
        """See `Market.models`."""
        return self._run(self._market.models())

    def submit(self, path: str, body: bytes | Mapping[str, Any], **options: Any) -> SyncJob:
        """See `Market.submit`."""
        return SyncJob(self._run(self._market.submit(path, body, **options)), self._run)

    def chat(self, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> Result:
        """See `Market.chat`."""
        return self._run(self._market.chat(model, messages, **options))

    def find(self, job: JobId) -> KnownJob | None:
        """See `Market.find`."""
        return self._run(self._market.find(job))


class SyncJob:
    """A job under way: iterate for the bytes, or take `result()`. Leaving it (`with`) before its end cancels it."""

    def __init__(self, job: Job, run: Run) -> None:
        self._job, self._run = job, run

    @property
    def id(self) -> JobId:
        """Its id."""
        return self._job.id

    def start(self) -> ResponseHead:
        """See `Job.start`."""
        return self._run(self._job.start())  # type: ignore[no-any-return]  # Run can't be generic

    def __iter__(self) -> Iterator[bytes]:
        chunks = self._job.__aiter__()
        while (chunk := self._run(_next(chunks))) is not None:
            yield chunk

    def result(self) -> Result:
        """See `Job.result`."""
        return self._run(self._job.result())  # type: ignore[no-any-return]  # Run can't be generic

    def cancel(self) -> Result | None:
        """See `Job.cancel`."""
        return self._run(self._job.cancel())  # type: ignore[no-any-return]  # Run can't be generic

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._job.done:
            self.cancel()


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    return await anext(chunks, None)
