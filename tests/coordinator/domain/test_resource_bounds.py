"""Limits on memory and work that one stranger can cause: tests of the numbers in resource_bounds.py over sockets."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from coordinator.config import CoordinatorConfig
from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits
from coordinator.domain.resource_bounds import CONTROL_CONCURRENCY, MAX_CONTROL_BODY, MAX_HELLO, MAX_LINK_FRAME
from coordinator.http import node_link
from coordinator.http.node_link import NodeLink
from coordinator.ports import node_subject
from coordinator.storage.store import ROOM_CHECK_INTERVAL
from tallystick.protocol.errors import Code, error_from_json
from tallystick.protocol.link import MAX_ASK_BYTES, MAX_NODE_ASK_BYTES, Capacity, Listing
from tallystick.protocol.messages import Spec
from tallystick.protocol.sealing import bucket
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import LINK_HEAD, NO_JOB, Kind, dumps, loads, pack_link
from tallystick.runtime import connection_limiter, logs
from tallystick.runtime.websocket import MAX_FRAGMENTS
from tests.coordinator.harness import PAYER, make_ask, make_claim, make_order, make_submission, make_terms, person, with_orders
from tests.coordinator.live_server import LinkNode, Served, served, until

ANN, BOB = person("ann"), person("bob")
FEW = 3


@pytest.fixture
async def small() -> Any:
    """A coordinator with small limits per address."""
    intake = IntakeLimits(refused_per_second=0.001, refused_burst=5, address_bytes=1 << 20, jobs_per_address=FEW)
    async with served(intake=intake, per_address=FEW) as at:
        yield at


def _free(at: Served) -> int | None:
    """Returns the free slots of Ann's node, as the coordinator knows them."""
    known = at.world.market.book.node(ANN.address)
    return None if known is None else known.free


# Node links


async def test_one_address_has_only_so_many_node_links(small: Served) -> None:
    """Links beyond an address's share are refused with the reason, before their HELLO too; a link that closes makes room."""
    nodes = [await LinkNode.join(small, person(f"node {n}")) for n in range(FEW - 1)]
    silent = await LinkNode.open(small, ANN)
    await silent.expect(Kind.CHALLENGE)
    refused = await LinkNode.open(small, BOB)
    error = await refused.refusal()
    assert (error.code, error.retry) == (Code.RATE_LIMITED, True)
    assert "3 node links" in str(error)
    assert small.hub.connected == FEW - 1
    await silent.socket.close()
    await nodes[0].socket.close()
    await until(lambda: small.hub.connected == FEW - 2)
    await LinkNode.join(small, BOB)


async def _largest(at: Served, frame: bytes) -> int | None:
    """Returns the code with which a new link is closed after this first frame; None if it gets an answer."""
    async with connect(at.node_url, proxy=None, compression=None, max_size=None) as socket:
        await socket.recv()
        try:
            await socket.send(frame)
            await socket.recv()
            await socket.recv()
        except ConnectionClosed:
            return socket.close_code
        return None


async def test_a_stranger_sends_no_large_frame_before_it_says_who_it_is(at: Served) -> None:
    """Before the HELLO, a frame may be as large as a HELLO with the largest asks; after it, as honest nodes' largest frame."""
    assert await _largest(at, bytes(MAX_HELLO + 1)) == 1009
    assert await _largest(at, pack_link(Kind.HELLO, NO_JOB, bytes(MAX_HELLO - LINK_HEAD))) == 1000
    node = await LinkNode.join(at, ANN)
    await node.send(Kind.CHUNK, NO_JOB, bytes(MAX_LINK_FRAME - LINK_HEAD))
    await node.send_beat(Capacity(1, 1))
    await until(lambda: _free(at) == 1)
    await node.send(Kind.CHUNK, NO_JOB, bytes(MAX_LINK_FRAME - LINK_HEAD + 1))
    with pytest.raises(ConnectionClosed):
        await node.expect(Kind.ERROR)
    assert node.socket.close_code == 1009


async def test_an_honest_node_fits(at: Served) -> None:
    """The largest asks, the longest chunk and the largest claim of an honest node are accepted."""
    asks = [make_ask(ANN, seq=n, model=f"m{n}", spec=Spec(features=("f" * 60,) * 60)) for n in range(11)]
    assert MAX_NODE_ASK_BYTES * 0.75 < len(dumps([ask.to_json() for ask in asks])) <= MAX_NODE_ASK_BYTES
    node = await LinkNode.join(at, ANN, *asks)
    assert at.world.market.book.size == len(asks)
    assert LINK_HEAD + 1 + bucket(64 * 1024 + 4) + 16 <= MAX_LINK_FRAME
    rows = []
    for number in range(64):
        terms = make_terms(asks[0], NO_JOB, max_cost=1_000 + number)
        rows.append((make_order(terms, ANN.address, person(f"payer {number}")), number + 1, 20))
    frame = pack_link(Kind.CLAIM, NO_JOB, dumps(make_claim(ANN, *rows).to_json()))
    assert len(frame) <= MAX_LINK_FRAME
    await node.socket.send(frame)
    await until(lambda: len(at.store.claims) == 1)


async def test_oversized_asks_are_refused(at: Served) -> None:
    """Asks above 16 KiB, or above 64 KiB per node, end the link, in the HELLO or later."""
    large_ask = make_ask(ANN, spec=Spec(features=("\u0001" * 45,) * 64))
    many = [make_ask(BOB, seq=n, spec=Spec(features=("\u0001" * 36,) * 64)) for n in range(5)]
    for signer, asks, most in ((ANN, [large_ask], MAX_ASK_BYTES), (BOB, many, MAX_NODE_ASK_BYTES)):
        node = await LinkNode.open(at, signer, *asks)
        await node.hello()
        assert f"at most {most}" in str(await node.refusal())
        node = await LinkNode.join(at, signer)
        await node.send(Kind.ASKS, NO_JOB, dumps(Listing.of_one_group(tuple(asks), Capacity(1, 1)).to_json()))
        assert f"at most {most}" in str(await node.refusal())
    await until(lambda: at.world.market.book.size == 0)


async def test_one_address_has_only_so_many_asks_checked(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of an address together cost a bounded number of signature checks."""
    monkeypatch.setattr(resource_bounds, "ASKS_BURST", 50)
    monkeypatch.setattr(resource_bounds, "ASKS_PER_SECOND", 1)
    async with served() as tight:
        asks = [make_ask(ANN, seq=n, model=f"m{n}") for n in range(40)]
        await LinkNode.join(tight, ANN, *asks)
        await LinkNode.join(tight, BOB, *[make_ask(BOB, seq=n, model=f"m{n}") for n in range(40)])
        refused = await LinkNode.open(tight, person("late"))
        await refused.hello()
        assert (await refused.refusal()).code is Code.RATE_LIMITED


async def test_unrequested_frames_are_read_slowly(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of beats, unrelated chunks and late receipts slows down its own address, not the coordinator."""
    monkeypatch.setattr(resource_bounds, "FRAMES_BURST", 20)
    monkeypatch.setattr(resource_bounds, "FRAMES_PER_SECOND", 100)
    async with served() as tight:
        node = await LinkNode.join(tight, ANN)
        began = asyncio.get_running_loop().time()
        for _ in range(30):
            await node.send(Kind.CHUNK, NO_JOB, b"of no job")
            await node.send_beat(Capacity(2, 2))
        await node.send_beat(Capacity(1, 1))
        await until(lambda: _free(tight) == 1)
        assert asyncio.get_running_loop().time() - began > 0.3


async def test_bad_hellos_are_rate_limited(small: Served) -> None:
    """Badly signed HELLOs cost a signature check each: an address that sends them is refused unread for a while."""
    codes = []
    for _ in range(8):
        node = await LinkNode.open(small, ANN)
        try:
            await node.hello(coordinator=BOB.address)
            codes.append((await node.refusal()).code)
        except ConnectionClosed:  # it was refused without a challenge
            codes.append(error_from_json(loads(node.seen[-1][2], "error"), 502).code)
    assert codes == [Code.BAD_SIGNATURE] * 5 + [Code.RATE_LIMITED] * 3


async def test_one_address_has_only_so_many_bytes_wait_for_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes queued for all nodes of an address are bounded: another job is not queued, other frames end the link."""
    monkeypatch.setattr(node_link, "OUTBOX_BYTES", 10_000)
    queued: Counter[str] = Counter()
    link, same_network = (NodeLink(None, None, address, queued) for address in ("2001:db8::1", "2001:db8::2"))  # type: ignore[arg-type]
    other = NodeLink(None, None, "2001:db8:1::1", queued)  # type: ignore[arg-type]
    dispatch = pack_link(Kind.DISPATCH, NO_JOB, bytes(4_000))
    assert [each.enqueue(dispatch) for each in (link, same_network, link, other)] == [True, True, False, True]
    assert queued.total() == 3 * len(dispatch)
    assert link.enqueue(pack_link(Kind.RECALLED, NO_JOB, bytes(4_000)))
    assert link._overflowed
    link.discard_queue()
    same_network.discard_queue()
    assert same_network.enqueue(pack_link(Kind.DISPATCH, NO_JOB, bytes(20_000))), "one that is alone always fits"
    same_network.discard_queue()
    other.discard_queue()
    assert not queued


async def test_a_queue_full_of_jobs_does_not_close_the_link_of_a_node_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credit and cancels are queued even if jobs, or another link that does not read, use up the bytes of the address."""
    monkeypatch.setattr(node_link, "OUTBOX_BYTES", 10_000)
    queued: Counter[str] = Counter()
    works, neighbour = (NodeLink(None, None, "192.0.2.1", queued) for _ in range(2))  # type: ignore[arg-type]
    assert works.enqueue(pack_link(Kind.DISPATCH, NO_JOB, bytes(100)))
    assert neighbour.enqueue(pack_link(Kind.DISPATCH, NO_JOB, bytes(10_000 - 3 * 17 - 100)))
    assert not works.enqueue(pack_link(Kind.DISPATCH, NO_JOB, bytes(2_000)))
    for payload in (bytes(4), bytes(resource_bounds.SMALL_FRAME_BYTES - 17)):
        assert works.enqueue(pack_link(Kind.CREDIT, NO_JOB, payload))
    assert not works._overflowed
    works.enqueue(pack_link(Kind.CREDIT, NO_JOB, bytes(resource_bounds.SMALL_FRAME_BYTES - 16)))
    assert works._overflowed


async def test_a_job_that_does_not_fit_goes_to_another_node(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """If too many bytes are queued for a node's address, its next job fails over at once, without effect on reputation."""
    monkeypatch.setattr(node_link, "OUTBOX_BYTES", 1_000)
    ann = await LinkNode.join(at, ANN)
    ann.socket.transport.pause_reading()
    bob = at.world.node("bob", output_price=9_000_000)
    subject = node_subject(ANN.address)
    for _ in range(200):
        at.world.bus.send(subject, pack_link(Kind.CREDIT, NO_JOB, bytes(100_000)))
        await asyncio.sleep(0)
        if at.hub.queued:
            break
    client = at.world.read(await at.world.market.place_order(make_submission(ann.asks[0], bob.ask)))
    await until(lambda: bob.got(Kind.DISPATCH))
    assert [kind for kind in client.kinds if kind is Kind.MATCH] == [Kind.MATCH] * 2
    ann.socket.transport.abort()
    await until(lambda: at.hub.connected == 0)
    assert at.hub.queued == 0


# The control plane


@pytest.mark.parametrize("path", ["/v1/shortlist", "/v1/explain", "/v1/tabs", "/v1/jobs/" + "00" * 16 + "/cancel"])
async def test_no_route_takes_an_endless_body(at: Served, path: str) -> None:
    """A body above the limit is refused while it arrives, with a length or without."""

    async def endless() -> Any:
        for _ in range(64):
            yield bytes(MAX_CONTROL_BODY // 8)

    for content in (bytes(MAX_CONTROL_BODY + 1), endless()):
        with contextlib.suppress(httpx.WriteError):
            response = await at.http.post(path, content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/v1/shortlist", "/v1/explain", "/v1/tabs", "/v1/jobs"])
async def test_refusals_that_cost_count_on_every_route(small: Served, path: str) -> None:
    """Malformed requests are examined up to a rate on every route; beyond it, jobs of that address are refused too."""
    statuses = [(await small.http.post(path, content=b"nonsense")).status_code for _ in range(8)]
    assert statuses == [400] * 5 + [429] * 3
    assert (await small.http.post("/v1/jobs", content=b"x")).status_code == 429


async def test_one_address_asks_only_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests above an address's rate get rate_limited, and are told when the next one is due."""
    monkeypatch.setattr(resource_bounds, "CONTROL_BURST_SECONDS", 20_000)
    async with served(intake=IntakeLimits(requests_per_second=0.001)) as at:  # too slow a rate for the machine's speed to count
        statuses = [(await at.http.get("/v1/info")).status_code for _ in range(30)]
        assert statuses == [200] * 19 + [429] * 11  # the start of the server took one
        assert int((await at.http.get("/v1/info")).headers["retry-after"]) > 100


async def test_answers_that_are_not_read_wait_their_turn(at: Served) -> None:
    """A bounded number of long responses is held per address, over any number of connections; others still get theirs."""
    for number in range(300):
        key = person(f"fat {number}")
        asks = [make_ask(key, spec=Spec(region="r" * 15_000))]
        at.world.market.matchmaker.replace_asks(key.address, asks, Capacity(1, 1))
    port = at.http.base_url.port
    lazy = [await asyncio.open_connection("127.0.0.1", port, limit=1_024) for _ in range(CONTROL_CONCURRENCY + 20)]
    for _, writer in lazy:
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # it can
        writer.write(b"GET /v1/asks?model=stand-in/small&limit=256 HTTP/1.1\r\nhost: x\r\n\r\n")
    await asyncio.sleep(1)
    other = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with httpx.AsyncClient(base_url=at.url, transport=other) as http:
        assert (await http.get("/v1/info")).status_code == 200
    for _, writer in lazy:
        writer.transport.abort()
    await until(lambda: not at.app._limiter._slots)


# Jobs


async def test_unfunded_signers_are_looked_up_only_so_often(at: Served) -> None:
    """A signer without funds costs a bounded number of lookups from all addresses; a forged order does not count against it."""
    at.world.node("ann")
    poor = person("poor")
    ask = at.world.nodes[0].ask

    async def post(number: int, payer: Any) -> int:
        submission = make_submission(ask, payer=payer, job=JobId(number.to_bytes(16, "big")))
        return (await at.post(submission)).status_code

    statuses = [await post(n, poor) for n in range(resource_bounds.UNFUNDED_ORDERS_BURST + 4)]
    assert statuses[: resource_bounds.UNFUNDED_ORDERS_BURST] == [402] * resource_bounds.UNFUNDED_ORDERS_BURST
    assert 429 in statuses[resource_bounds.UNFUNDED_ORDERS_BURST :]
    forged = with_orders(
        make_submission(ask),
        lambda order: type(order)(
            order.message, make_order(make_terms(ask, NO_JOB), ask.message.provider, person("forger")).signature
        ),
    )
    for _ in range(resource_bounds.UNFUNDED_ORDERS_BURST + 4):
        assert (await at.post(forged)).status_code == 401
    at.rate_limiter.check_signer(PAYER.address)


async def test_unfunded_orders_of_ever_new_keys_count_for_their_address(small: Served) -> None:
    """Keys are free: a stranger that uses a new key per order is limited by its address."""
    node = small.world.node("ann")
    statuses = []
    for number in range(8):
        submission = make_submission(node.ask, payer=person(f"poor {number}"), job=JobId(number.to_bytes(16, "big")))
        statuses.append((await small.post(submission)).status_code)
    assert statuses == [402] * 5 + [429] * 3


# The table


def test_the_table_says_what_holds() -> None:
    """Each setting and constant in the table has the stated value, and each setting that bounds strangers is in the table."""
    table = (resource_bounds.__doc__ or "").replace("\n", " ")
    config = CoordinatorConfig(deployment=Path("deployment.json"))
    documented = {
        name: int(number.replace(",", ""))
        for name, number in re.findall(r"([a-z_]{4,}), ([0-9][0-9,]*)(?=[^0-9,]|,[^0-9])", table)
    }
    documented = {name: number for name, number in documented.items() if hasattr(config, name)}
    assert documented == {name: getattr(config, name) for name in documented}
    bounding = {name for name in vars(config) if name.startswith(("max_", "responses_")) or "per_" in name}
    assert bounding <= {*documented, "response_mib"}
    for text in (
        f"MAX_HELLO, {resource_bounds.MAX_HELLO >> 10} KiB",
        f"MAX_LINK_FRAME, {resource_bounds.MAX_LINK_FRAME >> 10} KiB",
        f"{config.max_nodes_per_address} x {resource_bounds.MAX_LINK_FRAME >> 10} KiB = 8 MiB",
        f"{config.max_nodes_per_address} x {MAX_NODE_ASK_BYTES >> 10} KiB = 4 MiB",
        f"{resource_bounds.ASKS_PER_SECOND} per second, burst {resource_bounds.ASKS_BURST:,}",
        f"{resource_bounds.FRAMES_PER_SECOND:,} units per second, burst {resource_bounds.FRAMES_BURST:,}",
        f"OUTBOX_FRAMES, {resource_bounds.OUTBOX_FRAMES:,} frames",
        f"OUTBOX_BYTES, {resource_bounds.OUTBOX_BYTES >> 20} MiB",
        f"SMALL_FRAME_BYTES, {resource_bounds.SMALL_FRAME_BYTES >> 10} KiB",
        f"{resource_bounds.INBOX_FRAMES} x {resource_bounds.MAX_LINK_FRAME >> 10} KiB = {resource_bounds.UNREAD_BYTES >> 20} MiB",
        f"{resource_bounds.CONTROL_CONCURRENCY} x {resource_bounds.MAX_CONTROL_BODY >> 10} KiB = 2 MiB",
        f"{resource_bounds.UNFUNDED_ORDERS_PER_SECOND} per second, burst {resource_bounds.UNFUNDED_ORDERS_BURST}",
        f"{connection_limiter.LINGERING}, {connection_limiter._LINGER_SECONDS:g} s each",
        f"{connection_limiter.PIPELINED} requests wait",
        f"{MAX_FRAGMENTS} fragments",
        f"{ROOM_CHECK_INTERVAL - 1} more responses",
        f"{logs.EVENTS_AT_ONCE} lines of an event at once, {logs.EVENTS_PER_SECOND} a second",
        f"{logs.MAX_TEXT:,} characters a value",
        f"within {int(resource_bounds.BODY_GRACE_SECONDS)} s plus the transfer time at {resource_bounds.BODY_RATE >> 10} KiB/s",
    ):
        assert text in re.sub(" +", " ", table), text
