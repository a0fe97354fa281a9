from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs
from websockets.asyncio.server import ServerConnection, serve

from node.coordinator import link, link_session
from node.coordinator.link import NodeLink
from node.coordinator.link_session import MAX_OUTBOX_FACTOR, LinkSession
from node.coordinator.link_settings import LinkSettings, node_url
from node.domain.published_asks import for_payers
from node.ports import Link, LinkLost
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.link import Beat, Capacities, Capacity, Listing, read_asks
from tallystick.protocol.messages import Ask
from tallystick.protocol.payer_rules import PayerRule
from tallystick.protocol.types import Address, Amount, JobId
from tallystick.protocol.wire import NO_JOB, Kind, dumps, loads, pack_link
from tests.node.fake_coordinator import Connection, FakeCoordinator
from tests.node.harness import COORDINATOR, DOMAIN, OFFER, PROVIDER, make_asks

QUICK = LinkSettings(
    connect_seconds=2, heartbeat_seconds=30, ping_seconds=5, min_backoff_seconds=0.01, max_backoff_seconds=0.05, outbox_frames=8
)
JOB = JobId(b"j" * 16)


class Recorder:
    """A link handler that keeps its events."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.fault: BadMessage | None = None

    def connected(self, link: Link) -> None:
        self.events.put_nowait(("connected", link))

    def frame_received(self, link: Link, kind: Kind, job: JobId, payload: bytes) -> None:
        if self.fault is not None:
            raise self.fault
        self.events.put_nowait((kind.name, (job, payload)))

    def disconnected(self, link: Link) -> None:
        self.events.put_nowait(("disconnected", link))


class Node:
    """A link and its events."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.handler = Recorder()
        self.asks: tuple[Signed[Ask], ...] = make_asks().current
        self.capacity = Capacity(2, 3)
        self.link = NodeLink(
            url,
            signer=PROVIDER,
            domain=DOMAIN,
            handler=self.handler,
            listing=lambda _: Listing.of_one_group(self.asks, self.capacity),
            capacities=lambda: {0: self.capacity},
            **{"settings": QUICK, "jitter": lambda: 0.5, **settings},
        )

    async def next_event(self) -> tuple[str, Any]:
        """Returns the handler's next event."""
        async with asyncio.timeout(60):
            return await self.handler.events.get()

    async def troubled(self, *words: str) -> None:
        """Waits until the link reports this problem, for which there is no event."""
        while not any(word in self.link.problem for word in words):  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Node]:
        """Runs the link until the end of the block."""
        task = asyncio.create_task(self.link.run())
        try:
            async with asyncio.timeout(60):
                yield self
        finally:
            await self.link.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def connected(**settings: Any) -> AsyncIterator[tuple[Node, Connection]]:
    """Starts a node that a coordinator has accepted."""
    async with FakeCoordinator().serving() as coordinator, Node(coordinator.url, **settings).running() as node:
        yield node, await coordinator.connections.get()


async def test_the_handshake_proves_the_account() -> None:
    """HELLO answers the challenge with the provider's signature and carries asks, capacity and software."""
    async with connected() as (node, connection):
        assert connection.hello.connect.message.provider == PROVIDER.address
        assert connection.hello.asks == tuple(Signed(ask.message, ask.signature) for ask in node.asks)
        assert connection.hello.listing.capacities == {0: Capacity(2, 3)}
        assert connection.hello.software.startswith("tallystick-node/")
        assert (connection.hello.replicas, connection.hello.resume) == (True, True)
        event, link = await node.next_event()
        assert (event, link.coordinator) == ("connected", COORDINATOR.address)


@pytest.mark.parametrize("payer_asks", [True, False])
async def test_asks_for_some_payers(payer_asks: bool) -> None:
    """A coordinator that would offer them to everybody gets the others alone, at the handshake and later."""
    asks = make_asks(OFFER, for_payers(OFFER, OFFER.prices, PayerRule(settled=Amount(1)))).current
    listed = [ask.digest for ask in (asks if payer_asks else asks[:1])]
    async with FakeCoordinator(payer_asks=payer_asks).serving() as coordinator:
        node = Node(coordinator.url)
        node.asks = asks
        async with node.running():
            connection = await coordinator.connections.get()
            assert [ask.verify(DOMAIN).digest for ask in connection.hello.asks] == listed
            await node.next_event()
            node.link.announce_asks()
            await connection.until(Kind.ASKS, 1)
            [payload] = connection.of(Kind.ASKS)
            assert [ask.verify(DOMAIN).digest for ask in Listing.from_json(loads(payload, "asks")).asks] == listed


async def test_frames_go_both_ways_in_order() -> None:
    """Posted frames arrive in order, and the coordinator's frames reach the handler."""
    async with connected() as (node, connection):
        _, link = await node.next_event()
        connection.confirm = False
        for number in range(100):
            link.post(Kind.CHUNK, JOB, bytes((number,)))
            await link.drain()
        await connection.until(Kind.CHUNK, 100)
        assert connection.of(Kind.CHUNK) == [bytes((number,)) for number in range(100)]
        for kind in (Kind.DISPATCH, Kind.CANCEL, Kind.CREDIT, Kind.RECEIPT_ACK, Kind.RESUME):
            await connection.send(kind, JOB, b"payload")
            assert await node.next_event() == (kind.name, (JOB, b"payload"))


async def test_heartbeats_follow_the_free_slots() -> None:
    """A BEAT carries the capacity of a slot group that changed, in either direction. What changed back meanwhile is not told."""
    async with connected() as (node, connection):

        async def beat(number: int) -> Capacities:
            return Beat.from_json(loads(await connection.until(Kind.BEAT, number), "beat")).capacities

        assert await beat(1) == {}, "a sign of life"
        node.capacity = Capacity(1, 3)
        node.link.announce_capacity()
        assert await beat(2) == {0: Capacity(1, 3)}, "a job took a slot"
        node.capacity = Capacity(0, 3)
        node.link.announce_capacity()
        await asyncio.sleep(0)
        node.capacity = Capacity(1, 3)  # a short job
        node.link.announce_capacity()
        node.link.announce_capacity()
        node.capacity = Capacity(2, 3)
        node.link.announce_capacity()
        assert await beat(3) == {0: Capacity(2, 3)}, "a slot is free again"


async def test_a_free_slot_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator may have jobs for it, while it counts the jobs that it sends here itself."""
    async with connected() as (node, connection):
        node.capacity = Capacity(0, 3)
        node.link.announce_capacity()
        await connection.until(Kind.BEAT, 2)
        monkeypatch.setattr(link, "_MIN_BEAT_SECONDS", 3_600.0)
        node.capacity = Capacity(1, 3)
        node.link.announce_capacity()
        assert Beat.from_json(loads(await connection.until(Kind.BEAT, 3), "beat")).capacities == {0: Capacity(1, 3)}


class _Shared:
    """An observer of a link that is not the only one."""

    shares_slots = True

    def replicas_listed(self, link: NodeLink, coordinator: Address, urls: tuple[str, ...]) -> None:
        """Nothing follows."""

    def link_changed(self) -> None:
        """Nothing follows."""


@pytest.mark.parametrize("taken", [False, True], ids=["it stays free", "a job of another link takes it"])
async def test_several_links_tell_of_a_free_slot_at_random_times(monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    """Who hears of it first may take it, so the times are drawn. A link does not tell of a slot that was taken meanwhile."""
    monkeypatch.setattr(link, "_SHARED_BEAT_SECONDS", 0.2)
    drawn = asyncio.Event()

    def draw() -> float:
        drawn.set()
        return 0.5

    async with connected(observer=_Shared(), jitter=draw) as (node, connection):
        node.capacity = Capacity(0, 3)
        node.link.announce_capacity()
        await connection.until(Kind.BEAT, 2)
        drawn.clear()
        node.capacity = Capacity(1, 3)
        node.link.announce_capacity()
        await drawn.wait()
        assert len(connection.of(Kind.BEAT)) == 2
        if taken:
            node.capacity = Capacity(0, 3)
            node.link.announce_capacity()
            await asyncio.sleep(0.3)  # what does not happen has no event
            assert len(connection.of(Kind.BEAT)) == 2
            node.capacity = Capacity(2, 3)
            node.link.announce_capacity()
        beat = Beat.from_json(loads(await connection.until(Kind.BEAT, 3), "beat"))
        assert beat.capacities == {0: node.capacity}


async def test_a_node_without_news_gives_signs_of_life() -> None:
    """Empty beats come at the interval of the settings."""
    async with connected(settings=replace(QUICK, heartbeat_seconds=0.05)) as (_, connection):
        assert Beat.from_json(loads(await connection.until(Kind.BEAT, 4), "beat")).capacities == {}


async def test_a_beat_passes_a_new_head_of_the_match_log_on_once() -> None:
    """The coordinator is told the newest head that this node knows of its log: with one beat, and again once it is newer."""
    heads = [b"first"]
    async with connected(log_head=lambda coordinator: heads[-1] if coordinator == COORDINATOR.address else b"") as (
        node,
        connection,
    ):

        async def next_head() -> bytes:
            beats = len(connection.of(Kind.BEAT))
            node.capacity = Capacity(node.capacity.free + 1, 30)
            node.link.announce_capacity()
            beat = Beat.from_json(loads(await connection.until(Kind.BEAT, beats + 1), "beat"))
            assert beat.capacities == {0: node.capacity}
            return beat.log_head

        assert Beat.from_json(loads(await connection.until(Kind.BEAT), "beat")).log_head == b"first"
        assert await next_head() == b""
        heads.append(b"second")
        assert [await next_head() for _ in range(2)] == [b"second", b""]


async def test_an_accept_leaves_with_the_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for one, whatever job that is of, but not for long, and goes first."""
    other = JobId(b"o" * 16)
    async with connected() as (node, connection):
        _, session = await node.next_event()
        session.post(Kind.ACCEPT, JOB)
        await connection.until(Kind.ACCEPT)
        monkeypatch.setattr(link_session, "HOLD_SECONDS", 3_600.0)
        session.post(Kind.ACCEPT, JOB)
        session.post(Kind.ACCEPT, other)
        session.post(Kind.CHUNK, other, b"sealed")
        await connection.until(Kind.CHUNK)
        assert [(kind, job) for kind, job, _ in connection.frames if kind is not Kind.BEAT][-3:] == [
            (Kind.ACCEPT, JOB),
            (Kind.ACCEPT, other),
            (Kind.CHUNK, other),
        ]
        session.post(Kind.ACCEPT, other)
        await node.link.close()
        await connection.until(Kind.ACCEPT, 3)


async def test_only_so_many_accepts_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs begin at once."""
    monkeypatch.setattr(link_session, "HOLD_SECONDS", 3_600.0)
    async with connected() as (node, connection):
        _, session = await node.next_event()
        for _ in range(QUICK.outbox_frames + 1):
            session.post(Kind.ACCEPT, JOB)
        await connection.until(Kind.ACCEPT, QUICK.outbox_frames)


async def test_changed_asks_are_announced() -> None:
    """New asks replace the former ones at the coordinator, on the open link."""
    async with connected() as (node, connection):
        await node.next_event()
        node.asks = make_asks(replace(OFFER, model="another")).current
        node.link.announce_asks()
        while True:
            count = len(connection.of(Kind.ASKS))
            (ask,) = read_asks(loads(await connection.until(Kind.ASKS, count or 1), "asks")["asks"])
            if ask.message.model == "another":
                break
            await connection.until(Kind.ASKS, count + 1)


async def test_a_lost_link_is_reopened() -> None:
    """The handler learns when the coordinator goes away; when it is back, the node connects again with current asks."""
    coordinator = FakeCoordinator()
    async with coordinator.serving():
        node = Node(coordinator.url)
        async with node.running():
            first = await coordinator.connections.get()
            event, former = await node.next_event()
            assert event == "connected"
            await first.socket.close(1012, "restart")
            assert await node.next_event() == ("disconnected", former)
            with pytest.raises(LinkLost):
                await former.drain()
            former.post(Kind.CHUNK, JOB, b"goes nowhere")
            node.asks = ()
            second = await coordinator.connections.get()
            assert (await node.next_event())[1] is not former
            assert len(second.hello.asks) <= 1


async def _waits(drop: Callable[[Connection], Awaitable[None]], times: int = 4) -> list[float]:
    """How long a node waits after each of some connections that end in the same way."""
    async with FakeCoordinator().serving() as coordinator:
        with capture_logs() as logs:
            async with Node(coordinator.url).running() as node:
                for _ in range(times):
                    connection = await coordinator.connections.get()
                    assert (await node.next_event())[0] == "connected"
                    await drop(connection)
                    assert (await node.next_event())[0] == "disconnected"
                await coordinator.connections.get()
    return [entry["retry_seconds"] for entry in logs if entry["event"] == "no connection to the coordinator"][:times]


async def test_a_coordinator_that_restarts_often_is_joined_again_at_once() -> None:
    """However short its connections were: the wait does not grow from one that the coordinator took to the next."""

    async def restart(connection: Connection) -> None:
        connection.socket.transport.abort()

    assert len(set(await _waits(restart))) == 1


async def test_a_coordinator_that_refuses_is_asked_less_and_less() -> None:
    """After an error or a broken protocol the wait grows up to its limit, as when nobody answers."""

    async def refuse(connection: Connection) -> None:
        error = Refusal(Code.NODE_GONE, "another connection of this provider took its place")
        await connection.send(Kind.ERROR, NO_JOB, dumps(error.as_json()))
        await connection.socket.close()

    async def babble(connection: Connection) -> None:
        await connection.socket.send("text")
        await connection.closed.wait()

    for drop in (refuse, babble):
        waits = await _waits(drop)
        assert waits == sorted(waits)
        assert waits[-1] > waits[0]


async def test_a_coordinator_that_is_down_is_tried_again() -> None:
    """A node that starts before its coordinator connects as soon as there is one."""
    coordinator = FakeCoordinator()
    async with coordinator.serving():
        port = coordinator.port
    async with Node(f"ws://127.0.0.1:{port}").running() as node:
        await node.troubled("refused", "Connect")
        async with coordinator.serving(port):
            await coordinator.connections.get()
            assert (await node.next_event())[0] == "connected"


@pytest.mark.parametrize(
    "message",
    [
        "text",
        b"",
        b"short",
        bytes((250,)) + JOB,
        pack_link(Kind.MATCH, JOB),
        pack_link(Kind.WELCOME),
        pack_link(Kind.HELLO, payload=b"{}"),
        pack_link(Kind.ERROR, payload=b"not json"),
    ],
)
async def test_a_malformed_frame_only_closes_the_link(message: str | bytes) -> None:
    """A malformed frame ends the connection with a log message; the node connects again and works."""
    with capture_logs() as logs:
        async with FakeCoordinator().serving() as coordinator, Node(coordinator.url).running() as node:
            first = await coordinator.connections.get()
            await first.socket.send(message)
            await first.closed.wait()
            second = await coordinator.connections.get()
            assert [(await node.next_event())[0] for _ in range(3)] == ["connected", "disconnected", "connected"]
            await second.send(Kind.CANCEL, JOB)
            assert (await node.next_event())[0] == "CANCEL"
    assert any(entry["event"] == "the coordinator broke the protocol" for entry in logs)


async def test_a_bad_payload_closes_the_link_too() -> None:
    """A payload that the handler cannot read ends the connection as well."""
    async with FakeCoordinator().serving() as coordinator, Node(coordinator.url).running() as node:
        first = await coordinator.connections.get()
        node.handler.fault = BadMessage("credit: expected 4 bytes")
        await first.send(Kind.CREDIT, JOB, b"1")
        await first.closed.wait()
        await coordinator.connections.get()


async def test_a_refusal_is_logged() -> None:
    """The operator can read why the coordinator closes the link."""
    async with connected() as (node, connection):
        error = Refusal(Code.NODE_GONE, "another connection of this provider took its place")
        with capture_logs() as logs:
            await connection.send(Kind.ERROR, NO_JOB, dumps(error.as_json()))
            await connection.socket.close()
            await node.next_event()
            assert (await node.next_event())[0] == "disconnected"
    assert "took its place" in str(logs)


async def test_another_deployment_is_not_joined() -> None:
    """A coordinator of another chain or contract is detected before anything is signed for it."""
    other = FakeCoordinator(domain=replace(DOMAIN, chain_id=1))
    async with other.serving(), Node(other.url).running() as node:
        await node.troubled("deployment")
    assert other.connections.empty()


async def test_only_the_configured_coordinator() -> None:
    """With a coordinator account in the config, no other account gets a signature."""
    coordinator = FakeCoordinator()
    stranger = Address("0x" + "11" * 20)
    async with coordinator.serving(), Node(coordinator.url, coordinator=stranger).running() as node:
        await node.troubled(stranger)
    assert coordinator.connections.empty()


@pytest.mark.parametrize("first", [b"nonsense", "text", pack_link(Kind.WELCOME), pack_link(Kind.CHALLENGE, payload=b"{}")])
async def test_a_bad_handshake_is_survived(first: bytes | str) -> None:
    """A server that does not speak the protocol is left with a log message, and tried again later."""
    attempts: asyncio.Queue[None] = asyncio.Queue()

    async def attend(socket: ServerConnection) -> None:
        attempts.put_nowait(None)
        await socket.send(first)
        await socket.wait_closed()

    async with serve(attend, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with Node(f"ws://127.0.0.1:{port}").running() as node:
            await attempts.get()
            await attempts.get()
            assert node.link.problem
    assert node.handler.events.empty()


async def test_drain_waits_for_a_full_outbox() -> None:
    """`drain` waits while a coordinator does not read, and raises once the link is lost."""

    class Stuck:
        paused = True

        async def send(self, _frame: bytes) -> None:
            await asyncio.Event().wait()

    session = LinkSession(Stuck(), COORDINATOR.address, 4)  # type: ignore[arg-type]
    writer = asyncio.create_task(session.write())
    for _ in range(5):
        session.post(Kind.CHUNK, JOB)
    waiting = asyncio.create_task(session.drain())
    await asyncio.sleep(0)
    assert not waiting.done()
    session.close()
    with pytest.raises(LinkLost):
        await waiting
    writer.cancel()


async def test_the_outbox_is_limited() -> None:
    """Answers to a coordinator that sends and never reads are queued up to a limit; then the link ends."""
    asking = FakeCoordinator()
    async with asking.serving(), Node(asking.url).running() as node:
        connection = await asking.connections.get()
        _, link = await node.next_event()
        most = MAX_OUTBOX_FACTOR * QUICK.outbox_frames
        for _ in range(3 * most):
            link.post(Kind.FAIL, JOB, bytes(100_000))
        assert len(link._outbox) <= most
        assert link.socket.transport.get_write_buffer_size() < 1 << 20, "what waits for the system is bounded too"
        assert await node.next_event() == ("disconnected", link)
        assert "does not read" in link.problem
        await connection.closed.wait()
        again = await asking.connections.get()
        assert again.hello.asks


async def test_the_endpoint_is_the_dialled_address() -> None:
    """The endpoint is the address in the config, whatever account answers there."""
    async with connected() as (node, connection):
        _, link = await node.next_event()
        assert link.endpoint == connection.hello.connect.message.endpoint == node.link.url.removeprefix("ws://").partition("/")[0]


async def test_queued_frames_are_sent_before_closing() -> None:
    """Closing a link sends what was posted before."""
    coordinator = FakeCoordinator(acknowledge=False)
    async with coordinator.serving(), Node(coordinator.url).running() as node:
        connection = await coordinator.connections.get()
        _, link = await node.next_event()
        for _ in range(50):
            link.post(Kind.RECEIPT, JOB, b"x" * 10_000)
        await node.link.close()
        await connection.closed.wait()
        assert len(connection.of(Kind.RECEIPT)) == 50


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8420", "ws://127.0.0.1:8420/v1/node"),
        ("https://coordinator.example/", "wss://coordinator.example/v1/node"),
        ("wss://coordinator.example/eu", "wss://coordinator.example/eu/v1/node"),
        ("ws://coordinator.example/v1/node", "ws://coordinator.example/v1/node"),
        ("coordinator.example:8420", "ws://coordinator.example:8420/v1/node"),
    ],
)
def test_urls_are_completed(given: str, url: str) -> None:
    """A coordinator's URL may have any form that clients accept."""
    assert node_url(given) == url


@pytest.mark.parametrize("given", ["ftp://coordinator.example", "http://", ""])
def test_other_urls_are_refused(given: str) -> None:
    """A malformed URL is refused at once."""
    with pytest.raises(BadMessage):
        node_url(given)
