"""A node's process with links to several replicas of its coordinator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node.engines.demo import Simulation
from node.service.status_socket import read_status
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Ask, Outcome
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address
from tallystick.protocol.wire import Failure, Kind, loads
from tests.node.fake_coordinator import Connection, FakeCoordinator
from tests.node.harness import COORDINATOR, DOMAIN
from tests.node.service.test_daemon import Site, receipt, site

__all__ = ["site"]


@asynccontextmanager
async def replicated(site: Site) -> AsyncIterator[tuple[Connection, Connection, Verified[Ask]]]:
    """Runs a node that is connected to both replicas of its coordinator."""
    async with FakeCoordinator().serving() as other:
        for coordinator in (site.coordinator, other):
            coordinator.replicas = [site.coordinator.url, other.url]
        process = await site.start(receipt_resend_interval=3_600)
        try:
            first, second = await site.coordinator.connections.get(), await other.connections.get()
            ask = (await first.asks())[0].verify(DOMAIN)
            await second.asks()
            yield first, second, ask
        finally:
            process.kill()
            await process.communicate()


async def late_receipt(connection: Connection, placed_job: bytes) -> LateReceipt:
    """Waits for a job's receipt with its order."""
    while True:
        for payload in connection.of(Kind.LATE_RECEIPT):
            late = LateReceipt.from_json(loads(payload, "late receipt"))
            if late.terms.job == placed_job:
                return late
        connection.came.clear()
        await connection.came.wait()


async def test_jobs_of_both_replicas(site: Site) -> None:
    """Jobs from two replicas are on one tab, and each ends where it came from. The state is recovered from one of them alone."""
    async with replicated(site) as (first, second, ask):
        for seq, connection in enumerate((first, second, first), 1):
            placed = await site.place(connection, ask)
            assert (await receipt(connection, placed)).seq == seq
        assert sum(len(connection.of(Kind.RECALL)) for connection in (first, second)) == 1
        for connection in (first, second):
            assert not connection.of(Kind.LATE_RECEIPT)


async def test_the_receipt_of_a_lost_replica(site: Site) -> None:
    """A job whose replica dies after the first chunk ends at once, and its receipt goes to the other replica."""
    async with replicated(site) as (first, second, ask):
        site.engine._usual = Simulation(token_seconds=0.05)
        placed = await site.place(first, ask)
        await first.until(Kind.CHUNK, 2, placed.job)
        await first.socket.close()
        late = await late_receipt(second, placed.job)
        check_receipt(placed.order, placed.terms, late.receipt.verify(DOMAIN).message)
        assert late.receipt.message.cost == 0
        site.engine._usual = Simulation()
        assert (await receipt(second, await site.place(second, ask))).seq == 2


async def test_a_receipt_that_was_sent_and_not_confirmed(site: Site) -> None:
    """The receipt of a whole answer that a replica took with it in its death goes to the other replica as it was signed."""
    site.coordinator.acknowledge = False
    async with replicated(site) as (first, second, ask):
        placed = await site.place(first, ask)
        done = await receipt(first, placed)
        await first.socket.close()
        late = await late_receipt(second, placed.job)
        assert (late.receipt.message, done.outcome) == (done, Outcome.COMPLETED)


async def test_the_same_order_at_two_replicas(site: Site) -> None:
    """An order that ran for one replica never runs for another."""
    async with replicated(site) as (first, second, ask):
        placed = await site.place(first, ask)
        await receipt(first, placed)
        await second.send(Kind.DISPATCH, placed.job, placed.dispatch.dumps())
        assert Failure.split(await second.until(Kind.FAIL, job=placed.job))[0]["error"]["code"] == "order_replayed"
        assert not second.of(Kind.CHUNK, placed.job)


async def test_the_free_slots_are_those_of_all_replicas(site: Site) -> None:
    """A job from one replica takes a slot that the other replica is told of; one too many is refused as busy, without charge."""
    async with replicated(site) as (first, second, ask):
        site.engine._usual = Simulation(token_seconds=30.0)
        slots = sum(capacity.free for capacity in second.capacities().values())
        placed = [await site.place(first, ask) for _ in range(slots)]
        for job in placed:
            await first.until(Kind.ACCEPT, job=job.job)
        while any(capacity.free for capacity in second.capacities().values()):
            second.came.clear()
            await second.came.wait()
        failed = Failure.loads(await second.until(Kind.FAIL, job=(await site.place(second, ask)).job))
        assert failed.error.code.value == "node_busy"
        assert failed.receipt is not None
        assert failed.receipt.message.cost == 0


async def test_the_status_tells_of_each_replica(site: Site) -> None:
    """`tally node status` knows the links by replica, and the coordinator is connected while one of them is."""
    async with replicated(site) as (first, _, _):
        urls = [f"{url.replace('http', 'ws', 1)}/v1/node" for url in site.coordinator.replicas]
        report = await read_status(site.folder / "state")
        assert report["coordinators"] == {urls[0]: COORDINATOR.address}
        assert report["replicas"] == {urls[0]: dict.fromkeys(urls, COORDINATOR.address)}
        site.coordinator.account = Address("0x" + "00" * 20)  # it does not come back as it was
        await first.socket.close()
        deadline = time.monotonic() + 60
        while report["replicas"][urls[0]][urls[0]] is not None:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
            report = await read_status(site.folder / "state")
        assert report["coordinators"] == {urls[0]: COORDINATOR.address}
