"""The receipt of a running job: its client gets it at once, its node's acknowledgement waits until it is stored."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.ports import JobRecord
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.types import Amount, JobId
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import COST, PAYER, World, quiet, unchecked
from tests.coordinator.live_server import LinkClient, served, until


@dataclass
class SlowStore(MemoryStore):
    """A store whose receipts are stored once `open` is set, or never if the process is killed before."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    fails: bool = False

    async def put_receipt(self, job: JobId, receipt: Verified[Receipt], total: Amount, record: JobRecord | None = None) -> None:
        """See JobStore."""
        await self.open.wait()
        if self.fails:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the database does not answer")
        await super().put_receipt(job, receipt, total, record)


async def test_the_client_waits_for_no_disk() -> None:
    """It has the receipt before that is stored; the node gets its acknowledgement afterwards, and the job ends then."""
    store = SlowStore()
    world = World(store=store)
    node = world.node("ann")
    client = await world.started(node)
    node.chunk(client.job.id)
    receipt = node.complete(client.job.id)
    await quiet()
    assert client.frames[-1] == (Kind.RECEIPT, receipt.to_bytes())
    assert node.got(Kind.RECEIPT_ACK) == []
    assert world.market.live == 1
    store.open.set()
    await quiet()
    assert client.kinds.count(Kind.RECEIPT) == 1
    assert node.got(Kind.RECEIPT_ACK) == [b""]
    assert await world.stored(client) is State.COMPLETED
    world.assert_idle()


async def test_the_next_job_finds_its_slot_free() -> None:
    """A client that has its receipt may order again at once: slot, funds and its count of jobs are free, and the total counts."""
    store = SlowStore()
    world = World(store=store, limits=JobLimits(jobs_per_payer=1))
    node = world.node("ann", slots=1)
    for number in range(1, 4):
        client = await world.started(node)
        node.complete(client.job.id)
        await quiet()
        assert client.kinds[-1] is Kind.RECEIPT
        tab = world.market.exposure.known(PAYER.address, node.address)
        assert tab is not None
        assert tab.cumulative == number * COST
    assert node.got(Kind.RECEIPT_ACK) == []
    store.open.set()
    await quiet()
    assert len(node.got(Kind.RECEIPT_ACK)) == 3
    world.assert_idle()


async def test_a_coordinator_that_is_killed_before_it_stored_the_receipt() -> None:
    """Nothing is lost: the client has the receipt, and the node, which was sent no acknowledgement, sends it again."""
    store = SlowStore()
    world = World(store=store)
    node = world.node("ann")
    client = await world.started(node)
    receipt = node.complete(client.job.id)
    await quiet()
    assert client.frames[-1] == (Kind.RECEIPT, receipt.to_bytes())
    store.open = asyncio.Event()  # what waits for the former one is dead
    await world.restart()
    store.open.set()
    assert await node.hand_in_late(client.job.id, receipt)
    known = await world.store.job(client.job.id)
    assert known is not None
    assert (known.record.state, known.record.attempts[0].state) == (State.COMPLETED, State.COMPLETED), "as the client was told"
    assert known.record.attempts[0].reason == "reported by its provider, after this coordinator had lost it"
    assert list(known.receipts.values()) == [unchecked(receipt)]
    assert node.got(Kind.RECEIPT_ACK, client.job.id) == [b""]


async def test_a_receipt_that_cannot_be_stored_is_passed_on_once() -> None:
    """The client has it, the node sends it again: its acknowledgement never came."""
    store = SlowStore(fails=True)
    world = World(store=store)
    node = world.node("ann")
    client = await world.started(node)
    node.complete(client.job.id)
    await quiet()
    store.open.set()
    await quiet()
    assert client.kinds.count(Kind.RECEIPT) == 1
    assert node.got(Kind.RECEIPT_ACK) == []
    assert await world.stored(client) is State.COMPLETED
    world.assert_idle()


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.UPSTREAM_ERROR])
async def test_the_stream_ends_with_the_receipt(outcome: Outcome) -> None:
    """On a link, the stream's end comes in the same message, although the job goes on; a client that leaves then ends nothing."""
    store = SlowStore()
    world = World(store=store)
    async with served(world) as at:
        node, client = world.node("ann"), await LinkClient.join(at)
        submission = world.submission(node)
        stream = await client.submit(submission)
        await client.expect(stream, Kind.MATCH)
        node.complete(submission.job, outcome=outcome)
        await client.expect(stream, Kind.END)
        assert client.kinds(stream)[-2:] == [Kind.RECEIPT, Kind.END]
        client.socket.transport.abort()
        await until(lambda: at.app.clients.connected == 0)
        assert node.got(Kind.RECEIPT_ACK) == node.got(Kind.CANCEL) == []
        store.open.set()
        await until(lambda: node.got(Kind.RECEIPT_ACK))
        await until(lambda: not at.app.clients._jobs)
        world.assert_idle()


async def test_a_receipt_says_that_a_kept_response_can_be_had_again() -> None:
    """The client of a job that lingers gets its receipt once receipt and response are stored."""
    store = SlowStore()
    world = World(store=store)
    async with served(world) as at:
        node, client = world.node("ann"), await LinkClient.join(at)
        submission = world.submission(node)
        stream = await client.submit(submission, 30)
        await client.expect(stream, Kind.MATCH)
        node.complete(submission.job)
        await client.expect(stream, Kind.CHUNK)
        await quiet()
        assert Kind.RECEIPT not in client.kinds(stream)
        store.open.set()
        await client.expect(stream, Kind.END)
        assert client.kinds(stream)[-2:] == [Kind.RECEIPT, Kind.END]
        assert node.got(Kind.RECEIPT_ACK) == [b""]
