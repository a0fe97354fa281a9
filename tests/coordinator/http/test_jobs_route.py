"""Jobs over real HTTP: the whole path, malformed submissions, and clients that leave or stop reading."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits
from coordinator.domain.reputation import UNKNOWN_PROVIDER
from coordinator.http import request_bodies
from coordinator.http.job_service import JobService
from coordinator.http.jobs_route import JobsRoute
from coordinator.http.response_buffer import Retention
from coordinator.jobs.live_job import LiveJob
from coordinator.jobs.market import Market
from coordinator.ports import ResponseStore
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import Code, Unavailable, error_from_json
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.types import Amount, JobId
from tallystick.protocol.wire import Dispatch, FrameReader, Kind, Submission, dumps
from tests.coordinator.harness import (
    CAP,
    DOMAIN,
    LAST_CHUNK,
    PAYER,
    START,
    World,
    altered,
    make_receipt,
    make_submission,
    person,
    quiet,
    with_orders,
)
from tests.coordinator.live_server import LinkNode, Served, frames_of, served, until

ANN = person("ann")


def _route(market: Market, store: ResponseStore | None = None, *, stall_seconds: float = 45, **settings: Any) -> JobsRoute:
    """The route with a service of its own."""
    return JobsRoute(JobService(market, store, **settings), stall_seconds=stall_seconds)


async def _refusal(response: httpx.Response) -> tuple[int, str]:
    """Returns status and code of an error in OpenAI's shape."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "fault", "retry"}
    assert error["message"]
    assert error_from_json(response.json(), response.status_code).status == response.status_code
    return response.status_code, error["code"]


async def _stored(at: Served, job: JobId) -> State:
    known = await at.store.job(job)
    assert known is not None
    return known.record.state


# Complete jobs


async def test_a_job_over_http(at: Served) -> None:
    """The response to a job is a stream of frames: match, chunks, receipt; then it ends."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    async with at.http.stream("POST", "/v1/jobs", content=submission.dumps()) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/vnd.tallystick.frames"
        assert response.headers["x-tally-job"] == submission.job.hex()
        frames = frames_of(response)
        assert (await anext(frames))[0] is Kind.MATCH
        job, receipt = await node.take_job()
        await node.send(Kind.ACCEPT, job)
        await node.send(Kind.CHUNK, job, b"sealed")
        assert await anext(frames) == (Kind.CHUNK, b"sealed")
        await node.finish(job, receipt)
        assert await anext(frames) == (Kind.CHUNK, LAST_CHUNK)
        assert [frame async for frame in frames] == [(Kind.RECEIPT, receipt.to_bytes())]
    assert await _stored(at, job) is State.COMPLETED
    at.world.assert_idle()


async def test_a_failure_is_the_last_frame(at: Served) -> None:
    """A job that fails after its admission reports that in its stream, since the status was sent."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    response_task = asyncio.create_task(at.post(submission))
    job, _ = await node.take_job()
    error = Unavailable(Code.PROVIDER_FAILED, "out of memory")
    await node.send(Kind.FAIL, job, dumps(error.as_json()))
    response = await response_task
    assert response.status_code == 200
    assert dumps(error.as_json()) in response.content
    assert await _stored(at, job) is State.FAILED


# Refusals


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not a submission",
        b'{"model": "gpt"}',
        (8).to_bytes(4, "big") + b"not JSON",
        (2).to_bytes(4, "big") + b"{}",
        (4).to_bytes(4, "big") + b"null",
        b"\xff" * 100,
        dumps({"job": "00" * 16, "candidates": []}),
    ],
)
async def test_malformed_submissions(at: Served, body: bytes) -> None:
    """A body that does not parse is refused as such, and the process goes on."""
    assert await _refusal(await at.post(body)) == (400, "bad_message")


async def test_a_truncated_submission(at: Served) -> None:
    """A submission whose head is truncated anywhere is refused."""
    node = await LinkNode.join(at, ANN)
    whole = replace(make_submission(node.asks[0]), sealed=b"").dumps()
    for cut in (0, 1, 3, 17, 18, 19, 40, len(whole) // 2, len(whole) - len(b"wrapped") - 1):
        assert await _refusal(await at.post(whole[:cut])) == (400, "bad_message")
    assert at.world.market.live == 0


async def test_a_client_of_the_first_protocol_is_told_what_to_upgrade(at: Served) -> None:
    """It posts a JSON header behind its length. The coordinator's identity says which protocol it speaks."""
    header = dumps({"job": "00" * 16, "candidates": []})
    response = await at.post(len(header).to_bytes(4, "big") + header + b"sealed")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["fault"]) == (400, "bad_message", "client")
    assert "the client is too old: upgrade it to Tallystick 0.2.0 or later" in error["message"]


async def test_a_header_that_lies(at: Served) -> None:
    """A submission with orders of several payers, of another job, with other terms, or with too many orders is refused."""
    node = await LinkNode.join(at, ANN)
    good = make_submission(node.asks[0])
    other = make_submission(node.asks[0], payer=person("other"), job=good.job)
    longer = replace(good.candidates[0], terms=replace(good.candidates[0].terms, max_cost=Amount(1)))
    for bad in (
        replace(good, candidates=good.candidates + other.candidates),
        replace(good, job=JobId(b"\x07" * 16)),
        replace(good, candidates=(longer,)),
        replace(good, candidates=good.candidates * (MAX_CANDIDATES + 1)),
    ):
        assert await _refusal(await at.post(bad)) == (400, "bad_message")


async def test_too_large_a_body(at: Served) -> None:
    """A body above the limit is refused before it is read to its end."""
    at.world.node("ann")
    route = _route(at.world.market, intake=IntakeLimits(body_bytes=1_000))
    sent = await _call(route, [b"x" * 600, b"x" * 600, b"never read"])
    assert sent[0]["status"] == 413
    assert b"body_too_large" in sent[1]["body"]


async def test_all_bodies_together(world: World) -> None:
    """Bodies beyond what the coordinator can hold get rate_limited; a job that ended makes room."""
    route = _route(world.market, intake=IntakeLimits(total_body_bytes=1_000))
    for _ in range(3):
        assert (await _call(route, [b"x" * 600]))[0]["status"] == 400
    waiting = asyncio.create_task(_call(route, [b"x" * 600, b"y"], stall=True))
    await quiet()
    sent = await _call(route, [b"x" * 600])
    assert sent[0]["status"] == 429
    assert (b"retry-after", b"1") in sent[0]["headers"]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (await _call(route, [b"x" * 600]))[0]["status"] == 400


async def test_malformed_requests_are_rate_limited(world: World) -> None:
    """An address that sent too many malformed requests is refused unread for a while; others are not."""
    route = _route(world.market, intake=IntakeLimits(refused_per_second=0.001, refused_burst=3))
    seen = [(await _call(route, [b"nonsense"]))[0]["status"] for _ in range(5)]
    assert seen == [400, 400, 400, 429, 429]
    assert (await _call(route, [b"nonsense"], client="10.0.0.9"))[0]["status"] == 400


async def test_a_body_that_never_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does not send its body in time gets an error that says so."""
    monkeypatch.setattr(resource_bounds, "BODY_GRACE_SECONDS", 0.02)
    sent = await _call(_route(world.market), [b"some", b"more"], stall=True)
    assert sent[0]["status"] == 400
    assert b"must arrive within" in sent[1]["body"]


def _rich(submission: Submission) -> Submission:
    return with_orders(submission, lambda signed: altered(signed, lambda order: replace(order, ceiling=Amount(10**9))))


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"deadline": START - 1}, 400, "order_expired"),
        ({"deadline": START + 10**6}, 400, "order_terms"),
        ({"coordinator": PAYER.address}, 400, "order_misdirected"),
        ({"terms": {"input_price": 1}}, 400, "order_terms"),
        ({"terms": {"max_cost": Amount(10**9)}, "ceiling": Amount(10**9)}, 402, "insufficient_funds"),
        ({"ceiling": Amount(1)}, 402, "unauthorised_tab"),
        ({"payer": person("poor")}, 402, "insufficient_funds"),
        ({"terms": {"ask": bytes(32)}}, 503, "no_provider"),
    ],
)
async def test_refused_orders(at: Served, changes: dict[str, Any], status: int, code: str) -> None:
    """Each refusal has its own code and HTTP status, and nothing is dispatched."""
    node = await LinkNode.join(at, ANN)
    assert await _refusal(await at.post(make_submission(node.asks[0], **changes))) == (status, code)
    at.world.assert_idle()


async def test_a_forged_order(at: Served) -> None:
    """An order that was changed after it was signed is refused as not authentic."""
    node = await LinkNode.join(at, ANN)
    assert await _refusal(await at.post(_rich(make_submission(node.asks[0])))) == (401, "bad_signature")


async def test_a_replayed_job(at: Served) -> None:
    """Posting a job again is a conflict, while it runs and afterwards."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    response_task = asyncio.create_task(at.post(submission))
    job, receipt = await node.take_job()
    assert await _refusal(await at.post(submission)) == (409, "order_replayed")
    await node.finish(job, receipt)
    await response_task
    assert await _refusal(await at.post(submission)) == (409, "order_replayed")


# Jobs that outlive their connection

LINGER = {"x-tally-linger": "30"}


async def _begun(at: Served, submission: Submission) -> None:
    """Posts a job that lingers, reads its match and drops the connection."""
    async with at.http.stream("POST", "/v1/jobs", content=submission.dumps(), headers=LINGER) as response:
        frames = frames_of(response)
        assert (await anext(frames))[0] is Kind.MATCH
        await frames.aclose()


async def test_a_lost_connection_is_resumed(at: Served) -> None:
    """The same bytes posted again resume the same job with one receipt and one dispatch; after its end, the same response."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    await _begun(at, submission)
    job, receipt = await node.take_job()
    await node.send(Kind.CHUNK, job, b"one")
    async with at.http.stream("POST", "/v1/jobs", content=submission.dumps(), headers=LINGER) as response:
        frames = frames_of(response)
        assert [(await anext(frames))[0], await anext(frames)] == [Kind.MATCH, (Kind.CHUNK, b"one")]
        await node.send(Kind.CHUNK, job, b"two")
        assert await anext(frames) == (Kind.CHUNK, b"two")
        await node.finish(job, receipt)
        assert await anext(frames) == (Kind.CHUNK, LAST_CHUNK)
        assert [frame async for frame in frames] == [(Kind.RECEIPT, receipt.to_bytes())]
        first = response.status_code
    again = await at.http.post("/v1/jobs", content=submission.dumps(), headers=LINGER)
    kinds = [kind for kind, _ in FrameReader().feed(again.content)]
    assert (first, kinds) == (200, [Kind.MATCH, *[Kind.CHUNK] * 3, Kind.RECEIPT])
    seen = [kind for kind, _, _ in node.seen]
    assert (seen.count(Kind.DISPATCH), seen.count(Kind.CANCEL)) == (1, 0)
    at.world.assert_idle()


async def test_an_answer_after_a_restart(at: Served) -> None:
    """The same bytes posted to the next process get the same frames; other bytes are refused."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    post = asyncio.create_task(at.http.post("/v1/jobs", content=submission.dumps(), headers=LINGER))
    job, receipt = await node.take_job()
    await node.send(Kind.CHUNK, job, b"one")
    await node.finish(job, receipt)
    first = (await post).content
    await node.socket.close()
    await at.world.restart()
    async with served(at.world) as after:
        for _ in range(2):
            again = await after.http.post("/v1/jobs", content=submission.dumps(), headers=LINGER)
            assert (again.status_code, again.content) == (200, first)
        other = await after.http.post("/v1/jobs", content=replace(submission, sealed=b"other").dumps(), headers=LINGER)
        assert await _refusal(other) == (409, "order_replayed")


async def test_another_body_for_the_same_job(at: Served) -> None:
    """The response of a lingering job is given for the bytes that placed the job, not for others."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    await _begun(at, submission)
    response = await at.http.post("/v1/jobs", content=replace(submission, sealed=b"other").dumps(), headers=LINGER)
    assert await _refusal(response) == (409, "order_replayed")
    assert "another submission" in response.text


async def test_a_job_that_nobody_comes_back_for(at: Served) -> None:
    """When its linger is over, the job is cancelled like any other whose client left."""
    node = await LinkNode.join(at, ANN)
    async with at.http.stream(
        "POST", "/v1/jobs", content=make_submission(node.asks[0]).dumps(), headers={"x-tally-linger": "0"}
    ) as response:
        frames = frames_of(response)
        await anext(frames)
        await frames.aclose()
    job, _ = await node.take_job()
    assert await node.expect(Kind.CANCEL) == b"client"
    await node.finish(job, _cancelled(node))


async def test_a_refused_job_that_would_linger(at: Served) -> None:
    """A job that is not admitted is refused with its status and leaves nothing behind: it may be posted again."""
    node = await LinkNode.join(at, ANN, slots=0)
    submission = replace(make_submission(node.asks[0]), wait=0)
    for _ in range(2):
        response = await at.http.post("/v1/jobs", content=submission.dumps(), headers=LINGER)
        assert await _refusal(response) == (503, "node_busy")
    bad = await at.http.post("/v1/jobs", content=submission.dumps(), headers={"x-tally-linger": "soon"})
    assert await _refusal(bad) == (400, "bad_message")


@pytest.mark.parametrize(
    "linger",
    [b"9" * 400, b"9" * 5_000, b"-1", b"+1", b"1.5", b"1e3", b"", b"1 2", b"\xd9\xa3", b"0x10", b"1_0", b"nan", b"inf", b"\xff"],
)
async def test_a_linger_that_is_no_number_does_not_fail_the_coordinator(at: Served, linger: bytes) -> None:
    """Any malformed header gets a 400 that names it, and nothing is placed."""
    node = at.world.node("ann")
    headers = [(b"x-tally-linger", linger)]
    response_task = await at.http.post("/v1/jobs", content=make_submission(node.ask).dumps(), headers=headers)
    assert await _refusal(response_task) == (400, "bad_message")
    assert "x-tally-linger" in response_task.text
    at.world.assert_idle()


async def test_a_stranger_with_the_same_bytes_does_not_end_the_payers_job(at: Served) -> None:
    """A stranger that posts the same bytes without linger does not shorten the payer's: the payer still finds its job."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    await _begun(at, submission)
    job, receipt = await node.take_job()
    async with at.http.stream("POST", "/v1/jobs", content=submission.dumps(), headers={"x-tally-linger": "0"}) as response:
        frames = frames_of(response)
        await anext(frames)
        await frames.aclose()
    await asyncio.sleep(0.2)
    await node.send(Kind.CHUNK, job, b"\1the last")
    back = asyncio.create_task(at.http.post("/v1/jobs", content=submission.dumps(), headers=LINGER))
    await node.finish(job, receipt)
    kinds = [kind for kind, _ in FrameReader().feed((await back).content)]
    assert (kinds[:2], kinds[-1]) == ([Kind.MATCH, Kind.CHUNK], Kind.RECEIPT)
    assert [kind for kind, _, _ in node.seen if kind is Kind.CANCEL] == []


async def test_a_paid_response_is_not_lost_to_strangers() -> None:
    """Neither refused jobs nor another payer's responses evict a payer's response; without room in memory, the store has it."""
    retention = Retention(total_bytes=6_000, response_bytes=3_000, payer_bytes=3_000)
    world = World()
    rich = person("rich")
    world.funds.free[rich.address] = Amount(100_000)
    node = world.node("ann")
    route = _route(world.market, world.store, retention=retention)  # type: ignore[arg-type]

    async def run(payer: Signer, size: int, number: int) -> tuple[Submission, list[dict[str, Any]]]:
        submission = make_submission(node.ask, payer=payer, job=JobId(number.to_bytes(16, "big")))
        call = asyncio.create_task(_call(route, [submission.dumps()], headers=[(b"x-tally-linger", b"30")]))
        await until(lambda: node.got(Kind.DISPATCH, submission.job))
        node.chunk(submission.job, b"\1" + bytes(size))
        node.finish(submission.job, seq=number, cumulative_cost=Amount(20 * number))
        return submission, await call

    paid, first = await run(PAYER, 1_000, 1)
    for number in range(2, 12):
        poor = make_submission(node.ask, payer=person(f"poor {number}"), job=JobId(number.to_bytes(16, "little")))
        refused = await _call(route, [poor.dumps()], headers=[(b"x-tally-linger", b"30")])
        assert refused[0]["status"] == 402
    for number in range(12, 20):
        await run(rich, 2_000, number)
    again = await _call(route, [paid.dumps()], headers=[(b"x-tally-linger", b"30")])
    assert _content(again) == _content(first)
    route._service.buffers._evict(10**9, lambda: PAYER.address)
    again = await _call(route, [paid.dumps()], headers=[(b"x-tally-linger", b"30")])
    assert _content(again) == _content(first), "out of the store"


def _content(sent: list[dict[str, Any]]) -> bytes:
    return b"".join(event.get("body", b"") for event in sent)


async def test_a_body_counts_until_its_job_ends(world: World) -> None:
    """The bytes of a lingering job count until its end, even if its client left."""
    node = world.node("ann")
    route = _route(world.market, intake=IntakeLimits(address_bytes=3_000))
    submission = replace(make_submission(node.ask), sealed=bytes(1_500))
    call = asyncio.create_task(_call(route, [submission.dumps()], headers=[(b"x-tally-linger", b"30")]))
    await quiet()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    held = route._service.bodies.held
    assert held == len(submission.dumps())
    assert (await _call(route, [bytes(3_000 - held + 1)]))[0]["status"] == 429
    node.chunk(submission.job, b"\1")
    node.finish(submission.job)
    await until(lambda: route._service.bodies.held == 0)
    assert route._service.bodies.open == 0


@pytest.mark.parametrize("headers", [[], [(b"x-tally-linger", b"30")]])
async def test_a_waiting_job_holds_no_body(world: World, headers: list[tuple[bytes, bytes]]) -> None:
    """Neither the route nor the market keeps the body that the queued submission was read from, nor the request's headers."""
    node = world.node("ann", slots=1)
    world.funds.free[PAYER.address] = Amount(10 * CAP)
    await world.started(node)
    route, submission = _route(world.market), replace(world.submission(node), sealed=bytes(40_000))
    body = submission.dumps()
    tracemalloc.start()
    try:
        call = asyncio.create_task(_call(route, [body[:20_000], body[20_000:]], headers=headers))
        await quiet()
        bodies = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, request_bodies.__file__)])
    finally:
        tracemalloc.stop()
    assert world.market.waiting == 1
    assert sum(trace.size for trace in bodies.traces) < 10_000
    assert headers == [], "the request's headers are kept"
    world.market.cancel(submission.job)
    await call


async def test_a_stream_holds_no_chunk_that_was_sent(world: World) -> None:
    """Nor does it hold its match and its request, while it waits for the next chunk, which may be long in coming."""
    node = world.node("ann")
    submission, sent = world.submission(node), list[int]()

    async def send(event: Any) -> None:
        sent.append(len(event.get("body", b"")))

    call = asyncio.create_task(_call(_route(world.market), [submission.dumps()], send))
    await quiet()
    tracemalloc.start()
    try:
        node.chunk(submission.job, b"\1" * 500_000)
        await quiet()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(sent) > 500_000
    assert held < 100_000, f"{held} bytes"
    attempt = world.market.live_jobs[submission.job].current
    assert (attempt.match, attempt.draft) == (b"", None)
    node.complete(submission.job)
    await call


async def test_a_stream_takes_two_tasks(at: Served) -> None:
    """One serves the request and one drives the job: none waits for the client to leave."""
    node = await LinkNode.join(at, ANN)
    before = asyncio.all_tasks()
    async with at.http.stream("POST", "/v1/jobs", content=make_submission(node.asks[0]).dumps()) as response:
        frames = frames_of(response)
        await anext(frames)
        job, _ = await node.take_job()
        await node.send(Kind.CHUNK, job, b"sealed")
        await anext(frames)
        assert len(asyncio.all_tasks() - before) == 2
        await frames.aclose()
    await node.expect(Kind.CANCEL)
    await node.finish(job, _cancelled(node))


async def test_an_answer_that_is_read_again_counts_as_a_body(world: World) -> None:
    """A client that requests old responses and does not read them uses up its own share alone."""
    node = world.node("ann")
    route = _route(world.market, intake=IntakeLimits(address_bytes=10_000))
    submission = make_submission(node.ask)
    call = asyncio.create_task(_call(route, [submission.dumps()], headers=[(b"x-tally-linger", b"30")]))
    await quiet()
    node.chunk(submission.job, b"\1" + bytes(4_000))
    node.finish(submission.job)
    await call

    async def stall(_event: Any) -> None:
        await asyncio.Event().wait()

    lazy = [
        asyncio.create_task(_call(route, [submission.dumps()], stall, headers=[(b"x-tally-linger", b"30")])) for _ in range(5)
    ]
    await quiet()
    assert route._service.bodies.held <= 10_000
    refused = await _call(route, [submission.dumps()], headers=[(b"x-tally-linger", b"30")])
    assert refused[0]["status"] == 429
    for task in lazy:
        task.cancel()
    await asyncio.gather(*lazy, return_exceptions=True)
    assert route._service.bodies.held == 0


async def test_get_is_no_way_to_place_a_job(at: Served) -> None:
    """Another method on the route gets an error in the same shape."""
    assert await _refusal(await at.http.get("/v1/jobs")) == (404, "unknown_route")


# Disconnected clients


async def test_a_client_that_disconnects(at: Served) -> None:
    """A client that leaves cancels its job; the node's receipt is still stored and acknowledged."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    async with at.http.stream("POST", "/v1/jobs", content=submission.dumps()) as response:
        frames = frames_of(response)
        await anext(frames)
        job, _ = await node.take_job()
        await node.send(Kind.CHUNK, job, b"sealed")
        await anext(frames)
        await frames.aclose()
    await node.expect(Kind.CANCEL)
    await node.finish(job, _cancelled(node))
    await until(lambda: at.world.market.live == 0)
    assert await _stored(at, job) is State.CANCELLED
    assert set(at.store.receipts[job]) == {ANN.address}
    at.world.assert_idle()


def _cancelled(node: LinkNode) -> Verified[Receipt]:
    """Returns the receipt of the node's last job, as cancelled."""
    payload = next(payload for kind, _, payload in reversed(node.seen) if kind is Kind.DISPATCH)
    candidate = Dispatch.loads(payload).candidate
    return make_receipt(node.signer, candidate.order.verify(DOMAIN), candidate.terms, outcome=Outcome.CLIENT_CANCELLED)


async def _call(
    route: JobsRoute,
    body: list[bytes],
    send: Any = None,
    *,
    stall: bool = False,
    client: str = "10.0.0.1",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> list[dict[str, Any]]:
    """Calls the route as a server would and returns the sent events. With `stall`, the client never sends the last part."""
    sent: list[dict[str, Any]] = []
    parts = iter(body[:-1] if stall else body)

    async def receive() -> dict[str, Any]:
        part = next(parts, None)
        if part is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": part, "more_body": part is not body[-1]}

    async def note(event: Any) -> None:
        sent.append(dict(event))

    await route({"type": "http", "client": (client, 1), "headers": headers}, receive, send or note)
    return sent


async def test_a_client_that_stops_reading(world: World) -> None:
    """A client that takes nothing counts as gone: its job is cancelled, its receipt stored, and nothing hangs."""
    node = world.node("ann")
    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)
        if len(sent) == 3:
            await asyncio.Event().wait()

    submission = world.submission(node)
    call = asyncio.create_task(_call(_route(world.market, stall_seconds=0.05), [submission.dumps()], send))
    await quiet()
    for _ in range(5):
        node.chunk(submission.job)
    await until(lambda: node.got(Kind.CANCEL))
    node.complete(submission.job, outcome=Outcome.CLIENT_CANCELLED)
    await call
    assert len(sent) == 3, "nothing is written to it any more"
    assert node.got(Kind.RECEIPT_ACK) == [b""]
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score
    world.assert_idle()


async def test_a_connection_that_fails_at_the_first_byte(world: World) -> None:
    """A client that is lost before the response begins leaves no job behind."""
    node = world.node("ann")

    async def send(_event: Any) -> None:
        raise OSError("connection lost")

    submission = world.submission(node)
    call = asyncio.create_task(_call(_route(world.market), [submission.dumps()], send))
    await quiet()
    assert len(node.got(Kind.CANCEL)) == 1
    node.complete(submission.job, outcome=Outcome.CLIENT_CANCELLED)
    await call
    world.assert_idle()


async def test_a_client_that_leaves_before_its_job_is_admitted(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is cancelled as soon as it is admitted."""
    node = world.node("ann")
    submission = world.submission(node)
    admitted, gone = asyncio.Event(), asyncio.Event()
    place_order = world.market.place_order

    async def slow(placed: Submission, _trace: object) -> LiveJob:
        await admitted.wait()
        return await place_order(placed)

    monkeypatch.setattr(world.market, "place_order", slow)
    parts = iter([submission.dumps()])

    async def receive() -> dict[str, Any]:
        part = next(parts, None)
        if part is None:
            await gone.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": False}

    async def send(_event: Any) -> None:
        pass

    call = asyncio.create_task(_route(world.market)({"type": "http", "client": ("10.0.0.1", 1)}, receive, send))
    gone.set()
    await quiet()
    admitted.set()
    await call
    assert node.got(Kind.DISPATCH) == []
    known = await world.store.job(submission.job)
    assert known is not None
    assert known.record.state is State.CANCELLED
    world.assert_idle()


async def test_a_server_that_is_torn_down(world: World) -> None:
    """When the server cancels a request, its job fails at once, its node is told to stop, and nothing is held."""
    node = world.node("ann")
    submission = world.submission(node)
    call = asyncio.create_task(_call(_route(world.market), [submission.dumps()]))
    await quiet()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert node.got(Kind.CANCEL, submission.job) == [b"coordinator"]
    known = await world.store.job(submission.job)
    assert known is not None
    assert known.record.state is State.FAILED
    world.assert_idle()


async def test_a_client_that_leaves_while_it_posts(world: World) -> None:
    """A connection lost in the middle of the body places no job and gets no response."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        sent.append(event)

    await _route(world.market)({"type": "http"}, receive, send)
    assert sent == []
