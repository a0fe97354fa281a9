"""The client's link against coordinators that say what the test says: honest, lost at any time, hostile, or without links."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator import job_link
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.coordinator.job_link import LinkJobStream
from tallystick.client.coordinator.job_links import JobLinks
from tallystick.client.coordinator.job_stream import JobStream, Sink, StreamLost
from tallystick.client.coordinator.transport import ConnectionLost, NotSent
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.job_link import (
    CREDIT_BYTES,
    FRAME_HEAD,
    LINK_STREAM,
    MAX_SUBMISSION,
    WINDOW_BYTES,
    pack_greeting,
    pack_record,
    read_number,
    read_orders,
    read_records,
    read_submit,
)
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import MAX_FRAME, Kind, dumps
from tests.coordinator.harness import make_ask, make_submission, person
from tests.coordinator.live_server import until

TIMEOUT_SECONDS = 60
CONFIG = ClientConfig(connect_seconds=30)
REFUSED = Refusal(Code.ORDER_EXPIRED, "order.deadline: passed")


class Peer:
    """The coordinator's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.frames: list[tuple[int, Kind, bytes]] = []
        """What came and was not looked at."""

    async def send(self, stream: int, kind: Kind, payload: bytes = b"") -> None:
        await self.socket.send(pack_record(stream, kind, payload))

    async def expect(self, kind: Kind) -> tuple[int, bytes]:
        """Returns stream and payload of the next frame of this kind; others are dropped."""
        while True:
            while not self.frames:
                self.frames.extend(read_records(await self.socket.recv(decode=False)))
            stream, got, payload = self.frames.pop(0)
            if got is kind:
                return stream, payload

    async def welcome(self) -> None:
        await self.expect(Kind.HELLO)
        await self.send(LINK_STREAM, Kind.WELCOME, pack_greeting())


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def _coordinator(*scripts: Script, config: ClientConfig = CONFIG) -> AsyncIterator[CoordinatorClient]:
    """A client of a coordinator that follows a script per connection; the last one for all further ones."""
    opened, failures = 0, list[BaseException]()

    async def follow(socket: ServerConnection) -> None:
        nonlocal opened
        script = scripts[min(opened, len(scripts) - 1)]
        opened += 1
        try:
            await script(Peer(socket))
        except ConnectionClosed:
            pass
        except Exception as error:  # noqa: BLE001 - raised below, in the test
            failures.append(error)

    async with asyncio.timeout(TIMEOUT_SECONDS), serve(follow, "127.0.0.1", 0, compression=None, max_size=None) as server:
        port = server.sockets[0].getsockname()[1]
        async with CoordinatorClient(f"http://127.0.0.1:{port}", config) as client:
            yield client
    if failures:
        raise failures[0]


async def _stay(peer: Peer) -> None:
    """Keeps the connection open until the client closes it."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            await peer.socket.recv()


async def _read_all(stream: JobStream) -> list[tuple[Kind, bytes]]:
    frames: list[tuple[Kind, bytes]] = []
    while not frames or frames[-1][0] is not Kind.RECEIPT:
        frames.extend(await stream.read())
    return frames


async def _answer(peer: Peer) -> None:
    """Serves every job of a connection: its own bytes as a chunk, then a receipt."""
    await peer.welcome()
    while True:
        stream, payload = await peer.expect(Kind.SUBMIT)
        for kind, data in ((Kind.MATCH, b""), (Kind.CHUNK, read_submit(payload)[1]), (Kind.RECEIPT, b"")):
            await peer.send(stream, kind, data)
        await peer.send(stream, Kind.END)


async def test_jobs_share_one_connection() -> None:
    """A hundred jobs at once go over one connection, and each gets its own frames."""
    opened: list[Peer] = []

    async def script(peer: Peer) -> None:
        opened.append(peer)
        await _answer(peer)

    async def one_job(client: CoordinatorClient, number: int) -> None:
        stream = await client.submit(b"job %d" % number)
        assert await _read_all(stream) == [(Kind.MATCH, b""), (Kind.CHUNK, b"job %d" % number), (Kind.RECEIPT, b"")]
        stream.close()

    async with _coordinator(script) as client:
        await asyncio.gather(*(one_job(client, number) for number in range(100)))
        link = client._links_of(client.url)._link
        assert link is not None
        assert link.streams == {}
    assert len(opened) == 1


async def test_what_a_submission_says() -> None:
    """The linger and the bytes arrive as they were given; without linger the job ends with its client."""
    got: list[tuple[int | None, bytes]] = []

    async def script(peer: Peer) -> None:
        await peer.welcome()
        for _ in range(2):
            stream, payload = await peer.expect(Kind.SUBMIT)
            got.append(read_submit(payload))
            await peer.send(stream, Kind.BEAT)
        await _stay(peer)

    async with _coordinator(script) as client:
        await client.submit(b"ordinary")
        await client.submit(b"keyed", linger=60)
    assert got == [(None, b"ordinary"), (60, b"keyed")]


async def test_a_refused_job() -> None:
    """The coordinator's refusal is raised as it is, and the link serves the next job."""

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.ERROR, dumps(REFUSED.as_json()))
        await _answer_rest(peer)

    async def _answer_rest(peer: Peer) -> None:
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.MATCH)
        await _stay(peer)

    async with _coordinator(script) as client:
        with pytest.raises(Refusal) as refused:
            await client.submit(b"x")
        assert (refused.value.code, str(refused.value)) == (REFUSED.code, str(REFUSED))
        assert await (await client.submit(b"y")).read() == [(Kind.MATCH, b"")]


async def test_a_link_that_was_just_closed() -> None:
    """A job whose link is lost before anything came is sent once more, on another link."""

    async def lose(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect(Kind.SUBMIT)
        peer.socket.transport.abort()

    async with _coordinator(lose, _answer) as client:
        assert len(await _read_all(await client.submit(b"x"))) == 3


@pytest.mark.parametrize("keyed", [True, False])
async def test_a_coordinator_that_is_killed_again(keyed: bool) -> None:
    """If it is lost twice, nobody knows whether the coordinator has the job; only a job with a key may be sent again."""

    async def lose(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect(Kind.SUBMIT)
        peer.socket.transport.abort()

    async with _coordinator(lose) as client:
        with pytest.raises(ConnectionLost) as lost:
            await client.submit(b"x", linger=60 if keyed else None)
        assert lost.value.retry is keyed


async def test_a_job_that_had_been_admitted() -> None:
    """If the second link calls the job a replay, it had been admitted: its outcome is unknown, and it is not refused."""

    async def lose(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect(Kind.SUBMIT)
        peer.socket.transport.abort()

    async def replayed(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.ERROR, dumps(Refusal(Code.ORDER_REPLAYED, "placed before").as_json()))
        await _stay(peer)

    async with _coordinator(lose, replayed) as client:
        with pytest.raises(ConnectionLost):
            await client.submit(b"x")


async def test_a_link_lost_in_the_middle() -> None:
    """What came before can be read, then every stream of the link says that it was lost; the next job opens another link."""

    async def lose(peer: Peer) -> None:
        await peer.welcome()
        for _ in range(2):
            stream, _ = await peer.expect(Kind.SUBMIT)
            await peer.send(stream, Kind.CHUNK, b"part")
        await peer.expect(Kind.CREDIT)
        peer.socket.transport.abort()

    async with _coordinator(lose, _answer) as client:
        streams = [await client.submit(b"x"), await client.submit(b"y")]
        link = client._links_of(client.url)._link
        assert link is not None
        link.post(pack_record(1, Kind.CREDIT, bytes(4)))
        for stream in streams:
            assert await stream.read() == [(Kind.CHUNK, b"part")]
            with pytest.raises(StreamLost):
                await stream.read()
            assert not stream.cancel()
        assert len(await _read_all(await client.submit(b"z"))) == 3


@pytest.mark.parametrize(
    ("last", "payload"),
    [(Kind.RECEIPT, b""), (Kind.FAIL, b""), (Kind.VOID, b""), (Kind.BEAT, b""), (Kind.CHUNK, bytes(CREDIT_BYTES))],
)
async def test_a_reader_of_a_whole_answer_is_woken_once(last: Kind, payload: bytes) -> None:
    """Matches and chunks wait for another frame, or until they fill the stream's share, and then come together."""
    release = asyncio.Event()
    before = [(Kind.MATCH, b"m"), (Kind.HEDGE, b"h"), (Kind.CHUNK, b"head"), (Kind.CHUNK, b"part")]

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        for kind, data in before:
            await peer.send(stream, kind, data)
        await release.wait()
        await peer.send(stream, last, payload)
        await _stay(peer)

    async with _coordinator(script) as client:
        stream = await client.submit(b"x")
        assert isinstance(stream, LinkJobStream)
        reading = asyncio.create_task(_read_whole(stream))
        while len(stream._frames) < len(before):  # noqa: ASYNC110 - frames have no event here
            await asyncio.sleep(0.01)
        assert not reading.done()
        release.set()
        assert await asyncio.wait_for(reading, 60) == [*before, (last, payload)]


async def _read_whole(stream: LinkJobStream) -> list[tuple[Kind, bytes]]:
    return list(await stream.read(whole=True))


async def test_chunks_go_to_the_sink_while_the_reader_waits() -> None:
    """A chunk that the sink refuses, and everything after it, goes to the reader; what the sink took is granted again."""
    taken: list[bytes] = []
    granted: list[int] = []
    big = bytes(CREDIT_BYTES)

    def sink(payload: bytes) -> bool:
        if payload == b"refused":
            return False
        taken.append(payload)
        return True

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.MATCH)
        await peer.expect(Kind.CREDIT)  # the test reads
        for payload in (b"first", big, b"refused"):
            await peer.send(stream, Kind.CHUNK, payload)
        granted.append(read_number((await peer.expect(Kind.CREDIT))[1], "credit"))
        await peer.send(stream, Kind.CHUNK, b"last")
        await peer.send(stream, Kind.RECEIPT)
        await _stay(peer)

    async with _coordinator(script) as client:
        stream = await client.submit(b"x")
        assert list(await stream.read(sink=sink)) == [(Kind.MATCH, b"")]  # it had come, and nothing waited
        reading = asyncio.create_task(_read_with(stream, sink))
        await asyncio.sleep(0)
        link = client._links_of(client.url)._link
        assert link is not None
        link.post(pack_record(1, Kind.CREDIT, bytes(4)))
        frames = await asyncio.wait_for(reading, 60)
        while frames[-1][0] is not Kind.RECEIPT:
            frames += await stream.read()
        assert frames == [(Kind.CHUNK, b"refused"), (Kind.CHUNK, b"last"), (Kind.RECEIPT, b"")]
        assert taken == [b"first", big]
    assert granted == [2 * FRAME_HEAD + len(b"first") + len(big) + FRAME_HEAD]


async def _read_with(stream: JobStream, sink: Sink) -> list[tuple[Kind, bytes]]:
    return list(await stream.read(sink=sink))


@pytest.mark.parametrize("end", ["lost", "closed by the coordinator", "cancelled here"])
async def test_a_whole_answer_that_ends_early_is_read_at_once(end: str) -> None:
    """What had come of it is read when the stream is lost, and when its job is cancelled."""

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.MATCH)
        await peer.send(stream, Kind.CHUNK, b"part")
        if end == "lost":
            await peer.expect(Kind.CREDIT)
            peer.socket.transport.abort()
        elif end == "closed by the coordinator":
            await peer.expect(Kind.CREDIT)
            await peer.send(stream, Kind.END)
        await _stay(peer)

    async with _coordinator(script) as client:
        stream = await client.submit(b"x")
        assert isinstance(stream, LinkJobStream)
        reading = asyncio.create_task(_read_whole(stream))
        while len(stream._frames) < 2:  # noqa: ASYNC110 - frames have no event here
            await asyncio.sleep(0.01)
        assert not reading.done()
        if end == "cancelled here":
            assert stream.cancel()
        else:
            link = client._links_of(client.url)._link
            assert link is not None
            link.post(pack_record(1, Kind.CREDIT, bytes(4)))
        assert await asyncio.wait_for(reading, 60) == [(Kind.MATCH, b""), (Kind.CHUNK, b"part")]


@pytest.mark.parametrize("end", [Kind.END, Kind.ERROR])
async def test_a_stream_that_ends_before_its_job(end: Kind) -> None:
    """A stream that ends without the job's end was lost, with the coordinator's reason; it is no refusal any more."""

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.MATCH)
        await peer.send(stream, end, dumps(REFUSED.as_json()) if end is Kind.ERROR else b"")
        await _stay(peer)

    async with _coordinator(script) as client:
        stream = await client.submit(b"x")
        assert await stream.read() == [(Kind.MATCH, b"")]
        with pytest.raises(StreamLost, match="passed" if end is Kind.ERROR else "closed"):
            await stream.read()


async def test_a_reader_grants_what_it_read() -> None:
    """Credit is granted for what was read, once it is worth a frame; nothing is granted for what nobody read."""
    chunk = bytes(CREDIT_BYTES // 2)
    granted: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        for _ in range(4):
            await peer.send(stream, Kind.CHUNK, chunk)
        while sum(granted) <= 4 * (len(chunk) + FRAME_HEAD) - CREDIT_BYTES:
            granted.append(read_number((await peer.expect(Kind.CREDIT))[1], "credit"))
        await peer.send(stream, Kind.RECEIPT)
        await _stay(peer)

    async with _coordinator(script) as client:
        assert len(await _read_all(await client.submit(b"x"))) == 5
    assert min(granted) >= CREDIT_BYTES


async def test_a_coordinator_that_sends_more_than_was_granted() -> None:
    """Its stream is given up as its fault, and what is held of it stays bounded."""

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        for _ in range(3 + (WINDOW_BYTES + MAX_FRAME) // 100_000):
            await peer.send(stream, Kind.CHUNK, bytes(100_000))
        await peer.expect(Kind.LEAVE)
        await _stay(peer)

    async with _coordinator(script) as client:
        stream = await client.submit(b"x")
        link = client._links_of(client.url)._link
        assert link is not None
        await until(lambda: not link.streams)
        await stream.read()
        with pytest.raises(BadMessage) as broken:
            await stream.read()
        assert broken.value.fault is Fault.COORDINATOR


@pytest.mark.parametrize(
    "message",
    ["text", b"", b"junk", pack_record(1, Kind.MATCH)[:-1], pack_record(0, Kind.CHUNK), pack_record(0, Kind.WELCOME, b"{")],
)
async def test_a_coordinator_that_breaks_the_rules(message: str | bytes) -> None:
    """The link is given up, with what was wrong; its jobs' outcomes are unknown."""

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.MATCH)
        await peer.expect(Kind.CANCEL)
        await peer.socket.send(message)
        await _stay(peer)

    async with _coordinator(script) as client:
        stream = await client.submit(b"x")
        await stream.read()
        assert stream.cancel()
        with pytest.raises(StreamLost):
            await stream.read()
        link = client._links_of(client.url)._link
        assert link is not None
        assert not link.usable


async def test_leaving_and_finishing() -> None:
    """A client that stops reading says so, but not of a job that has ended."""
    left: list[int] = []

    async def note(peer: Peer) -> None:
        seen: list[tuple[int, Kind]] = []
        await peer.welcome()
        kinds = iter((Kind.MATCH, Kind.RECEIPT, Kind.FAIL))
        while True:
            for stream, kind, _ in read_records(await peer.socket.recv(decode=False)):
                seen.append((stream, kind))
                if kind is Kind.SUBMIT and (answer := next(kinds, None)) is not None:
                    await peer.send(stream, answer)
                elif kind is Kind.SUBMIT:
                    left.extend(number for number, other in seen if other is Kind.LEAVE)
                    await peer.send(stream, Kind.MATCH)

    async with _coordinator(note) as client:
        for _ in range(3):
            (await client.submit(b"x")).close()
        await client.submit(b"the last")
    assert left == [1]


async def test_a_submission_that_is_given_up() -> None:
    """A client that stops waiting for the answer leaves the stream."""

    async def script(peer: Peer) -> None:
        await peer.welcome()
        submitted.set()
        stream, _ = await peer.expect(Kind.SUBMIT)
        assert (await peer.expect(Kind.LEAVE))[0] == stream
        left.set()

    submitted, left = asyncio.Event(), asyncio.Event()
    async with _coordinator(script) as client:
        call = asyncio.create_task(client.submit(b"x"))
        await submitted.wait()
        await until(lambda: client._links_of(client.url).in_use)
        call.cancel()
        await left.wait()
        await asyncio.gather(call, return_exceptions=True)


@pytest.mark.parametrize("first", [True, False])
async def test_a_coordinator_that_falls_silent(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """A stream on which nothing comes for long is given up; before its first frame, the outcome is unknown."""
    monkeypatch.setattr(job_link, "SWEEP_SECONDS", 0.02)

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        if not first:
            await peer.send(stream, Kind.MATCH)
        await _stay(peer)

    async with _coordinator(script, config=replace(CONFIG, stream_idle_seconds=0.05)) as client:
        if first:
            with pytest.raises(ConnectionLost, match="nothing came for"):
                await client.submit(b"x")
            return
        stream = await client.submit(b"x")
        await stream.read()
        with pytest.raises(StreamLost, match="nothing came for"):
            await stream.read()


async def test_further_orders_on_the_link() -> None:
    """They go on the job's own stream; the coordinator's answer is a success or its refusal."""
    ann = person("ann")
    candidates = make_submission(make_ask(ann), job=JobId(bytes(16))).candidates

    async def script(peer: Peer) -> None:
        await peer.welcome()
        stream, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(stream, Kind.BEAT)
        for answer in (b"", dumps(REFUSED.as_json())):
            number, payload = await peer.expect(Kind.ORDERS)
            assert (number, read_orders(payload)) == (stream, list(candidates))
            await peer.send(stream, Kind.ADDED, answer)
        await peer.expect(Kind.ORDERS)
        peer.socket.transport.abort()

    async with _coordinator(script) as client:
        stream = await client.submit(b"x")
        assert await stream.add_orders(candidates)
        with pytest.raises(Refusal):
            await stream.add_orders(candidates)
        with pytest.raises(StreamLost):
            await stream.add_orders(candidates)
        assert not await stream.add_orders(candidates)


# Coordinators without a link


async def test_another_protocol_is_said_and_not_worked_around() -> None:
    """A coordinator of another protocol says what to upgrade."""

    async def script(peer: Peer) -> None:
        await peer.expect(Kind.HELLO)
        await peer.send(LINK_STREAM, Kind.ERROR, dumps(BadMessage("hello.protocol: expected 3, got 2").as_json()))
        await _stay(peer)

    async def newer(peer: Peer) -> None:
        await peer.expect(Kind.HELLO)
        await peer.send(LINK_STREAM, Kind.WELCOME, dumps({"protocol": 3}))
        await _stay(peer)

    async with _coordinator(script, newer) as client:
        with pytest.raises(TallyError, match="expected 3, got 2"):
            await client.submit(b"x")
        with pytest.raises(TallyError, match="upgrade this side"):
            await client.submit(b"x")


async def test_a_coordinator_without_room_for_a_link() -> None:
    """Jobs go by HTTP for a while, if the coordinator refuses a link for now."""

    async def full(peer: Peer) -> None:
        await peer.expect(Kind.HELLO)
        await peer.send(LINK_STREAM, Kind.ERROR, dumps(Unavailable(Code.RATE_LIMITED, "256 links").as_json()))
        await _stay(peer)

    async with _coordinator(full) as client:
        assert await client._links_of(client.url).find(1) is None
        assert client._links_of(client.url)._without_until > asyncio.get_running_loop().time()
        assert await client._links_of(client.url).find(1) is None


async def test_nobody_there_and_large_submissions() -> None:
    """Without a coordinator the submission was not sent, each time; a large submission never goes on a link."""
    async with serve(_close, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
    async with CoordinatorClient(f"http://127.0.0.1:{port}", CONFIG) as client:
        for _ in range(2):
            with pytest.raises(NotSent):
                await client.submit(b"x")
        assert client._links_of(client.url)._without_until == 0
    assert await JobLinks("http://127.0.0.1:1", CONFIG).find(MAX_SUBMISSION + 1) is None


async def _close(socket: ServerConnection) -> None:
    await socket.close()


async def test_an_old_coordinator_gets_jobs_by_http() -> None:
    """A server that opens no WebSocket gets jobs by HTTP, and is not asked again for a minute. Redirects are not followed."""
    requests: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        if requests[-1].startswith(b"POST"):
            assert await reader.readexactly(1) == b"x"
        writer.write(
            b"HTTP/1.1 307 Moved\r\nlocation: http://elsewhere.example/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, asyncio.timeout(TIMEOUT_SECONDS):
        port = server.sockets[0].getsockname()[1]
        async with CoordinatorClient(f"http://127.0.0.1:{port}", CONFIG) as client:
            for _ in range(2):
                with pytest.raises(BadMessage, match="redirects to"):
                    await client.submit(b"x")
    assert [request.split()[1] for request in requests] == [b"/v1/link", b"/v1/jobs", b"/v1/jobs"]


async def test_a_link_whose_coordinator_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that wait for a provider are given up, and new ones go elsewhere. A job that a provider has goes on to its end."""
    go_on, waits = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        matched, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(matched, Kind.MATCH)
        waiting, _ = await peer.expect(Kind.SUBMIT)
        await peer.send(waiting, Kind.BEAT)
        waits.set()
        await go_on.wait()
        await peer.send(matched, Kind.CHUNK, b"late")
        await peer.send(matched, Kind.RECEIPT)
        await _stay(peer)
        ended.set()

    ended = asyncio.Event()
    async with _coordinator(script, _answer) as client:
        first = await client.submit(b"\0" + bytes(16))
        assert isinstance(first, LinkJobStream)
        assert await first.read() == [(Kind.MATCH, b"")]
        links = next(iter(client._links.values()))
        assert links.quiet_since is None, "no job waits for a provider"
        second = await client.submit(b"\0" + bytes(15) + b"\1")
        await waits.wait()
        assert await second.read() == [(Kind.BEAT, b"")]
        assert links.quiet_since is not None
        links.abandon("it hangs")
        with pytest.raises(StreamLost, match="it hangs"):
            await second.read()
        third = await client.submit(b"\0" + bytes(15) + b"\2")
        assert (await _read_all(third))[-1] == (Kind.RECEIPT, b"")
        go_on.set()
        assert await _read_all(first) == [(Kind.CHUNK, b"late"), (Kind.RECEIPT, b"")]
        first.close()
        await ended.wait()  # nobody needs its connection any more
