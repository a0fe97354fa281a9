"""Receipts are refused for responses that were never delivered and for cancels that nobody sent."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator.domain.reputation import UNKNOWN_PROVIDER
from coordinator.jobs.reputation_updates import count_failure
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadReceipt, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import Failure, FrameReader, Kind, dumps, loads
from tests.coordinator.harness import (
    COST,
    DOMAIN,
    PAYER,
    Client,
    FakeNode,
    Frames,
    World,
    make_ask,
    make_receipt,
    make_submission,
    person,
    quiet,
    unchecked,
)
from tests.coordinator.live_server import LinkNode, served

PAID = (Outcome.COMPLETED, Outcome.LENGTH, Outcome.CLIENT_CANCELLED)


def _refused(node: FakeNode) -> list[str]:
    """Returns the codes with which the node's receipts were refused."""
    return [loads(raw, "error")["error"]["code"] for raw in node.got(Kind.RECEIPT_REFUSED)]


async def _receipts(world: World, client: Client) -> dict[Any, Signed[Receipt]]:
    known = await world.store.job(client.job.id)
    assert known is not None
    return dict(known.receipts)


def _owed(world: World, node: FakeNode) -> int:
    tab = world.market.exposure.known(PAYER.address, node.address)
    return tab.cumulative if tab else 0


async def _assert_nothing_billed(world: World, node: FakeNode, client: Client, code: Code = Code.UNDELIVERED) -> None:
    assert client.kinds[-1] is Kind.FAIL
    assert (client.failure.code, client.failure.fault, client.failure.retry) == (code, Fault.PROVIDER, False)
    assert _refused(node) == [code.value]
    assert (await _receipts(world, client), _owed(world, node)) == ({}, 0)
    assert node.got(Kind.RECEIPT_ACK) == []
    assert world.market.reputation.score(node.address) < UNKNOWN_PROVIDER.score
    world.assert_idle()


@pytest.mark.parametrize("chunks", [(), (b"\0half an answer",), (b"\0one", b"", b"\2two")])
@pytest.mark.parametrize("outcome", PAID)
async def test_nothing_delivered_is_not_billed(world: World, outcome: Outcome, chunks: tuple[bytes, ...]) -> None:
    """A receipt that charges without the last chunk is refused and counts against its provider; the client may not retry."""
    node = world.node("ann")
    client = await world.started(node)
    node.accept(client.job.id)
    for chunk in chunks:
        node.chunk(client.job.id, chunk)
    node.finish(client.job.id, outcome=outcome)
    await quiet()
    code = Code.BAD_RECEIPT if outcome is Outcome.CLIENT_CANCELLED else Code.UNDELIVERED
    await _assert_nothing_billed(world, node, client, code)


async def test_a_cancel_that_nobody_sent_is_not_billed(world: World) -> None:
    """The outcome client_cancelled needs the client's cancel even with a whole response, since it would hide how the
    response ended.
    """
    node = world.node("ann")
    client = await world.started(node)
    node.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await quiet()
    await _assert_nothing_billed(world, node, client, Code.BAD_RECEIPT)


@pytest.mark.parametrize("price", [0, 1_000_000])
async def test_a_cancel_that_nobody_sent_is_no_excuse(world: World, price: int) -> None:
    """The outcome is refused at no cost too: a provider that drops jobs cannot claim that their clients cancelled."""
    prices = dict.fromkeys(("input_price", "cached_input_price", "output_price"), price)
    node = world.node("ann", **prices)
    client = await world.started(node)
    nothing = {"input_tokens": 0, "output_tokens": 0, "cost": Amount(0), "cumulative_cost": Amount(0)}
    node.finish(client.job.id, outcome=Outcome.CLIENT_CANCELLED, **nothing)
    await quiet()
    await _assert_nothing_billed(world, node, client, Code.BAD_RECEIPT)


async def test_an_undelivered_free_response_earns_no_reputation(world: World) -> None:
    """At price 0 too, a response reported as complete must have arrived: otherwise reputation would be free."""
    node = world.node("ann", input_price=0, cached_input_price=0, output_price=0)
    client = await world.started(node)
    node.finish(client.job.id, cost=Amount(0), cumulative_cost=Amount(0))
    await quiet()
    await _assert_nothing_billed(world, node, client)


@pytest.mark.parametrize("reason", ["timed_out", "coordinator"])
async def test_another_reason_to_stop_is_not_the_clients(world: World, reason: str) -> None:
    """A node that was told to stop by a deadline or a shutdown cannot bill a cancel by the client."""
    node, spare = world.node("ann"), world.node("bob", output_price=9_000_000)
    if reason == "timed_out":
        client = await world.started(node, spare)
        await world.pass_time(11)
        job = client.job.id
    else:
        placed = await world.market.place_order(world.submission(node))
        frames = Frames(world.market, placed)
        await anext(frames)
        await frames.aclose()
        job = placed.id
    assert node.got(Kind.CANCEL, job) == [reason.encode()]
    with pytest.raises(BadReceipt, match="no cancel by the client"):
        await node.hand_in_late(job, node.receipt(job, outcome=Outcome.CLIENT_CANCELLED))
    assert _owed(world, node) == 0


async def test_a_cancel_counts_for_the_attempt_that_it_reached(world: World) -> None:
    """A provider that failed before the client cancelled cannot bill the cancel; the provider that was told can."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    ann.fail(client.job.id)
    await quiet()
    bob.chunk(client.job.id)
    await quiet()
    world.market.cancel(client.job.id)
    assert (ann.got(Kind.CANCEL), bob.got(Kind.CANCEL)) == ([], [b"client"])
    with pytest.raises(BadReceipt, match="no cancel by the client"):
        await ann.hand_in_late(client.job.id, ann.receipt(client.job.id, outcome=Outcome.CLIENT_CANCELLED))
    bob.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await quiet()
    assert set(await _receipts(world, client)) == {bob.address}
    assert await world.stored(client) is State.CANCELLED


async def test_a_cancel_still_needs_the_last_chunk(world: World) -> None:
    """A cancelled response needs its last chunk before it is billed; a cancelled job without output costs nothing."""
    node = world.node("ann")
    for cost, taken in ((COST, False), (0, True)):
        client = await world.started(node)
        world.market.cancel(client.job.id)
        usage = {} if cost else {"input_tokens": 0, "output_tokens": 0, "cost": Amount(0), "cumulative_cost": Amount(0)}
        node.finish(client.job.id, outcome=Outcome.CLIENT_CANCELLED, **usage)
        await quiet()
        assert (client.kinds[-1] is Kind.RECEIPT) is taken


async def test_what_follows_the_last_chunk_is_not_relayed(world: World) -> None:
    """A response ends once: chunks after the last one are dropped and earn no credit."""
    node = world.node("ann")
    client = await world.started(node)
    node.last_chunk(client.job.id)
    for _ in range(60):
        node.chunk(client.job.id)
    node.finish(client.job.id)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.RECEIPT]
    assert node.got(Kind.CREDIT) == [bytes(4)]


# Late receipts


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("end", ["fail", "leave"])
async def test_an_unfinished_response_is_not_billed_later(world: World, end: str, restart: bool) -> None:
    """A provider that broke off cannot bill the whole response with a late receipt, not even after a restart."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    await quiet()
    node.fail(client.job.id) if end == "fail" else node.leave()
    await quiet()
    if restart:
        await world.restart()
    receipt = node.receipt(client.job.id)
    before = world.market.reputation.score(node.address)
    for _ in range(2):
        with pytest.raises(BadReceipt, match="never reached this coordinator"):
            await node.hand_in_late(client.job.id, receipt)
    assert (await _receipts(world, client), _owed(world, node)) == ({}, 0)
    assert world.market.reputation.score(node.address) < before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("end", ["fail", "leave", "silence"])
async def test_a_whole_response_is_paid_however_its_receipt_arrives(world: World, end: str, restart: bool) -> None:
    """A response delivered whole can be billed after a failure, a lost link, a silence or a restart, at no loss of reputation."""
    node = world.node("ann")
    client = await world.started(node)
    node.last_chunk(client.job.id)
    await quiet()
    if end == "silence":
        await world.pass_time(61)
    else:
        node.fail(client.job.id) if end == "fail" else node.leave()
    await quiet()
    assert client.kinds[-1] is Kind.FAIL
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score
    if restart:
        await world.restart()
    receipt = node.receipt(client.job.id)
    assert await node.hand_in_late(client.job.id, receipt)
    assert set(await _receipts(world, client)) == {node.address}
    assert _owed(world, node) == COST
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score, "a late receipt is no second job"


async def test_what_a_killed_process_relayed_is_not_held_against_anybody(world: World) -> None:
    """If a process died in the middle of a job, its receipt is stored without effect on reputation, so both tabs agree."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    await quiet()
    await world.restart()
    assert await node.hand_in_late(client.job.id, node.receipt(client.job.id))
    assert _owed(world, node) == COST
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score


# Void receipts


async def _failed(world: World, *nodes: FakeNode, **changes: Any) -> tuple[Client, Signed[Receipt]]:
    """Places a job whose first node fails with a receipt at no cost."""
    client = await world.started(*nodes)
    node = nodes[0]
    outcome = {"outcome": Outcome.REFUSED, "input_tokens": 0, "output_tokens": 0} | changes
    receipt = node.receipt(client.job.id, **outcome)
    node.fail(client.job.id, Unavailable(Code.NODE_BUSY, "full", fault=Fault.PROVIDER), receipt)
    await quiet()
    return client, receipt


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.PROVIDER_ERROR, Outcome.TIMED_OUT, Outcome.UPSTREAM_ERROR])
async def test_an_attempt_that_failed_is_known_to_cost_nothing(world: World, outcome: Outcome) -> None:
    """The receipt at no cost of a failure is stored, acknowledged and sent to the client before the next match."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client, receipt = await _failed(world, ann, bob, outcome=outcome)
    assert client.kinds == [Kind.MATCH, Kind.VOID, Kind.MATCH]
    assert client.frames[1][1] == receipt.to_bytes()
    assert (await _receipts(world, client)).keys() == {ann.address}
    assert ann.got(Kind.RECEIPT_ACK, client.job.id) == [b""]
    bob.complete(client.job.id)
    await quiet()
    assert await world.stored(client) is State.COMPLETED
    assert set(await _receipts(world, client)) == {ann.address, bob.address}
    assert _owed(world, ann) == 0
    assert world.market.exposure.known(PAYER.address, ann.address) is None, "and nothing is remembered of it"
    world.assert_idle()


async def test_the_last_failure_brings_its_receipt_too(world: World) -> None:
    """If no candidate is left, the client gets the receipt at no cost before the failure; a refusal costs no reputation."""
    node = world.node("ann")
    client, _ = await _failed(world, node)
    assert client.kinds == [Kind.MATCH, Kind.VOID, Kind.FAIL]
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score
    assert world.market.exposure.known(PAYER.address, node.address) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": Outcome.COMPLETED, "input_tokens": 10, "output_tokens": 5},
        {"outcome": Outcome.COMPLETED, "cost": Amount(0), "cumulative_cost": Amount(0)},
        {"outcome": Outcome.CLIENT_CANCELLED, "cost": Amount(0), "cumulative_cost": Amount(0)},
        {"cost": Amount(1), "cumulative_cost": Amount(1)},
        {"seq": 0},
        {"payer": PAYER.address, "order_hash": b"\1" * 32},
    ],
)
async def test_a_bad_void_receipt_does_not_stop_the_job(world: World, changes: dict[str, Any]) -> None:
    """A void receipt that charges or concerns something else counts against its provider; the next one gets the job."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client, _ = await _failed(world, ann, bob, **changes)
    assert client.kinds == [Kind.MATCH, Kind.MATCH]
    assert (await _receipts(world, client), _refused(ann)) == ({}, ["bad_receipt"])
    assert world.market.reputation.score(ann.address) < UNKNOWN_PROVIDER.score
    bob.complete(client.job.id)
    await quiet()
    assert await world.stored(client) is State.COMPLETED


@pytest.mark.parametrize("receipt", [b"", b"x", b"{}", bytes(480), bytes(481), b"\xff" * 481])
async def test_a_void_receipt_that_is_none_does_not_stop_the_job(world: World, receipt: bytes) -> None:
    """A receipt that does not parse counts against its provider and has no other effect."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    payload = b'{"error":{"message":"full","code":"node_busy","fault":"provider","retry":true}}' + b"\0" + receipt
    ann.send(Kind.FAIL, client.job.id, payload)
    await quiet()
    assert client.kinds == [Kind.MATCH, Kind.MATCH]
    assert world.market.reputation.score(ann.address) < UNKNOWN_PROVIDER.score


async def test_a_void_receipt_that_comes_late_is_kept(world: World) -> None:
    """The receipt is stored with its attempt while the job continues elsewhere, and does not affect reputation twice."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    await world.pass_time(11)
    before = world.market.reputation.score(ann.address)
    void = ann.receipt(client.job.id, outcome=Outcome.TIMED_OUT)
    for _ in range(2):
        assert await ann.hand_in_late(client.job.id, void)
    assert (await _receipts(world, client)).keys() == {ann.address}
    assert world.market.reputation.score(ann.address) == before
    with pytest.raises(BadReceipt, match="a second one"):
        await ann.hand_in_late(client.job.id, ann.receipt(client.job.id, outcome=Outcome.PROVIDER_ERROR))


# Fault


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("code", [Code.NODE_BUSY, Code.BAD_MESSAGE, Code.PROVIDER_FAILED, Code.CANCELLED])
async def test_an_unfinished_response_is_the_providers_fault(world: World, fault: Fault, code: Code) -> None:
    """After the first output, an unfinished response is the node's own failure, whatever reason it gives."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    node.fail(client.job.id, Unavailable(code, "not my doing", fault=fault))
    await quiet()
    assert client.failure.fault is Fault.PROVIDER
    assert world.market.reputation.score(node.address) < UNKNOWN_PROVIDER.score


@pytest.mark.parametrize("outcome", [Outcome.UPSTREAM_ERROR, Outcome.REFUSED])
async def test_an_unfinished_response_is_a_failure_whatever_its_receipt_says(world: World, outcome: Outcome) -> None:
    """An outcome that costs no reputation does not hide an unfinished response."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    node.finish(client.job.id, outcome=outcome)
    await quiet()
    assert world.market.reputation.score(node.address) < UNKNOWN_PROVIDER.score


async def test_an_attempt_counts_once(world: World) -> None:
    """A bad receipt and the end that it causes count as one failure."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    node.finish(client.job.id)
    await quiet()
    once = world.market.reputation.score(node.address)
    count_failure(world.market.reputation, client.job, client.job.current, BadReceipt("again"))
    assert world.market.reputation.score(node.address) == once == pytest.approx(1 / 5)


@pytest.mark.parametrize("error", [Refusal(Code.CANCELLED, "cancelled"), Unavailable(Code.NODE_BUSY, "full")])
async def test_a_cancelled_job_is_nobodys_failure(world: World, error: TallyError) -> None:
    """A node that stops a cancelled job in the middle of its response loses no reputation."""
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    await quiet()
    world.market.cancel(client.job.id)
    node.fail(client.job.id, error)
    await quiet()
    assert await world.stored(client) is State.CANCELLED
    assert world.market.reputation.score(node.address) == UNKNOWN_PROVIDER.score


# Over real sockets


async def test_a_void_receipt_reaches_the_client() -> None:
    """Over HTTP and the link, the receipt at no cost of a failed attempt comes between the two matches."""
    ann, bob = person("ann"), person("bob")
    async with served() as at:
        first = await LinkNode.join(at, ann)
        second = await LinkNode.join(at, bob, make_ask(bob, output_price=9_000_000))
        submission = make_submission(first.asks[0], second.asks[0])
        post = asyncio.create_task(at.post(submission))
        job, _ = await first.take_job()
        order, terms = submission.candidates[0].order.verify(DOMAIN), submission.candidates[0].terms
        void = make_receipt(ann, order, terms, outcome=Outcome.REFUSED, input_tokens=0, output_tokens=0)
        failure = Failure(Unavailable(Code.NODE_BUSY, "full", fault=Fault.PROVIDER), unchecked(void))
        await first.send(Kind.FAIL, job, failure.dumps())
        await first.expect(Kind.RECEIPT_ACK)
        await second.finish(*await second.take_job())
        frames = list(FrameReader().feed((await post).content))
        assert [kind for kind, _ in frames] == [Kind.MATCH, Kind.VOID, Kind.MATCH, Kind.CHUNK, Kind.RECEIPT]
        assert frames[1][1] == void.to_bytes()
        assert set(at.store.receipts[job]) == {ann.address, bob.address}


async def test_a_bill_for_nothing_is_refused_on_the_link() -> None:
    """Over the link, a receipt for a response that never came is refused by name, and the client gets the reason."""
    ann = person("ann")
    async with served() as at:
        node = await LinkNode.join(at, ann)
        submission = make_submission(node.asks[0])
        post = asyncio.create_task(at.post(submission))
        job, receipt = await node.take_job()
        await node.send(Kind.ACCEPT, job)
        await node.send(Kind.CHUNK, job, b"\0half")
        await node.send(Kind.RECEIPT, job, receipt.to_bytes())
        refusals = [loads(await node.expect(Kind.RECEIPT_REFUSED), "refused")]
        candidate = submission.candidates[0]
        late_receipt = LateReceipt(unchecked(receipt), candidate.order, candidate.terms)
        await node.send(Kind.LATE_RECEIPT, job, dumps(late_receipt.to_json()))
        refusals.append(loads(await node.expect(Kind.RECEIPT_REFUSED), "refused"))
        assert [refusal["error"]["code"] for refusal in refusals] == ["undelivered"] * 2
        kind, payload = list(FrameReader().feed((await post).content))[-1]
        assert (kind, loads(payload, "failure")["error"]["retry"]) == (Kind.FAIL, False)
        assert at.store.receipts == {}


async def test_the_payer_of_a_live_job_is_known() -> None:
    """The payer of a job is known while the job runs, and not afterwards."""
    world = World()
    node = world.node("ann")
    client = await world.started(node)
    assert world.market.payer_of(client.job.id) == PAYER.address
    node.complete(client.job.id)
    await quiet()
    assert world.market.payer_of(client.job.id) is None
