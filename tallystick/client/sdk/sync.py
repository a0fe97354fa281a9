"""The SDK without async: a thin face over `Market`, whose event loop runs in a thread of its own. Works in notebooks too.

Each class here has the public names of its async twin, which documents them; a test keeps the two equal.
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
from tallystick.client.receipts.checks import PlacedOrder
from tallystick.client.receipts.proof import Proof
from tallystick.client.sdk.batch import Body, Done
from tallystick.client.sdk.market import Market
from tallystick.client.sdk.stream import TextStream
from tallystick.client.selection.options import Options
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.messages import Receipt
from tallystick.protocol.routes import CHAT
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import ResponseHead

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", covariant=True)


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._serving: tuple[asyncio.AbstractEventLoop, asyncio.Event, threading.Thread] | None = None

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self._serving is not None

    def start(self) -> None:
        """Starts it."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def serve() -> None:
            stop = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="tallystick-market", daemon=True)
        thread.start()
        self._serving = (*started.result(), thread)

    def stop(self) -> None:
        """Stops it; what still runs in it is cancelled."""
        if self._serving is not None:
            loop, stop, thread = self._serving
            self._serving = None
            loop.call_soon_threadsafe(stop.set)
            thread.join()

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        """What a coroutine returns or raises. An interrupt (Ctrl-C, a notebook's stop) cancels it."""
        if self._serving is None:
            work.close()
            raise RuntimeError("the market is not open: use it in a `with` block, or open() it")
        future = asyncio.run_coroutine_threadsafe(work, self._serving[0])
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, source: AsyncIterator[R]) -> Generator[R, None, None]:
        """What an asynchronous iterator yields. Leaving closes it."""
        turn = asyncio.Lock()  # after an interrupt its last step may still be ending

        async def step() -> R | None:
            async with turn:
                return await anext(source, None)

        async def close() -> None:
            async with turn:
                if isinstance(source, AsyncGenerator):
                    await source.aclose()

        try:
            while (item := self.run(step())) is not None:
                yield item
        finally:
            self.run(close())


class Face(Generic[T]):
    """Something asynchronous, and the loop that it lives in."""

    def __init__(self, inner: T, loop: Loop) -> None:
        self._inner, self._loop = inner, loop

    def __repr__(self) -> str:
        return f"Sync{self._inner!r}"


def _plain(method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Face[T], P], R]:
    """The method without async."""

    @functools.wraps(method)
    def call(self: Face[T], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._loop.run(method(self._inner, *args, **kwargs))

    return call


def _job(method: Callable[Concatenate[T, P], Coroutine[Any, Any, Job]]) -> Callable[Concatenate[Face[T], P], SyncJob]:
    """The method without async, for one that returns a job."""

    @functools.wraps(method)
    def call(self: Face[T], /, *args: P.args, **kwargs: P.kwargs) -> SyncJob:
        return SyncJob(self._loop.run(method(self._inner, *args, **kwargs)), self._loop)

    return call


class SyncMarket(Face[Market]):
    """`with SyncMarket(url, wallet) as market: print(market.chat(model, messages).text)`. Takes and raises what `Market` does.

    Threads may share it.
    """

    def __init__(self, coordinator_url: str, wallet: Signer, config: ClientConfig | None = None) -> None:
        super().__init__(Market(coordinator_url, wallet, config), Loop())

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> SyncMarket:
        """See `Market.of`."""
        return cls(config.coordinator, wallet, config)

    def open(self) -> Self:
        """See `Market.open`."""
        if self._loop.running:
            raise RuntimeError("the market is open already")
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
    def running(self) -> int:
        """See `Market.running`."""
        return self._inner.running

    info = _plain(Market.info)
    drain = _plain(Market.drain)
    models = _plain(Market.models)
    shortlist = _plain(Market.shortlist)
    explain = _plain(Market.explain)
    submit = _job(Market.submit)
    chat = _plain(Market.chat)
    find = _plain(Market.find)
    tab = _plain(Market.tab)
    evidence = _plain(Market.evidence)

    def stream(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, tally: Options | None = None, **options: Any
    ) -> SyncTextStream:
        """See `Market.stream`."""
        return SyncTextStream(self._inner.stream(model, messages, tally=tally, **options), self._loop)

    def map(
        self,
        requests: Iterable[Body],
        *,
        path: str = CHAT,
        at_once: int = 16,
        ordered: bool = True,
        retries: int = 2,
        **options: Unpack[Options],
    ) -> Generator[Done, None, None]:
        """See `Market.map`. The requests are taken in a thread of their own; closing the market waits for one being taken."""
        source = _elsewhere(requests)
        done = self._inner.map(source, path=path, at_once=at_once, ordered=ordered, retries=retries, **options)
        return self._loop.iterate(done)


class SyncJob(Face[Job]):
    """A job under way: iterate for the bytes, or take `result()`. Leaving it (`with`) before its end cancels it."""

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
    def booked(self) -> bool:
        """See `Job.booked`."""
        return self._inner.booked

    @property
    def outstanding(self) -> bool:
        """See `Job.outstanding`."""
        return self._inner.outstanding

    @property
    def disputed(self) -> bool:
        """See `Job.disputed`."""
        return self._inner.disputed

    @property
    def proof(self) -> Proof | None:
        """See `Job.proof`."""
        return self._inner.proof

    start = _plain(Job.start)
    result = _plain(Job.result)
    cancel = _plain(Job.cancel)

    def __iter__(self) -> Iterator[bytes]:
        return self._loop.iterate(aiter(self._inner))

    def text(self) -> Iterator[str]:
        """See `Job.text`."""
        return self._loop.iterate(self._inner.text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.run(self._inner.__aexit__(kind, error, trace))


class SyncTextStream(Face[TextStream]):
    """`for text in stream`, then `stream.result()`. Leaving the loop or a `with` block before the end cancels the job."""

    @property
    def job(self) -> SyncJob | None:
        """See `TextStream.job`."""
        return None if self._inner.job is None else SyncJob(self._inner.job, self._loop)

    start = _job(TextStream.start)
    result = _plain(TextStream.result)
    cancel = _plain(TextStream.cancel)

    def __iter__(self) -> Iterator[str]:
        return self._loop.iterate(aiter(self._inner))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.run(self._inner.__aexit__(kind, error, trace))


async def _elsewhere(requests: Iterable[Body]) -> AsyncGenerator[Body, None]:
    source = iter(requests)
    while (request := await asyncio.to_thread(next, source, None)) is not None:
        yield request
