"""The node link over real sockets: authentication, relayed frames, and how a connection ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import pytest
from websockets.exceptions import ConnectionClosed

from coordinator.domain.resource_bounds import INBOX_FRAMES
from coordinator.http import node_hub as module
from coordinator.http import node_link
from coordinator.http.node_link import NodeLink
from coordinator.ports import KnownJob, node_subject
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable, error_from_json
from tallystick.protocol.link import Beat, Capacity, Challenge, LateReceipt, Listing
from tallystick.protocol.messages import Connect, Outcome
from tallystick.protocol.replicas import MAX_REPLICAS
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import MAX_FRAME, NO_JOB, Failure, Kind, dumps, loads, pack_link
from tests.coordinator.harness import (
    COORDINATOR,
    DOMAIN,
    PAYER,
    World,
    hash_of,
    make_ask,
    make_claim,
    make_receipt,
    make_submission,
    person,
    unchecked,
)
from tests.coordinator.live_server import LinkNode, Served, frames_of, served, until

ANN, BOB = person("ann"), person("bob")
JOB = JobId(b"\x05" * 16)


def _free(at: Served, node: LinkNode) -> int | None:
    known = at.world.market.book.node(node.address)
    return None if known is None else known.free


# Connecting


async def test_a_node_proves_its_key(at: Served) -> None:
    """A node that signs the challenge is welcomed, and its asks are listed with its reported capacity."""
    node = await LinkNode.join(at, ANN, slots=3)
    challenge = Challenge.from_json(loads(node.seen[0][2], "challenge"))
    assert (challenge.coordinator, challenge.chain_id, challenge.contract) == (
        COORDINATOR.address,
        DOMAIN.chain_id,
        DOMAIN.contract,
    )
    assert at.hub.connected == 1
    assert at.world.market.book.find(node.asks[0].digest) is not None
    assert _free(at, node) == 3


async def test_each_connection_has_its_own_challenge(at: Served) -> None:
    """A recorded answer to a challenge is refused on the next connection."""
    first_link, second_link = await LinkNode.open(at, ANN), await LinkNode.open(at, ANN)
    first, second = [loads(await node.expect(Kind.CHALLENGE), "challenge") for node in (first_link, second_link)]
    assert first["challenge"] != second["challenge"]


@pytest.mark.parametrize("changes", [{"challenge": hash_of("another")}, {"coordinator": BOB.address}])
async def test_a_wrong_answer(at: Served, changes: dict[str, Any]) -> None:
    """An answer to another challenge, or for another coordinator, is refused."""
    node = await LinkNode.open(at, ANN)
    await node.hello(**changes)
    assert (await node.refusal()).code is Code.BAD_SIGNATURE
    assert at.hub.connected == 0


async def test_an_answer_in_another_hand_or_domain(at: Served) -> None:
    """A node cannot connect as another provider, nor with a signature made for another chain."""
    for signer, domain in ((BOB, DOMAIN), (ANN, Domain(1, DOMAIN.contract))):
        node = await LinkNode.open(at, ANN)
        challenge = Challenge.from_json(loads(await node.expect(Kind.CHALLENGE), "challenge"))
        connect = Connect(
            provider=ANN.address,
            coordinator=challenge.coordinator,
            challenge=challenge.challenge,
            endpoint=node.endpoint,
        )
        await node.greet(replace(unchecked(ANN.sign(connect, DOMAIN)), signature=signer.sign_digest(connect.digest(domain))))
        assert (await node.refusal()).code is Code.BAD_SIGNATURE
    assert at.hub.connected == 0


async def test_forged_asks(at: Served) -> None:
    """A node with an ask that it did not sign, or of another provider, is refused, and none of its asks is listed."""
    forged = replace(make_ask(ANN), message=make_ask(ANN, output_price=1).message)
    for ask, code in ((forged, Code.BAD_SIGNATURE), (make_ask(BOB), Code.BAD_MESSAGE)):
        node = await LinkNode.open(at, ANN, ask)
        await node.hello()
        assert (await node.refusal()).code is code
    assert (at.hub.connected, at.world.market.book.size) == (0, 0)


@pytest.mark.parametrize(
    "frame",
    [
        pack_link(Kind.BEAT, NO_JOB, b"{}"),
        pack_link(Kind.HELLO, NO_JOB, b"not JSON"),
        pack_link(Kind.HELLO, NO_JOB, b"{}"),
        b"",
        b"short",
        bytes([99]) + bytes(16),
        "text",
    ],
)
async def test_what_is_no_hello(at: Served, frame: bytes | str) -> None:
    """Any other first frame ends the connection with the reason."""
    node = await LinkNode.open(at, ANN)
    await node.expect(Kind.CHALLENGE)
    await node.socket.send(frame)
    assert (await node.refusal()).code is Code.BAD_MESSAGE
    assert at.hub.connected == 0


async def test_silence_at_the_door(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a HELLO is closed."""
    monkeypatch.setattr(module, "HELLO_SECONDS", 0.05)
    node = await LinkNode.open(at, ANN)
    assert "the node was silent for too long" in str(await node.refusal())


async def test_a_full_coordinator() -> None:
    """A full coordinator refuses new nodes, but lets its own nodes reconnect, and others in when one has left."""
    async with served(max_nodes=1) as at:
        await LinkNode.join(at, ANN)
        second = await LinkNode.open(at, BOB)
        await second.hello()
        error = await second.refusal()
        assert (error.code, error.retry) == (Code.COORDINATOR_UNAVAILABLE, True)
        again = await LinkNode.join(at, ANN)
        await again.socket.close()
        await until(lambda: at.hub.connected == 0)
        await LinkNode.join(at, BOB)


# Protocol violations


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"short",
        "text",
        bytes([99]) + bytes(16),
        pack_link(Kind.CHALLENGE),
        pack_link(Kind.DISPATCH, JOB),
        pack_link(Kind.MATCH, JOB),
        pack_link(Kind.ERROR, JOB),
        pack_link(Kind.BEAT, NO_JOB, b"not JSON"),
        pack_link(Kind.BEAT, NO_JOB, dumps(Beat({0: Capacity(-1, 1)}).to_json())),
        pack_link(Kind.BEAT, NO_JOB, dumps(Beat({0: Capacity(1, 1 << 40)}).to_json())),
        pack_link(Kind.BEAT, NO_JOB, dumps(Beat({1: Capacity(1, 1)}).to_json())),
        pack_link(Kind.BEAT, NO_JOB, dumps({"capacity": [Capacity(1, 1).to_json(0)] * 2})),
        pack_link(Kind.BEAT, NO_JOB, dumps(Capacity(1, 1).to_json(0))),
        pack_link(Kind.ASKS, NO_JOB, b"[]"),
        pack_link(Kind.ASKS, NO_JOB, b'{"asks": [1]}'),
        pack_link(Kind.CLAIM, NO_JOB, b"{}"),
    ],
)
async def test_garbage_ends_the_connection(at: Served, frame: bytes | str) -> None:
    """A malformed frame ends the connection with the reason and removes the node's asks."""
    node = await LinkNode.join(at, ANN)
    await node.socket.send(frame)
    assert (await node.refusal()).code is Code.BAD_MESSAGE
    await until(lambda: at.hub.connected == 0)
    assert at.world.market.book.size == 0


async def test_a_node_does_not_touch_jobs_of_others(at: Served) -> None:
    """Frames for a job of another node, or of no node, are ignored; the node stays connected."""
    ann, bob = await LinkNode.join(at, ANN), await LinkNode.join(at, BOB)
    client = at.world.read(await at.world.market.place_order(make_submission(ann.asks[0])))
    job, receipt = await ann.take_job()
    for about in (job, JOB):
        for kind in (Kind.ACCEPT, Kind.CHUNK, Kind.FAIL):
            await bob.send(kind, about, b"intruder")
        await bob.send(Kind.RECEIPT, about, receipt.to_bytes())
    await ann.send(Kind.CHUNK, job, b"ours")
    await bob.send(Kind.BEAT, NO_JOB, dumps(Beat({0: Capacity(1, 1)}).to_json()))
    await until(lambda: _free(at, bob) == 1)
    await ann.finish(job, receipt)
    await until(lambda: client.ended)
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT]
    assert client.frames[1] == (Kind.CHUNK, b"ours")


async def test_more_chunks_than_credit(at: Served) -> None:
    """A node that exceeds its credit is disconnected, its job fails, and the coordinator stores at most one inbox of its
    frames.
    """
    node = await LinkNode.join(at, ANN)
    job = await at.world.market.place_order(make_submission(node.asks[0]))
    client = at.world.read(job)
    client.reads.clear()
    await node.take_job()
    for _ in range(INBOX_FRAMES + 5):
        await node.send(Kind.CHUNK, job.id, b"more and more")
    error = await node.refusal()
    assert (error.code, error.fault) == (Code.BAD_MESSAGE, Fault.PROVIDER)
    client.reads.set()
    await until(lambda: client.ended)
    assert client.failure.code is Code.NODE_GONE
    at.world.assert_idle()


@pytest.mark.parametrize("replaces", [True, False], ids=["before the old link ends", "after it"])
async def test_a_node_that_comes_back_sends_the_rest_of_its_answer(at: Served, *, replaces: bool) -> None:
    """It is asked for that right after its WELCOME, and its receipt ends the job."""
    node = await LinkNode.join(at, ANN, resumes=True)
    client = at.world.read(await at.world.market.place_order(make_submission(node.asks[0])))
    job, receipt = await node.take_job()
    await node.send(Kind.CHUNK, job, b"first")
    await until(lambda: Kind.CHUNK in client.kinds)
    if not replaces:
        node.socket.transport.abort()
        await until(lambda: at.hub.connected == 0)
    back = await LinkNode.join(at, ANN, resumes=True)
    assert await back.expect(Kind.RESUME) == (1).to_bytes(4, "big")
    await back.finish(job, receipt)
    await until(lambda: client.ended)
    assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.CHUNK, Kind.RECEIPT]
    at.world.assert_idle()


async def test_a_node_that_does_not_read(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that does not read is disconnected, although it still beats, and its jobs fail over."""
    monkeypatch.setattr(node_link, "OUTBOX_FRAMES", 4)
    monkeypatch.setattr(node_link, "CLOSE_SECONDS", 0.05)
    node = await LinkNode.join(at, ANN)
    node.socket.transport.pause_reading()
    client = at.world.read(await at.world.market.place_order(make_submission(node.asks[0])))
    subject = node_subject(ANN.address)
    for _ in range(60):
        at.world.bus.send(subject, pack_link(Kind.CREDIT, JOB, bytes(MAX_FRAME)))
        await asyncio.sleep(0)
    await until(lambda: at.hub.connected == 0)
    await until(lambda: client.ended)
    assert client.failure.code is Code.NODE_GONE
    node.socket.transport.abort()


async def test_silence(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that stops beating is disconnected, and its asks are removed."""
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)
    node = await LinkNode.join(at, ANN)
    error = await node.refusal()
    assert (error.code, error.fault) == (Code.NODE_GONE, Fault.PROVIDER)
    await until(lambda: at.world.market.book.size == 0)


# Frames of a node


async def test_beats_tell_the_capacity(at: Served) -> None:
    """A BEAT updates the node's capacity."""
    node = await LinkNode.join(at, ANN)
    await node.send(Kind.BEAT, NO_JOB, dumps(Beat({0: Capacity(1, 2)}).to_json()))
    await until(lambda: _free(at, node) == 1)


async def test_a_beat_may_have_a_head_of_the_match_log(at: Served) -> None:
    """The head that a node saw is kept for its check; a made-up one does the link no harm."""
    node = await LinkNode.join(at, ANN)
    await node.send(Kind.BEAT, NO_JOB, dumps(Beat({0: Capacity(1, 2)}, bytes(113)).to_json()))
    await until(lambda: _free(at, node) == 1)
    assert at.world.market.match_log._seen == {ANN.address: bytes(113)}


async def test_a_beat_tells_the_capacity_of_some_slot_groups(at: Served) -> None:
    """A node with two engines reports the one that changed. Once its asks have other groups, the former ones are unknown."""
    node = await LinkNode.join(at, ANN)
    asks = tuple(make_ask(ANN, model=model) for model in ("a", "b", "c"))
    listing = Listing(asks, (5, 9, 5), {5: Capacity(1, 1), 9: Capacity(3, 1, queue=2)})
    await node.send(Kind.ASKS, NO_JOB, dumps(listing.to_json()))
    await until(lambda: at.world.market.book.find(asks[0].digest) is not None)
    await node.send(Kind.BEAT, NO_JOB, dumps(Beat({9: Capacity(2, 1, queue=2)}).to_json()))
    groups = at.world.market.book.groups_of((ANN.address, None))
    await until(lambda: groups[1].places == 2)
    assert [(group.number, group.free, group.places, len(group.leads)) for group in groups] == [(5, 1, 1, 2), (9, 0, 2, 1)]
    await node.send(Kind.ASKS, NO_JOB, dumps(Listing.of_one_group(asks[:1], Capacity(1, 1)).to_json()))
    await node.send(Kind.BEAT, NO_JOB, dumps(Beat({9: Capacity(1, 1)}).to_json()))
    assert "expected slot groups that asks of the node name, got 9" in str(await node.refusal())


async def test_new_asks_replace_old_ones(at: Served) -> None:
    """A node may change its asks without reconnecting."""
    node = await LinkNode.join(at, ANN)
    new = make_ask(ANN, model="another")
    await node.send(Kind.ASKS, NO_JOB, dumps(Listing.of_one_group((new,), Capacity(1, 1)).to_json()))
    await until(lambda: at.world.market.book.find(new.digest) is not None)
    assert at.world.market.book.find(node.asks[0].digest) is None


async def test_claims_are_kept(at: Served) -> None:
    """A claim over the link is stored as pending; a forged one ends the connection."""
    node = await LinkNode.join(at, ANN)
    order = make_submission(node.asks[0]).candidates[0].order.verify(DOMAIN)
    claim = make_claim(ANN, (order, 1, 20))
    await node.send(Kind.CLAIM, NO_JOB, dumps(claim.to_json()))
    await until(lambda: len(at.store.claims) == 1)
    forged = replace(claim, claim=replace(claim.claim, signature=BOB.sign_digest(hash_of("nothing"))))
    await node.send(Kind.CLAIM, NO_JOB, dumps(forged.to_json()))
    assert (await node.refusal()).code is Code.BAD_SIGNATURE
    assert len(at.store.claims) == 1


class _DownStore(MemoryStore):
    async def job(self, job: JobId) -> KnownJob | None:
        raise Unavailable(Code.DATABASE_UNAVAILABLE, f"the database does not answer about {job.hex()}")

    async def put_claim(self, request: object, now: int) -> None:
        raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database does not answer")


async def test_a_store_that_is_down_closes_nobody() -> None:
    """While the store is down, receipts and claims are not acknowledged, but the node and its jobs stay connected."""
    async with served(World(store=_DownStore())) as at:
        node = await LinkNode.join(at, ANN)
        submission = make_submission(node.asks[0])
        order = submission.candidates[0].order.verify(DOMAIN)
        await node.send(Kind.RECEIPT, JOB, b"late")
        await node.send(Kind.CLAIM, NO_JOB, dumps(make_claim(ANN, (order, 1, 20)).to_json()))
        client = at.world.read(await at.world.market.place_order(submission))
        job, receipt = await node.take_job()
        await node.finish(job, receipt)
        await until(lambda: client.ended)
        assert client.kinds == [Kind.MATCH, Kind.CHUNK, Kind.RECEIPT]


async def test_bad_late_receipts_are_refused(at: Served) -> None:
    """An invalid late receipt is refused with the reason, so it is not sent again; the node stays, its next one is accepted."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    client = at.world.read(await at.world.market.place_order(submission))
    job, receipt = await node.take_job()
    await node.finish(job, receipt)
    await until(lambda: client.ended)
    late_receipt = LateReceipt(receipt, submission.candidates[0].order, submission.candidates[0].terms)
    await node.send(Kind.LATE_RECEIPT, JOB, dumps(late_receipt.to_json()))
    for payload in (b"nonsense", b"{}"):
        await node.send(Kind.RECEIPT, job, payload)
        await node.send(Kind.LATE_RECEIPT, job, payload)
    await node.send(Kind.LATE_RECEIPT, job, dumps(late_receipt.to_json()))
    await node.expect(Kind.RECEIPT_ACK)
    await node.finish(job, receipt)
    assert [kind for kind, _, _ in node.seen].count(Kind.RECEIPT_ACK) == 3
    refused = [(job, loads(raw, "error")) for kind, job, raw in node.seen if kind is Kind.RECEIPT_REFUSED]
    answers = [(about, error_from_json(raw, 502).code) for about, raw in refused]
    assert answers == [(JOB, Code.BAD_RECEIPT), *[(job, Code.BAD_RECEIPT), (job, Code.BAD_MESSAGE)] * 2]


async def test_the_void_receipt_of_an_attempt_that_is_over(at: Served) -> None:
    """The receipt at no cost in a FAIL is stored and acknowledged even if its job is over; a FAIL without one is ignored."""
    ann = await LinkNode.join(at, ANN)
    client = at.world.read(await at.world.market.place_order(make_submission(ann.asks[0])))
    job, receipt = await ann.take_job()
    order, terms = (client.job.current.order, client.job.current.candidate.terms)
    void = make_receipt(ANN, order, terms, outcome=Outcome.REFUSED, input_tokens=0, output_tokens=0)
    at.world.market.cancel(job)
    failure = Failure(Unavailable(Code.NODE_BUSY, "full", fault=Fault.PROVIDER))
    await ann.send(Kind.FAIL, job, failure.dumps())
    await until(lambda: client.ended)
    await ann.send(Kind.FAIL, job, failure.dumps())
    await ann.send(Kind.FAIL, job, replace(failure, receipt=unchecked(receipt)).dumps())
    await ann.expect(Kind.RECEIPT_REFUSED)
    await ann.send(Kind.FAIL, job, replace(failure, receipt=unchecked(void)).dumps())
    await ann.expect(Kind.RECEIPT_ACK)
    known = await at.world.store.job(job)
    assert known is not None
    assert known.receipts[ANN.address].message == void.message


async def test_a_node_that_recalls(at: Served) -> None:
    """A node gets its own last receipt on each of its tabs, and no others; a malformed request closes the link."""
    ann, bob = await LinkNode.join(at, ANN), await LinkNode.join(at, BOB, make_ask(BOB, output_price=9_000_000))
    client = at.world.read(await at.world.market.place_order(make_submission(ann.asks[0])))
    job, receipt = await ann.take_job()
    await ann.finish(job, receipt)
    await until(lambda: client.ended)
    answers = []
    for node, after in ((ann, ""), (ann, PAYER.address), (bob, "")):
        await node.send(Kind.RECALL, NO_JOB, dumps({"after": after}))
        answers.append(loads(await node.expect(Kind.RECALLED), "recalled"))
    assert [(len(first_link["receipts"]), first_link["more"]) for first_link in answers] == [(1, False), (0, False), (0, False)]
    late_receipt = LateReceipt.from_json(answers[0]["receipts"][0])
    assert (late_receipt.receipt.signature, late_receipt.terms.job) == (receipt.signature, job)
    await ann.send(Kind.RECALL, NO_JOB, b"{}")
    assert (await ann.refusal()).code is Code.BAD_MESSAGE


# Ends of connections


async def test_a_lost_connection_hands_its_jobs_on(at: Served) -> None:
    """When a node's connection is lost, its job goes to the next candidate."""
    ann, bob = await LinkNode.join(at, ANN), await LinkNode.join(at, BOB, make_ask(BOB, output_price=9_000_000))
    client = at.world.read(await at.world.market.place_order(make_submission(ann.asks[0], bob.asks[0])))
    await ann.take_job()
    ann.socket.transport.abort()
    job, receipt = await bob.take_job()
    await bob.finish(job, receipt)
    await until(lambda: client.ended)
    assert client.kinds == [Kind.MATCH, Kind.MATCH, Kind.CHUNK, Kind.RECEIPT]


async def test_a_second_connection_takes_the_place_of_the_first(at: Served) -> None:
    """A node that reconnects is served on its new connection; the old one gets the reason and is closed, and its jobs end."""
    old = await LinkNode.join(at, ANN)
    client = at.world.read(await at.world.market.place_order(make_submission(old.asks[0])))
    await old.take_job()
    new = await LinkNode.join(at, ANN, make_ask(ANN, seq=2))
    assert "another connection" in str(await old.refusal())
    await until(lambda: client.ended)
    assert client.failure.code is Code.NODE_GONE
    assert at.hub.connected == 1
    assert at.world.market.book.find(new.asks[0].digest) is not None
    at.world.read(await at.world.market.place_order(make_submission(new.asks[0])))
    await new.take_job()


async def test_a_second_connection_does_not_wait_for_a_dead_first(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node whose old connection hangs is welcomed on its new one at once, and frames of the old one are ignored."""
    monkeypatch.setattr(node_link, "CLOSE_SECONDS", 60)
    old = await LinkNode.join(at, ANN)
    old.socket.transport.pause_reading()
    for _ in range(30):  # until its socket is full
        at.world.bus.send(node_subject(ANN.address), pack_link(Kind.CREDIT, JOB, bytes(MAX_FRAME)))
    await asyncio.sleep(0.05)
    new = await LinkNode.join(at, ANN, make_ask(ANN, seq=2))
    await old.send(Kind.ASKS, NO_JOB, dumps(Listing.of_one_group((make_ask(ANN, model="ghost"),), Capacity(1, 1)).to_json()))
    await new.send(Kind.BEAT, NO_JOB, dumps(Beat({0: Capacity(2, 2)}).to_json()))
    await until(lambda: _free(at, new) == 2)
    assert [name for name, _ in at.world.market.book.models()] == [new.asks[0].message.model]
    await new.socket.close()
    await until(lambda: at.hub.connected == 0)
    assert at.world.market.book.size == 0
    old.socket.transport.abort()


async def test_closing_the_hub() -> None:
    """A stop closes every link, refuses new ones for now, ends live jobs, and leaves no task running."""
    async with served() as at:
        ann, bob = await LinkNode.join(at, ANN), await LinkNode.join(at, BOB)
        client = at.world.read(await at.world.market.place_order(make_submission(ann.asks[0], bob.asks[0])))
        await at.world.market.drain(0)
        await at.hub.close()
        for node in (ann, bob):
            with pytest.raises(ConnectionClosed):
                await node.expect(Kind.WELCOME)
        await until(lambda: client.ended)
        assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
        refused = await LinkNode.open(at, ANN)
        assert "is stopping" in str(await refused.refusal())
        at.world.assert_idle()
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(("to 0x", "farewell", "funds"))] == []


@pytest.mark.parametrize("stops", [True, False])
async def test_who_ended_the_link_of_a_running_job(*, stops: bool) -> None:
    """A process that stops, also because of an error, knows that it cut off its nodes; a node that left did so itself."""
    async with served() as at:
        ann = await LinkNode.join(at, ANN)
        client = at.world.read(await at.world.market.place_order(make_submission(ann.asks[0])))
        await ann.take_job()
        await (at.hub.close() if stops else ann.socket.close())
        await until(lambda: client.ended)
        assert client.failure.code is (Code.COORDINATOR_UNAVAILABLE if stops else Code.NODE_GONE)
        assert client.job.attempts[0].record.unseen is stops


async def test_a_payer_is_no_node(at: Served) -> None:
    """Any key may connect; without asks it gets no jobs."""
    node = await LinkNode.open(at, PAYER)
    node.asks = ()
    await node.hello()
    await node.expect(Kind.WELCOME)
    assert at.world.market.book.size == 0


async def test_a_node_whose_jobs_alone_are_heard_is_not_silent() -> None:
    """Frames of running jobs are signs of life too, though the link's task does not see them; a real silence still ends it."""
    link = NodeLink(cast(Any, asyncio.Event().wait), cast(Any, None), "192.0.2.1", Counter())
    waits = 0

    class Expired:
        """A watchdog whose time is always up."""

        async def wait(self, awaitable: Any) -> Any:
            nonlocal waits
            awaitable.close()
            waits += 1
            link.heard = waits < 3
            raise TimeoutError

    with pytest.raises(Refusal, match="silent"):
        await link.receive(cast(Any, Expired()))
    assert waits == 3


async def test_chunks_keep_their_order(at: Served) -> None:
    """Frames reach their job in the order in which they came, whether they came whole, in pieces or in fragments."""
    node = await LinkNode.join(at, ANN)
    submission = make_submission(node.asks[0])
    async with at.http.stream("POST", "/v1/jobs", content=submission.dumps()) as response:
        frames = frames_of(response)
        assert (await anext(frames))[0] is Kind.MATCH
        job, receipt = await node.take_job()
        sent = [bytes([0, number]) * (1 + 3_000 * (number % 3)) for number in range(40)]
        for number, chunk in enumerate(sent):
            whole = pack_link(Kind.CHUNK, job, chunk)
            if number % 4 == 3:
                await node.socket.send([whole[:1], whole[1:20], whole[20:]])
            else:
                await node.socket.send(whole)
            if number % 8 == 0:
                await node.send_beat()
        await node.finish(job, receipt)
        assert [payload async for kind, payload in frames if kind is Kind.CHUNK][:-1] == sent


# Replicas


async def test_nodes_learn_the_replicas(at: Served) -> None:
    """WELCOME lists the replicas; a change of the list follows in REPLICAS, only to nodes that announced that they take it."""
    urls = [f"https://r{i}.example" for i in range(MAX_REPLICAS + 1)]
    at.hub.set_replicas(urls[:2])
    nodes = [await LinkNode.open(at, signer) for signer in (ANN, BOB)]
    nodes[0].takes_replicas = True
    for node in nodes:
        await node.hello()
        assert loads(await node.expect(Kind.WELCOME), "welcome") == {"replicas": urls[:2]}
    at.hub.set_replicas(urls[:2])
    at.hub.set_replicas(urls)
    assert loads(await nodes[0].expect(Kind.REPLICAS), "replicas") == urls[:MAX_REPLICAS]
    at.hub.set_replicas([])
    assert loads(await nodes[0].expect(Kind.REPLICAS), "replicas") == []
    await nodes[1].send(Kind.RECALL, payload=dumps({"after": ""}))
    await nodes[1].expect(Kind.RECALLED)
    assert all(kind is not Kind.REPLICAS for kind, _, _ in nodes[1].seen)


async def test_a_lone_coordinator_lists_no_replicas(at: Served) -> None:
    """WELCOME is as it was before there were replicas."""
    node = await LinkNode.open(at, ANN)
    await node.hello()
    assert await node.expect(Kind.WELCOME) == b"{}"
