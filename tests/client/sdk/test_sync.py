from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tallystick import ClientConfig, Market, SyncMarket
from tallystick.client.jobs.job import Job
from tallystick.client.ledger.schema import JobState
from tallystick.client.sdk.stream import TextStream
from tallystick.client.sdk.sync import SyncJob, SyncTextStream
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tests.client.fake_coordinator import BODY, CHAT, MESSAGES, STREAM, WORDS, FakeMarket, Session, event, honest, until_cancelled
from tests.client.parties import MODEL


async def test_everything_without_async(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Models, chat, streaming and the ledger work without async, also beside a running loop."""

    def use() -> None:
        with SyncMarket(fake.url, wallet, config) as market:
            assert [model.id for model in market.models()] == [MODEL]
            result = market.chat(MODEL, MESSAGES)
            assert result.text == "".join(WORDS)
            with market.submit(CHAT, STREAM) as job:
                assert job.start().status == 200
                assert list(job) == [*map(event, WORDS), b"data: [DONE]\n\n"]
                assert job.result().cost == 3
            known = market.find(result.job)
            assert known is not None
            assert known.state is JobState.COMPLETED
            with pytest.raises(Refusal) as caught:
                market.chat("nothing", MESSAGES)
            assert caught.value.code is Code.UNKNOWN_MODEL

    await asyncio.to_thread(use)


def _public(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def test_both_interfaces_have_the_same_names(wallet: Signer) -> None:
    """Every public name of an async class exists in its synchronous class, with the same parameters, and no other."""
    class_pairs: list[tuple[type, type]] = [(Market, SyncMarket), (Job, SyncJob), (TextStream, SyncTextStream)]
    attributes = _public(Market("http://x", wallet)) - _public(Market)
    for async_class, sync_class in class_pairs:
        assert _public(async_class) | (attributes if async_class is Market else set()) == _public(sync_class)
        assert hasattr(async_class, "__aenter__") == hasattr(sync_class, "__enter__")
        assert hasattr(async_class, "__aiter__") == hasattr(sync_class, "__iter__")
        for name in _public(async_class):
            async_member, sync_member = getattr(async_class, name), getattr(sync_class, name)
            assert isinstance(async_member, property) == isinstance(sync_member, property)
            if not isinstance(async_member, property):
                assert _parameters(async_member) == _parameters(sync_member), name
                assert sync_member.__doc__, name


def _parameters(method: Any) -> list[tuple[str, object, object]]:
    parameters = inspect.signature(method, follow_wrapped=True).parameters.values()
    return [(entry.name, entry.kind, entry.default) for entry in parameters if entry.name != "self"]


async def test_stream_and_map_without_async(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A stream's text and its receipt, many jobs from any iterable, opened and closed without a block."""

    def use() -> None:
        market = SyncMarket(fake.url, wallet, config).open()
        stream = market.stream(MODEL, MESSAGES)
        assert list(stream) == [*WORDS]
        assert stream.result().cost == 3
        with market.stream(MODEL, MESSAGES) as stream:
            assert stream.job is not None
            assert next(iter(stream)) == WORDS[0]
        with market.submit(CHAT, STREAM) as job:
            assert "".join(job.text()) == "".join(WORDS)
        results = list(market.map((BODY for _ in range(5)), concurrency=2))
        assert [entry.unwrap().text for entry in results] == ["".join(WORDS)] * 5
        assert market.tab(fake.providers[0].address).accepted > 0
        assert market.info().coordinator == fake.signer.address
        assert not market.evidence()
        market.close()
        market.close()
        with pytest.raises(RuntimeError, match="not open"):
            market.models()

    await asyncio.to_thread(use)


@contextlib.contextmanager
def _served(fake: FakeMarket) -> Iterator[None]:
    """Runs the fake coordinator in a thread of its own and leaves the main thread to the test."""
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with fake.serve():
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait(120)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def _result(market: SyncMarket) -> None:
    with market.submit(CHAT, STREAM) as job:
        job.result()


WAYS: dict[str, Callable[[SyncMarket], object]] = {
    "chat": lambda market: market.chat(MODEL, MESSAGES),
    "stream": lambda market: list(market.stream(MODEL, MESSAGES)),
    "map": lambda market: list(market.map([BODY])),
    "result": _result,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_cancels_the_job(way: str, wallet: Signer, config: ClientConfig) -> None:
    """Ctrl-C while a call waits cancels its job, and the market stays usable."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    fake = FakeMarket()

    async def interrupting(session: Session) -> None:
        fake.script = honest
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        await until_cancelled(session)

    fake.script = interrupting
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _served(fake), SyncMarket(fake.url, wallet, config) as market:
            with pytest.raises(KeyboardInterrupt):
                WAYS[way](market)
            assert market.chat(MODEL, MESSAGES).text == "".join(WORDS)
        assert len(set(fake.cancels)) == 1
    finally:
        signal.signal(signal.SIGINT, before)


async def test_leaving_cancels(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Leaving a job before its end cancels it."""
    fake.script = until_cancelled

    def use() -> None:
        with SyncMarket(fake.url, wallet, config) as market, market.submit(CHAT, STREAM) as job:
            assert next(iter(job)) == event("on and on ")

    await asyncio.to_thread(use)
    assert len(fake.cancels) == 1


def test_unusable_ledger_file(wallet: Signer, config: ClientConfig) -> None:
    """A market that cannot be opened leaves no thread behind."""
    assert config.ledger_file is not None
    config.ledger_file.mkdir()
    with pytest.raises(Unavailable, match="ledger_file: "), SyncMarket("http://127.0.0.1:1", wallet, config):
        pass
