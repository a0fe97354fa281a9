"""The bus between replicas, with connections that the test makes and breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from coordinator.bus import nats_bus as module
from coordinator.bus.nats_bus import MAX_MESSAGE, OUTBOX, Dial, NatsBus, Receiver

SECONDS = 120
SERVERS = ("nats://ann:s3cret@bus.example:4222",)


class FakeConnection:
    """A connection whose other end is the test."""

    def __init__(self, receive: Receiver) -> None:
        self.receive, self.sent = receive, asyncio.Queue[tuple[str, bytes]]()
        self.gone, self.open = asyncio.Event(), asyncio.Event()
        self.was_closed, self.ended = False, asyncio.Event()
        self.open.set()
        self.failure: Exception | None = None

    async def publish(self, subject: str, payload: bytes) -> None:
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.sent.put_nowait((subject, payload))

    async def ping(self) -> None:
        await self.open.wait()
        if self.failure is not None:
            raise self.failure

    async def closed(self) -> None:
        await self.gone.wait()

    async def close(self) -> None:
        self.was_closed = True
        self.ended.set()


class FakeNats:
    """Dials connections; `failures` are raised first."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.dialled = list(failures), asyncio.Queue[FakeConnection]()
        self.subject = ""

    async def __call__(self, servers: tuple[str, ...], subject: str, receive: Receiver) -> FakeConnection:
        assert servers == SERVERS
        self.subject = subject
        if self.failures:
            raise self.failures.pop(0)
        connection = FakeConnection(receive)
        self.dialled.put_nowait(connection)
        return connection


@asynccontextmanager
async def _running(nats: Dial) -> AsyncIterator[tuple[NatsBus, asyncio.Event]]:
    bus, connected = NatsBus(SERVERS, "tallystick.0xab", dial=nats), asyncio.Event()
    bus.on_connected = connected.set
    runner = asyncio.create_task(bus.run())
    try:
        async with asyncio.timeout(SECONDS):
            yield bus, connected
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)


async def test_messages_go_both_ways_by_topic() -> None:
    """A message is published below the prefix; one that arrives is handed on with its topic."""
    nats, got = FakeNats(), list[tuple[str, bytes]]()
    async with _running(nats) as (bus, connected):
        bus.on_message = lambda topic, payload: got.append((topic, payload))
        await connected.wait()
        connection = await nats.dialled.get()
        assert (nats.subject, bus.connected) == ("tallystick.0xab.*", True)
        bus.publish("tab", b"one")
        assert await connection.sent.get() == ("tallystick.0xab.tab", b"one")
        connection.receive("tallystick.0xab.cancel", b"two")
        connection.receive("tallystick.0xother.cancel", b"of another coordinator")
        connection.receive("tallystick.0xab.tab", bytes(MAX_MESSAGE + 1))
        assert got == [("cancel", b"two")]
        assert bus.dropped == {"too_long": 1}


async def test_it_connects_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed dials and lost connections are tried again; each connection is announced, and a lost one is closed."""
    monkeypatch.setattr(module, "FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "LAST_RETRY_SECONDS", 0.002)
    nats = FakeNats(*(OSError("refused"),) * 5, TimeoutError(), RuntimeError("auth violation"))
    async with _running(nats) as (bus, connected):
        for end in (lambda c: c.gone.set(), lambda c: setattr(c, "failure", OSError("reset"))) * 2:
            await connected.wait()
            connected.clear()
            connection = await nats.dialled.get()
            end(connection)
            bus.publish("tab", b"lost")
        await connected.wait()
        assert connection.was_closed
        assert (await nats.dialled.get()) is not connection


async def test_what_cannot_be_sent_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection nothing queues; with a stuck one, OUTBOX messages do. A message that is too long is not sent."""
    monkeypatch.setattr(module, "FIRST_RETRY_SECONDS", 0.001)
    nats = FakeNats()
    async with _running(nats) as (bus, connected):
        bus.publish("tab", b"too early")
        assert bus.dropped == {"disconnected": 1}
        await connected.wait()
        connected.clear()
        stuck = await nats.dialled.get()
        stuck.open.clear()
        bus.publish("tab", bytes(MAX_MESSAGE + 1))
        for _ in range(OUTBOX + 1):
            bus.publish("tab", b"waits")
        assert bus.dropped == {"disconnected": 1, "too_long": 1, "full": 1}
        stuck.gone.set()
        await connected.wait()
        assert bus.dropped["disconnected"] >= OUTBOX, "what waited for the old connection is not sent late"
        fresh = await nats.dialled.get()
        bus.publish("tab", b"fresh")
        assert await fresh.sent.get() == ("tallystick.0xab.tab", b"fresh")


async def test_one_warning_for_one_outage_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage is one warning that says what is lost, however many attempts fail; no log has the password."""
    monkeypatch.setattr(module, "FIRST_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "LAST_RETRY_SECONDS", 0.001)
    nats = FakeNats(*(OSError("nats://ann:s3cret@bus.example:4222 refused ann s3cret"),) * 3)
    with capture_logs() as logs:
        async with _running(nats) as (_, connected):
            await connected.wait()
            connected.clear()
            (await nats.dialled.get()).gone.set()
            await connected.wait()
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [entry["server"] for entry in warnings] == ["bus.example:4222"] * 2
    assert "cancels and tab totals do not reach other replicas" in warnings[0]["event"]
    assert "s3cret" not in str(logs)


async def test_a_client_that_swallows_the_cancellation() -> None:
    """A bus that is stopped while it dials ends at once, and a connection that comes all the same is closed."""
    begun, made = asyncio.Event(), FakeConnection(lambda *_: None)

    async def dial(servers: tuple[str, ...], subject: str, receive: Receiver) -> FakeConnection:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return made

    bus = NatsBus(SERVERS, "tallystick.0xab", dial=dial)
    runner = asyncio.create_task(bus.run())
    async with asyncio.timeout(SECONDS):
        await begun.wait()
        runner.cancel()
        await asyncio.wait({runner})
        await made.ended.wait()
    assert runner.cancelled()


async def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt ends in time even if the client swallows its cancellation, and the next one is made."""
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.01)
    monkeypatch.setattr(module, "FIRST_RETRY_SECONDS", 0.001)
    nats, late = FakeNats(), FakeConnection(lambda *_: None)
    answers = [late]

    async def dial(servers: tuple[str, ...], subject: str, receive: Receiver) -> FakeConnection:
        if not answers:
            return await nats(servers, subject, receive)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return answers.pop()

    async with _running(dial) as (bus, connected):
        await connected.wait()
        await late.ended.wait()
        assert bus.connected


async def test_the_round_trip() -> None:
    """A ping takes the time of the server's answer; there is none without a connection, or if the server fails."""
    nats = FakeNats()
    assert await NatsBus(SERVERS, "t", dial=nats).round_trip() is None
    async with _running(nats) as (bus, _):
        connection = await nats.dialled.get()
        while not bus.connected:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)
        assert (await bus.round_trip() or -1) >= 0
        connection.failure = ConnectionError("gone")
        assert await bus.round_trip() is None
    assert await bus.round_trip() is None
