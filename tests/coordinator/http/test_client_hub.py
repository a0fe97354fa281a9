"""Client links over real sockets: many jobs on one connection, each with all that the HTTP route promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import structlog

from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits, JobLimits
from coordinator.http import client_hub
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.job_link import (
    CREDIT_BYTES,
    FRAME_HEAD,
    LINK_STREAM,
    MAX_CLIENT_MESSAGE,
    MAX_SUBMISSION,
    WINDOW_BYTES,
    pack_greeting,
    pack_number,
    pack_orders,
    pack_record,
    pack_submit,
)
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount, JobId
from tallystick.protocol.wire import Kind, Submission, dumps
from tests.coordinator.harness import LAST_CHUNK, FakeNode, World, make_submission, person, quiet
from tests.coordinator.live_server import LinkClient, LinkNode, Served, served, until

ANN = person("ann")
LINGER = 30


@pytest.fixture
async def at() -> AsyncIterator[Served]:
    """A market that is served."""
    async with served() as running:
        yield running


async def _state(at: Served, job: JobId) -> State:
    known = await at.store.job(job)
    assert known is not None
    return known.record.state


async def _dispatched(node: FakeNode, job: JobId) -> None:
    await until(lambda: node.got(Kind.DISPATCH, job))


async def test_a_job_on_a_link(at: Served) -> None:
    """A job's stream has the frames that the HTTP route answers, then its end; several nodes' jobs share the link."""
    node, client = await LinkNode.join(at, ANN), await LinkClient.join(at)
    stream = await client.submit(make_submission(node.asks[0]))
    job, receipt = await node.take_job()
    await node.send(Kind.ACCEPT, job)
    await node.send(Kind.CHUNK, job, b"sealed")
    await node.finish(job, receipt)
    await client.expect(stream, Kind.END)
    assert client.kinds(stream) == [Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT, Kind.END]
    assert [payload for kind, payload in client.frames[stream] if kind is Kind.CHUNK] == [b"sealed", LAST_CHUNK]
    assert client.frames[stream][-2][1] == receipt.to_bytes()
    at.world.assert_idle()


async def test_a_thousand_jobs_on_one_link() -> None:
    """All of them run at once, each stream has its own frames, and nothing is left."""
    world = World(limits=JobLimits(jobs_per_payer=2_000, jobs_per_node=2_000))
    async with served(world, intake=IntakeLimits(jobs_per_address=2_000)) as at:
        world.funds.free[person("payer").address] = Amount(10**9)
        node, client = world.node("ann", slots=2_000), await LinkClient.join(at)
        jobs = [world.submission(node) for _ in range(1_000)]
        streams = [await client.submit(submission) for submission in jobs]
        for submission in jobs:
            await _dispatched(node, submission.job)
        for submission in jobs:
            node.chunk(submission.job, submission.job)
        for submission in reversed(jobs):
            node.complete(submission.job)
        for stream, submission in zip(streams, jobs, strict=True):
            await client.expect(stream, Kind.END)
            assert client.kinds(stream) == [Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT, Kind.END]
            assert client.frames[stream][1][1] == submission.job
        world.assert_idle()
        assert at.app.clients._jobs == set()


async def test_a_slow_reader_holds_no_other_one_up(at: Served) -> None:
    """A stream gets no more than its window until its client grants more; the link's other streams go on meanwhile."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    slow, fast = at.world.submission(node), at.world.submission(node)
    first, second = await client.submit(slow), await client.submit(fast)
    await _dispatched(node, fast.job)
    chunk, sent = bytes(60_000), 30
    for _ in range(sent):
        node.chunk(slow.job, chunk)
    node.complete(fast.job)
    await client.expect(second, Kind.END)
    granted = WINDOW_BYTES // (len(chunk) + FRAME_HEAD) + 1
    await client.expect(first, Kind.CHUNK, granted)
    await asyncio.sleep(0)
    assert client.kinds(first).count(Kind.CHUNK) == granted, "the window, and no more than one frame beyond it"
    node.complete(slow.job)
    while Kind.END not in client.kinds(first):
        await client.send(first, Kind.CREDIT, pack_number(CREDIT_BYTES))
        await client._receive()
    assert client.kinds(first).count(Kind.CHUNK) == sent + 1
    at.world.assert_idle()


@pytest.mark.parametrize("how", ["leave", "close", "kill"])
async def test_a_client_that_leaves(at: Served, how: str) -> None:
    """Its job is cancelled and driven to its receipt: whether it leaves the stream, closes the link or is killed."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission = at.world.submission(node)
    stream = await client.submit(submission)
    await client.expect(stream, Kind.MATCH)
    if how == "leave":
        await client.send(stream, Kind.LEAVE)
    elif how == "close":
        await client.socket.close()
    else:
        client.socket.transport.abort()
    await until(lambda: node.got(Kind.CANCEL, submission.job))
    node.complete(submission.job, outcome=Outcome.CLIENT_CANCELLED)
    await until(lambda: at.world.market.live == 0)
    assert await _state(at, submission.job) is State.CANCELLED
    assert node.got(Kind.RECEIPT_ACK) == [b""]
    at.world.assert_idle()


async def test_a_client_that_leaves_before_its_job_is_admitted(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is cancelled as soon as it is admitted, and no node gets it."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission, admitted, place_order = at.world.submission(node), asyncio.Event(), at.world.market.place_order

    async def slow(placed: Submission, _trace: object) -> Any:
        await admitted.wait()
        return await place_order(placed)

    monkeypatch.setattr(at.world.market, "place_order", slow)
    await client.submit(submission)
    await until(lambda: at.app.clients._jobs)
    await client.socket.close()
    await until(lambda: at.app.clients.connected == 0)
    admitted.set()
    await until(lambda: not at.app.clients._jobs)
    assert node.got(Kind.DISPATCH) == []
    assert await _state(at, submission.job) is State.CANCELLED
    at.world.assert_idle()


async def test_cancel_waits_for_the_receipt(at: Served) -> None:
    """CANCEL stops the job at its node; the stream still ends with the receipt of what was delivered."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission = at.world.submission(node)
    stream = await client.submit(submission)
    await client.expect(stream, Kind.MATCH)
    await client.send(stream, Kind.CANCEL)
    await until(lambda: node.got(Kind.CANCEL, submission.job))
    node.complete(submission.job, outcome=Outcome.CLIENT_CANCELLED)
    await client.expect(stream, Kind.END)
    assert client.kinds(stream)[-2:] == [Kind.RECEIPT, Kind.END]
    at.world.assert_idle()


async def test_a_lost_link_is_resumed(at: Served) -> None:
    """A job that lingers goes on without its link. The same bytes on another link get all frames from the first on, once more
    after its end too; other bytes, and the same without linger, are a replay.
    """
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission = at.world.submission(node)
    stream = await client.submit(submission, LINGER)
    await client.expect(stream, Kind.MATCH)
    node.chunk(submission.job, b"before")
    await client.expect(stream, Kind.CHUNK)
    client.socket.transport.abort()
    await until(lambda: at.app.clients.connected == 0)
    node.chunk(submission.job, b"meanwhile")
    back = await LinkClient.join(at)
    again = await back.submit(submission, LINGER)
    await back.expect(again, Kind.CHUNK, 2)
    node.complete(submission.job)
    await back.expect(again, Kind.END)
    late = await back.submit(submission, LINGER)
    await back.expect(late, Kind.END)
    assert back.frames[late] == back.frames[again]
    assert [payload for _, payload in back.frames[late][1:3]] == [b"before", b"meanwhile"]
    assert node.got(Kind.CANCEL) == []
    for other in (await back.submit(submission), await back.submit(replace(submission, sealed=b"other"), LINGER)):
        assert (await back.refusal(other)).code is Code.ORDER_REPLAYED
    at.world.assert_idle()


async def test_a_job_that_lingers_is_cancelled_when_nobody_comes_back(at: Served) -> None:
    """Its linger is over: it is cancelled. Two streams of one link may read it, and the leaving of one ends nothing."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission = at.world.submission(node)
    first = await client.submit(submission, 0)
    await client.expect(first, Kind.MATCH)
    second = await client.submit(submission, 0)
    await client.expect(second, Kind.MATCH)
    await client.send(first, Kind.LEAVE)
    node.chunk(submission.job)
    await client.expect(second, Kind.CHUNK)
    assert node.got(Kind.CANCEL) == []
    await client.send(second, Kind.LEAVE)
    await until(lambda: node.got(Kind.CANCEL, submission.job))
    node.complete(submission.job, outcome=Outcome.CLIENT_CANCELLED)
    await until(lambda: at.world.market.live == 0)
    at.world.assert_idle()


async def test_long_kept_responses_come_in_pieces(at: Served) -> None:
    """A kept response that is longer than the window is sent on as the client reads it."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission = at.world.submission(node)
    stream = await client.submit(submission, LINGER)
    await client.expect(stream, Kind.MATCH)
    for _ in range(10):
        node.chunk(submission.job, bytes(100_000))
    node.complete(submission.job)
    while Kind.END not in client.kinds(stream):
        await client.send(stream, Kind.CREDIT, pack_number(2 * CREDIT_BYTES))
        await client._receive()
    again = await client.submit(submission, LINGER)
    await client.expect(again, Kind.CHUNK, 2)
    assert client.kinds(again).count(Kind.CHUNK) < 4
    while Kind.END not in client.kinds(again):
        await client.send(again, Kind.CREDIT, pack_number(2 * CREDIT_BYTES))
        await client._receive()
    assert client.frames[again] == client.frames[stream]


# Refusals


async def test_a_refused_job_ends_its_stream_alone(at: Served) -> None:
    """Whatever is wrong with a submission, its stream ends with the error, and the link serves the next one."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    good, poor = at.world.submission(node), at.world.submission(node, payer=person("poor"))
    unsigned = good.dumps()[:40] + bytes(len(good.dumps()) - 40)
    cases = {b"": Code.BAD_MESSAGE, b"junk": Code.BAD_MESSAGE, unsigned: Code.BAD_MESSAGE, poor.dumps(): Code.INSUFFICIENT_FUNDS}
    for body, code in cases.items():
        assert (await client.refusal(await client.submit(body))).code is code
    stream = await client.submit(good)
    await _dispatched(node, good.job)
    node.complete(good.job)
    await client.expect(stream, Kind.END)
    at.world.assert_idle()
    assert at.app.clients._service.bodies.open == 0


async def test_a_bug_in_one_job_is_told_logged_and_counted(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client is told whose fault it is, the log has the error and its status, and the link serves the next job."""
    node, client, place_order = at.world.node("ann"), await LinkClient.join(at), at.world.market.place_order

    async def broken(_placed: Submission, _trace: object) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(at.world.market, "place_order", broken)
    with structlog.testing.capture_logs() as logged:
        error = await client.refusal(await client.submit(at.world.submission(node)))
        await until(lambda: not at.app.clients._jobs)
    assert (error.code, error.fault) == (Code.COORDINATOR_UNAVAILABLE, Fault.COORDINATOR)
    assert [entry["event"] for entry in logged if entry["log_level"] == "error"] == ["bug in a job of a link"]
    assert [entry["status"] for entry in logged if entry["event"] == "request" and entry["method"] == "SUBMIT"] == [503]
    monkeypatch.setattr(at.world.market, "place_order", place_order)
    good = at.world.submission(node)
    stream = await client.submit(good)
    await _dispatched(node, good.job)
    node.complete(good.job)
    await client.expect(stream, Kind.END)


async def test_submissions_that_are_too_long_go_by_http(at: Served) -> None:
    """A submission beyond what a link carries is refused by its size."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission = replace(at.world.submission(node), sealed=bytes(MAX_SUBMISSION))
    assert (await client.refusal(await client.submit(submission))).code is Code.BODY_TOO_LARGE
    smaller = replace(at.world.submission(node), sealed=bytes(MAX_SUBMISSION - 2_000))
    stream = await client.submit(smaller)
    await client.expect(stream, Kind.MATCH)
    node.complete(smaller.job)
    await client.expect(stream, Kind.END)


async def test_limits_per_address_hold_on_links_too() -> None:
    """Jobs under way, bytes of bodies and refused submissions count for the address, whichever way they come."""
    intake = IntakeLimits(jobs_per_address=2, address_bytes=10_000, refused_per_second=0.001, refused_burst=2)
    async with served(intake=intake) as at:
        node, client = at.world.node("ann"), await LinkClient.join(at)
        running = [at.world.submission(node) for _ in range(2)]
        for submission in running:
            await client.expect(await client.submit(submission), Kind.MATCH)
        third = await client.refusal(await client.submit(at.world.submission(node)))
        assert (third.code, third.status, third.retry) == (Code.RATE_LIMITED, 429, True)
        node.complete(running[0].job)
        await client.expect(1, Kind.END)
        large = replace(at.world.submission(node), sealed=bytes(9_000))
        assert (await client.refusal(await client.submit(large))).code is Code.RATE_LIMITED
        for _ in range(2):
            assert (await client.refusal(await client.submit(b"junk"))).code is Code.BAD_MESSAGE
        refused = await client.refusal(await client.submit(at.world.submission(node)))
        assert (refused.code, "had to be refused" in str(refused)) == (Code.RATE_LIMITED, True)
        assert (await at.post(at.world.submission(node))).status_code == 429
        assert (await (await LinkClient.open(at)).refusal()).code is Code.RATE_LIMITED


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("text", "binary"),
        (b"", "empty"),
        (bytes(7), "begin a record"),
        (bytes(8), "record of 1 to"),
        (b"\0\0\0\1\0\0\0\5\x20\0\0\0", "record of 1 to"),
        (b"\0\0\0\1\0\0\0\4\x20\0\0\0", "begin a frame"),
        (b"\0\0\0\1\0\0\0\5\x20\0\0\0\1", "frame of at most"),
        (pack_record(1, Kind.CHUNK), "that clients send"),
        (pack_record(LINK_STREAM, Kind.LEAVE), "that clients send"),
        (pack_record(LINK_STREAM, Kind.HELLO, pack_greeting()), "that clients send"),
        (b"\0\0\0\1\0\0\0\5\xff\0\0\0\0", "known kind"),
        (pack_record(LINK_STREAM, Kind.SUBMIT, pack_submit(b"", None)), "a stream above 0"),
        (pack_record(1, Kind.SUBMIT, pack_submit(b"", None)) * 2, "a stream above 1"),
        (pack_record(1, Kind.SUBMIT, b"abc"), "submit.linger"),
        (pack_record(1, Kind.SUBMIT, pack_submit(b"", None)) + pack_record(1, Kind.CREDIT, b"abc"), "credit"),
        (pack_record(1, Kind.SUBMIT, pack_submit(b"", 1)) + pack_record(1, Kind.CANCEL), "cancel"),
    ],
)
async def test_a_client_that_breaks_the_rules(at: Served, message: str | bytes, text: str) -> None:
    """It gets the error, its link is closed, and its jobs end as those of any client that left."""
    client = await LinkClient.join(at)
    await client.socket.send(message)
    error = await client.refusal()
    assert isinstance(error, BadMessage) or error.code is Code.BAD_MESSAGE
    assert text in str(error)
    assert await client.closed() == 1002
    await until(lambda: at.app.clients.connected == 0 and not at.app.clients._jobs)
    at.world.assert_idle()


@pytest.mark.parametrize(
    ("greeting", "text"),
    [
        (pack_record(1, Kind.SUBMIT, pack_submit(b"", None)), "expected HELLO"),
        (pack_record(LINK_STREAM, Kind.HELLO, b"{"), "not JSON"),
        (pack_record(LINK_STREAM, Kind.HELLO, b"[]"), "JSON object"),
        (pack_record(LINK_STREAM, Kind.HELLO, b"{}"), "too old: upgrade it"),
        (pack_record(LINK_STREAM, Kind.HELLO, dumps({"protocol": 99})), "speaks protocol 99"),
        (pack_record(LINK_STREAM, Kind.HELLO, dumps({"protocol": 2, "software": 7})), "hello.software"),
    ],
)
async def test_a_greeting_that_is_wrong(at: Served, greeting: bytes, text: str) -> None:
    """A client without HELLO, or of another protocol, is told so and disconnected."""
    client = await LinkClient.open(at)
    await client.socket.send(greeting)
    assert text in str(await client.refusal())
    assert await client.closed() == 1002


async def test_a_client_that_never_greets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its link is closed after a while."""
    monkeypatch.setattr(client_hub, "HELLO_SECONDS", 0.05)
    async with served() as at:
        client = await LinkClient.open(at)
        assert "expected HELLO within" in str(await client.refusal())
        assert await client.closed() == 1002


async def test_messages_have_a_size(at: Served) -> None:
    """Before its HELLO, and after it, a client whose message is too long is disconnected."""
    for client, size in ((await LinkClient.open(at), 5_000), (await LinkClient.join(at), MAX_CLIENT_MESSAGE + 1)):
        await client.socket.send(bytes(size))
        assert await client.closed() == 1009


async def test_links_of_an_address_are_counted(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further links than an address may have are refused; a closed one makes room."""
    monkeypatch.setattr(client_hub, "CLIENT_LINKS", 2)
    first, _ = await LinkClient.join(at), await LinkClient.join(at)
    third = await LinkClient.open(at)
    assert (await third.refusal()).code is Code.RATE_LIMITED
    assert await third.closed() == 1013
    await first.socket.close()
    await until(lambda: at.app.clients._links_by_address.total() == 1)
    await LinkClient.join(at)


async def test_frames_that_no_job_asked_for_are_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that floods its link with frames of streams that have ended is read slowly, and nothing is sent to it."""
    monkeypatch.setattr(resource_bounds, "FRAMES_PER_SECOND", 1)
    monkeypatch.setattr(resource_bounds, "FRAMES_BURST", 10)
    async with served() as at:
        client = await LinkClient.join(at)
        link = next(iter(at.app.clients._links))
        await client.socket.send(pack_record(7, Kind.LEAVE) * 10)
        await client.socket.send(pack_record(7, Kind.LEAVE))
        await until(lambda: link._throttled is not None)
        assert client.kinds(LINK_STREAM) == [Kind.WELCOME]
        await client.socket.close()


@pytest.mark.parametrize(("refused", "slow"), [(b"junk", True), (None, False)])
async def test_refused_jobs_slow_their_link_down(monkeypatch: pytest.MonkeyPatch, refused: bytes | None, slow: bool) -> None:
    """A client that submits what must be refused is read slowly; one whose jobs meet no free provider is not."""
    monkeypatch.setattr(resource_bounds, "FRAMES_PER_SECOND", 0.001)
    monkeypatch.setattr(resource_bounds, "FRAMES_BURST", 10)
    async with served() as at:
        node, client = at.world.node("ann"), await LinkClient.join(at)
        node.leave()
        link = next(iter(at.app.clients._links))
        for _ in range(3):
            submission = refused or replace(at.world.submission(node), wait=0).dumps()
            await client.refusal(await client.submit(submission))
        assert (link._throttled is not None) is slow


# Time and ends


async def test_a_client_that_takes_nothing(at: Served) -> None:
    """A stream whose client grants nothing for long is ended, and its job cancelled; the link stays."""
    at.app.clients._stall_seconds = 0.05
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission, other = at.world.submission(node), at.world.submission(node)
    stream = await client.submit(submission)
    await client.expect(stream, Kind.MATCH)
    for _ in range(10):
        node.chunk(submission.job, bytes(60_000))
    error = await client.refusal(stream)
    assert (error.code, isinstance(error, Unavailable)) == (Code.TIMED_OUT, True)
    await until(lambda: node.got(Kind.CANCEL, submission.job))
    node.complete(submission.job, outcome=Outcome.CLIENT_CANCELLED)
    second = await client.submit(other)
    await _dispatched(node, other.job)
    node.complete(other.job)
    await client.expect(second, Kind.END)
    at.world.assert_idle()


async def test_a_stopping_coordinator_ends_its_links(at: Served) -> None:
    """Jobs in flight tell their clients how they ended, then the links are closed; new jobs and links are refused before."""
    node, client = await LinkNode.join(at, ANN), await LinkClient.join(at)
    stream = await client.submit(make_submission(node.asks[0]))
    await client.expect(stream, Kind.MATCH)
    draining = asyncio.create_task(at.world.market.drain(0.01))
    await draining
    refused = await client.refusal(await client.submit(at.world.submission(at.world.node("bob"))))
    assert refused.code is Code.COORDINATOR_UNAVAILABLE
    await at.hub.close()
    await at.app.clients.close()
    assert await client.closed() == 1001
    assert client.kinds(stream)[-2:] == [Kind.FAIL, Kind.END]
    assert (await (await LinkClient.open(at)).refusal()).code is Code.COORDINATOR_UNAVAILABLE


async def test_a_link_that_reads_nothing_at_all_is_bounded(at: Served) -> None:
    """While the connection is full, the jobs of the link wait and its frames are not read; then all goes on."""
    node, client = at.world.node("ann", slots=100), await LinkClient.join(at)
    jobs = [at.world.submission(node) for _ in range(60)]
    client.socket.transport.pause_reading()
    for submission in jobs:
        await client.submit(submission)
    link = next(iter(at.app.clients._links))
    for submission in jobs:
        await _dispatched(node, submission.job)
        for _ in range(20):
            node.chunk(submission.job, bytes(60_000))
    await until(lambda: link.paused)
    await quiet()
    sent = sum(stream.sent_bytes for stream in link.streams.values())
    assert sent < len(jobs) * 60_000 * 5, "less than the windows of all, as the connection was full before"
    client.socket.transport.resume_reading()
    for number, submission in enumerate(jobs, 1):
        node.complete(submission.job)
        while Kind.END not in client.kinds(number):
            await client.send(number, Kind.CREDIT, pack_number(CREDIT_BYTES))
            await client._receive()
    at.world.assert_idle()


# Further orders, places, and what operators see


async def test_places_and_further_orders(at: Served) -> None:
    """A job that waits is told its place; ORDERS that cannot be used are answered with the reason, and the job waits on."""
    node, client = at.world.node("ann", slots=1), await LinkClient.join(at)
    busy, waiting = at.world.submission(node), at.world.submission(node)
    first, second = await client.submit(busy), await client.submit(waiting)
    assert b"position" in await client.expect(second, Kind.BEAT)
    stranger = make_submission(at.world.node("bob").ask, job=waiting.job, payer=person("other"))
    await client.send(second, Kind.ORDERS, pack_orders(stranger.candidates))
    assert b"order_terms" in await client.expect(second, Kind.ADDED)
    await client.send(second, Kind.ORDERS, b"junk")
    assert b"bad_message" in await client.expect(second, Kind.ADDED, 2)
    node.complete(busy.job)
    await client.expect(first, Kind.END)
    await _dispatched(node, waiting.job)
    node.complete(waiting.job)
    await client.expect(second, Kind.END)
    at.world.assert_idle()


async def test_jobs_of_links_are_counted(at: Served) -> None:
    """The metrics count a link's jobs by their outcome, as those of the HTTP route."""
    node, client = at.world.node("ann"), await LinkClient.join(at)
    submission = at.world.submission(node)
    stream = await client.submit(submission)
    await _dispatched(node, submission.job)
    node.complete(submission.job)
    await client.expect(stream, Kind.END)
    await client.refusal(await client.submit(b"junk"))
    await until(lambda: not at.app.clients._jobs)
    text = (await at.http.get("/metrics")).text
    assert 'outcome="completed"' in text
    assert 'outcome="bad_message"' in text
