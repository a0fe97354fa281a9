"""The SDK without async: wraps `Market`, whose event loop runs in its own thread. It also works in notebooks.

Each class has the public names of the async class that it wraps, where they are documented; a test keeps the two equal.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

from tallystick.client.config import ClientConfig
from tallystick.client.jobs.job import Job
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.proof import Proof
from tallystick.client.sdk.batch import BatchResult, RequestBody
from tallystick.client.sdk.market import Market
from tallystick.client.sdk.stream import TextStream
from tallystick.client.selection.options import RequestOptions
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.messages import Receipt
from tallystick.protocol.plaintext_heads import ResponseHead
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.routes import CHAT
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.types import Address, JobId

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", covariant=True)


class LoopThread:
    """An event loop that runs in its own thread."""

    def __init__(self) -> None:
        self._running_in: tuple[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread] | None = None

    @property
    def running(self) -> bool:
        """Whether the thread runs."""
        return self._running_in is not None

    def start(self) -> None:
        """Starts the thread."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def serve() -> None:
            stop = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="tallystick-market", daemon=True)
        thread.start()
        self._running_in = (*started.result(), thread)

    def stop(self) -> None:
        """Stops the thread and cancels everything that still runs in its loop."""
        if self._running_in is not None:
            loop, stop, thread = self._running_in
            self._running_in = None
            loop.call_soon_threadsafe(stop.set)
            thread.join()

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Runs a coroutine in the loop and returns its result. An interrupt (Ctrl-C, a notebook's stop) cancels it."""
        if self._running_in is None:
            coroutine.close()
            raise RuntimeError("the market is not open: use a `with` block, or call open() first")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._running_in[0])
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, source: AsyncIterator[R]) -> Generator[R, None, None]:
        """Yields the items of an asynchronous iterator, and closes it at the end."""
        step_lock = asyncio.Lock()  # after an interrupt, the last step may still be ending

        async def step() -> R | None:
            async with step_lock:
                return await anext(source, None)

        async def close() -> None:
            async with step_lock:
                if isinstance(source, AsyncGenerator):
                    await source.aclose()

        try:
            while (item := self.run(step())) is not None:
                yield item
        finally:
            self.run(close())


class SyncWrapper(Generic[T]):
    """An asynchronous object and the loop that it lives in."""

    def __init__(self, inner: T, loop: LoopThread) -> None:
        self._inner, self._loop = inner, loop

    def __repr__(self) -> str:
        return f"Sync{self._inner!r}"


def _synchronous(method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[SyncWrapper[T], P], R]:
    """The synchronous form of a method."""

    @functools.wraps(method)
    def call(self: SyncWrapper[T], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._loop.run(method(self._inner, *args, **kwargs))

    return call


def _synchronous_job(
    method: Callable[Concatenate[T, P], Coroutine[Any, Any, Job]],
) -> Callable[Concatenate[SyncWrapper[T], P], SyncJob]:
    """The synchronous form of a method that returns a job."""

    @functools.wraps(method)
    def call(self: SyncWrapper[T], /, *args: P.args, **kwargs: P.kwargs) -> SyncJob:
        return SyncJob(self._loop.run(method(self._inner, *args, **kwargs)), self._loop)

    return call


class SyncMarket(SyncWrapper[Market]):
    """`with SyncMarket(url, wallet) as market: print(market.chat(model, messages).text)`. Same parameters and errors as `Market`.

    Several threads may share it.
    """

    def __init__(self, coordinator_url: str, wallet: Signer, config: ClientConfig | None = None) -> None:
        super().__init__(Market(coordinator_url, wallet, config), LoopThread())

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> SyncMarket:
        """See `Market.of`."""
        return cls(config.coordinator, wallet, config)

    def open(self) -> Self:
        """See `Market.open`."""
        if self._loop.running:
            raise RuntimeError("the market is already open")
        self._loop.start()
        try:
            self._loop.run(self._inner.open())
        except BaseException:
            self._loop.stop()
            raise
        return self

    def close(self) -> None:
        """See `Market.close`."""
        if not self._loop.running:
            return
        try:
            self._loop.run(self._inner.close())
        finally:
            self._loop.stop()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def config(self) -> ClientConfig:
        """See `Market.config`."""
        return self._inner.config

    @property
    def wallet(self) -> Signer:
        """See `Market.wallet`."""
        return self._inner.wallet

    @property
    def address(self) -> Address:
        """See `Market.address`."""
        return self._inner.address

    @property
    def coordinator_urls(self) -> tuple[str, ...]:
        """See `Market.coordinator_urls`."""
        return self._inner.coordinator_urls

    @property
    def running(self) -> int:
        """See `Market.running`."""
        return self._inner.running

    info = _synchronous(Market.info)
    drain = _synchronous(Market.drain)
    models = _synchronous(Market.models)
    shortlist = _synchronous(Market.shortlist)
    explain = _synchronous(Market.explain)
    submit = _synchronous_job(Market.submit)
    chat = _synchronous(Market.chat)
    find = _synchronous(Market.find)
    tab = _synchronous(Market.tab)
    evidence = _synchronous(Market.evidence)

    def stream(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, tally: RequestOptions | None = None, **options: Any
    ) -> SyncTextStream:
        """See `Market.stream`."""
        return SyncTextStream(self._inner.stream(model, messages, tally=tally, **options), self._loop)

    def fetch_evidence(self, job: JobId) -> tuple[EvidenceRow, ...]:
        """See `Market.fetch_evidence`."""
        return self._loop.run(self._inner.fetch_evidence(job))

    def map(
        self,
        requests: Iterable[RequestBody],
        *,
        path: str = CHAT,
        concurrency: int = 16,
        ordered: bool = True,
        retries: int = 2,
        **options: Unpack[RequestOptions],
    ) -> Generator[BatchResult, None, None]:
        """See `Market.map`. Requests are read in a thread of their own; closing the market waits for a read in progress."""
        source = _iterate_in_thread(requests)
        results = self._inner.map(source, path=path, concurrency=concurrency, ordered=ordered, retries=retries, **options)
        return self._loop.iterate(results)


class SyncJob(SyncWrapper[Job]):
    """A running job: iterate for the bytes, or call `result()`. Leaving its `with` block before the end cancels it."""

    @property
    def id(self) -> JobId:
        """See `Job.id`."""
        return self._inner.id

    @property
    def head(self) -> ResponseHead | None:
        """See `Job.head`."""
        return self._inner.head

    @property
    def provider(self) -> Address | None:
        """See `Job.provider`."""
        return self._inner.provider

    @property
    def place(self) -> QueuePlace | None:
        """See `Job.place`."""
        return self._inner.place

    @property
    def streams(self) -> bool:
        """See `Job.streams`."""
        return self._inner.streams

    @property
    def done(self) -> bool:
        """See `Job.done`."""
        return self._inner.done

    @property
    def candidates(self) -> tuple[PlacedOrder, ...]:
        """See `Job.candidates`."""
        return self._inner.candidates

    @property
    def receipt(self) -> Verified[Receipt] | None:
        """See `Job.receipt`."""
        return self._inner.receipt

    @property
    def receipt_accepted(self) -> bool:
        """See `Job.receipt_accepted`."""
        return self._inner.receipt_accepted

    @property
    def evidence(self) -> tuple[EvidenceRow, ...]:
        """See `Job.evidence`."""
        return self._inner.evidence

    @property
    def receipt_outstanding(self) -> bool:
        """See `Job.receipt_outstanding`."""
        return self._inner.receipt_outstanding

    @property
    def disputed(self) -> bool:
        """See `Job.disputed`."""
        return self._inner.disputed

    @property
    def proof(self) -> Proof | None:
        """See `Job.proof`."""
        return self._inner.proof

    start = _synchronous(Job.start)
    result = _synchronous(Job.result)
    cancel = _synchronous(Job.cancel)

    def __iter__(self) -> Iterator[bytes]:
        return self._loop.iterate(aiter(self._inner))

    def text(self) -> Iterator[str]:
        """See `Job.text`."""
        return self._loop.iterate(self._inner.text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.run(self._inner.__aexit__(kind, error, trace))


class SyncTextStream(SyncWrapper[TextStream]):
    """`for text in stream`, then `stream.result()`. Leaving the loop or a `with` block before the end cancels the job."""

    @property
    def job(self) -> SyncJob | None:
        """See `TextStream.job`."""
        return None if self._inner.job is None else SyncJob(self._inner.job, self._loop)

    start = _synchronous_job(TextStream.start)
    result = _synchronous(TextStream.result)
    cancel = _synchronous(TextStream.cancel)

    def __iter__(self) -> Iterator[str]:
        return self._loop.iterate(aiter(self._inner))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.run(self._inner.__aexit__(kind, error, trace))


async def _iterate_in_thread(requests: Iterable[RequestBody]) -> AsyncGenerator[RequestBody, None]:
    source = iter(requests)
    while (request := await asyncio.to_thread(next, source, None)) is not None:
        yield request
