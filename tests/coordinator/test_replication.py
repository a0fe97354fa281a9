"""Several whole coordinators on one PostgreSQL and one NATS: one coordinator to clients and nodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator import app as module
from coordinator.app import running
from coordinator.config import CoordinatorConfig
from tallystick.protocol.errors import TallyError
from tallystick.protocol.health import Health
from tallystick.protocol.link import Capacity
from tallystick.protocol.replicas import read_replicas
from tallystick.protocol.wire import NO_JOB, Kind, dumps, loads
from tests.coordinator.fake_escrow import DEPLOYMENT, FakeEscrow
from tests.coordinator.harness import COORDINATOR, DOMAIN, LAST_CHUNK, PAYER, make_ask, make_claim, make_submission, person
from tests.coordinator.http.test_api import access
from tests.coordinator.live_server import TIMEOUT_SECONDS, LinkNode, frames_of
from tests.nats_server import NatsServer, nats_server
from tests.postgres import POSTGRES, empty_database

pytestmark = pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
ANN = person("ann")


@dataclass
class Replica:
    """One running coordinator."""

    http: httpx.AsyncClient
    stop: AsyncExitStack

    @property
    def url(self) -> str:
        return str(self.http.base_url).rstrip("/")

    async def listed(self) -> set[str]:
        """Returns the URLs that this replica lists."""
        raw = (await self.http.get("/v1/info")).json()["replicas"]
        listed = read_replicas(raw, "replicas")
        assert [one["id"] for one in raw] == sorted(replica.id for replica in listed)
        return {replica.url for replica in listed}

    async def node(self, **changes: Any) -> LinkNode:
        """Connects Ann's node. Its `seen` ends with WELCOME."""
        node = await LinkNode.open(self.url.replace("http", "ws") + "/v1/node", ANN)
        node.takes_replicas = True
        await node.hello(**changes)
        await node.expect(Kind.WELCOME)
        return node


@dataclass
class Cluster:
    """Replicas on one database and one NATS."""

    config: CoordinatorConfig
    nats: NatsServer
    escrow: FakeEscrow
    running: AsyncExitStack

    async def start(self) -> Replica:
        """Starts one more replica."""
        stop = AsyncExitStack()
        await self.running.enter_async_context(stop)
        port = await stop.enter_async_context(running(self.config, COORDINATOR))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=TIMEOUT_SECONDS)
        return Replica(await stop.enter_async_context(client), stop)


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    """An empty database and a NATS server, without replicas."""
    escrow = FakeEscrow()
    escrow.free[PAYER.address] = 10_000
    monkeypatch.setattr(module, "Escrow", lambda *_: escrow)
    monkeypatch.setattr("coordinator.chain.settler.read_events", escrow.read_events)
    DEPLOYMENT.save(tmp_path / "deployment.json")
    async with nats_server() as nats, AsyncExitStack() as stack:
        config = CoordinatorConfig(
            deployment=tmp_path / "deployment.json", port=0, db=await empty_database(), bus=nats.url, settle_interval=0.01
        )
        yield Cluster(config, nats, escrow, stack)


async def until(condition: Callable[[], Any], expected: Any = True) -> None:
    """Waits until a coroutine returns what is expected."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while await condition() != expected:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_replicas_are_one_coordinator(cluster: Cluster) -> None:
    """All list all, to clients and to nodes. One that stops is off every list first, and one that comes is on it at once."""
    first = await cluster.start()
    assert await first.listed() == {first.url}
    node = await first.node()
    assert loads(node.seen[-1][2], "welcome") == {"replicas": [first.url]}
    second = await cluster.start()
    assert await second.listed() == {first.url}, "until nodes are connected to it"
    assert set(loads(await node.expect(Kind.REPLICAS), "replicas")) == {first.url, second.url}
    await until(first.listed, {first.url, second.url})
    await second.stop.aclose()
    assert loads(await node.expect(Kind.REPLICAS), "replicas") == [first.url]
    assert await first.listed() == {first.url}


async def test_a_cancel_reaches_the_replica_that_has_the_job(cluster: Cluster) -> None:
    """A payer cancels at any replica; its node is told to stop."""
    first, second = await cluster.start(), await cluster.start()
    node = await first.node()
    submission = make_submission(make_ask(ANN), now=int(time.time()))
    path = f"/v1/jobs/{submission.job.hex()}"
    async with first.http.stream("POST", "/v1/jobs", content=submission.dumps()) as response:
        frames = frames_of(response)
        assert (await anext(frames))[0] is Kind.MATCH
        await until(_state(second, path), "matched")
        headers = access(issued_at=int(time.time()))
        cancelled = await second.http.post(f"{path}/cancel", headers=headers)
        assert (cancelled.status_code, cancelled.json()) == (202, {"cancelling": True})
        await node.expect(Kind.CANCEL)
        await frames.aclose()


def _state(replica: Replica, path: str) -> Callable[[], Any]:
    async def state() -> str | None:
        shown = await replica.http.get(path, headers=access(issued_at=int(time.time())))
        return shown.json().get("state") if shown.status_code == 200 else None

    return state


async def test_health_names_what_is_away(cluster: Cluster) -> None:
    """Without NATS the replica serves, with a warning; the replicas are still found through the database."""
    await cluster.nats.stop()
    first = await cluster.start()
    second = await cluster.start()
    await until(first.listed, {first.url, second.url})
    await until(_status(first, "bus"), Health.WARN)
    assert await _status(first, "replicas")() == Health.PASS
    assert "tallystick_coordinator_bus_connected 0.0" in (await first.http.get("/metrics")).text
    await cluster.nats.start()
    await until(_connected(first))


def _status(replica: Replica, dependency: str) -> Callable[[], Any]:
    async def status() -> str:
        return str((await replica.http.get("/readyz")).json()["checks"][dependency][0]["status"])

    return status


def _connected(replica: Replica) -> Callable[[], Any]:
    async def connected() -> bool:
        return "tallystick_coordinator_bus_connected 1.0" in (await replica.http.get("/metrics")).text

    return connected


async def test_a_replica_and_a_lone_coordinator_exclude_each_other(cluster: Cluster) -> None:
    """A process without `bus` does not start beside a replica, and says what to do."""
    await cluster.start()
    with pytest.raises(TallyError, match="run all with `bus`"):
        async with running(replace(cluster.config, bus=None), COORDINATOR):
            pass


async def test_a_job_is_known_at_every_replica(cluster: Cluster) -> None:
    """Its state and receipt are read at any replica, and whoever sends the order again elsewhere learns that it was placed."""
    first, second = await cluster.start(), await cluster.start()
    node = await first.node()
    submission = make_submission(make_ask(ANN), now=int(time.time()))
    path = f"/v1/jobs/{submission.job.hex()}"
    response = asyncio.create_task(first.http.post("/v1/jobs", content=submission.dumps()))
    job, receipt = await node.take_job()
    await until(_state(second, path), "matched")
    for capacity in (None, Capacity(0, 1)):  # without a node, and with one that has no free slot
        if capacity is not None:
            await second.node(capacity=capacity)
        again = await second.http.post("/v1/jobs", content=submission.dumps())
        assert (again.status_code, again.json()["error"]["code"]) == (409, "order_replayed")
    idle = await second.node()
    async with second.http.stream("POST", "/v1/jobs", content=submission.dumps()) as again:
        assert [kind async for kind, payload in frames_of(again) if b"order_replayed" in payload] == [Kind.FAIL]
    assert all(kind is not Kind.DISPATCH for kind, _, _ in idle.seen)
    await node.finish(job, receipt)
    assert (await response).status_code == 200
    await until(_state(second, path), "completed")
    shown = (await second.http.get(path, headers=access(issued_at=int(time.time())))).json()
    assert shown["receipt"]["signature"] == "0x" + receipt.signature.hex()
    last = await second.http.post("/v1/jobs", content=submission.dumps())
    assert (last.status_code, last.json()["error"]["code"]) == (409, "order_replayed")


async def test_an_answer_is_had_again_at_another_replica(cluster: Cluster) -> None:
    """A client whose replica is gone posts the same bytes at the next one, and gets the answer that was kept."""
    first, second = await cluster.start(), await cluster.start()
    node = await first.node()
    submission = make_submission(make_ask(ANN), now=int(time.time()))
    headers = {"x-tally-linger": "60"}
    response = asyncio.create_task(first.http.post("/v1/jobs", content=submission.dumps(), headers=headers))
    job, receipt = await node.take_job()
    await node.finish(job, receipt)
    answer = (await response).content
    await first.stop.aclose()
    again = await second.http.post("/v1/jobs", content=submission.dumps(), headers=headers)
    assert (again.status_code, again.content) == (200, answer)


async def test_a_receipt_comes_in_at_any_replica(cluster: Cluster) -> None:
    """A node whose replica is gone hands in the receipt at another one, where the claim on it is settled."""
    first, second = await cluster.start(), await cluster.start()
    node = await first.node()
    submission = make_submission(make_ask(ANN), now=int(time.time()))
    path = f"/v1/jobs/{submission.job.hex()}"
    async with first.http.stream("POST", "/v1/jobs", content=submission.dumps()) as response:
        job, receipt = await node.take_job()
        await node.send(Kind.CHUNK, job, LAST_CHUNK)
        async for kind, _ in frames_of(response):
            if kind is Kind.CHUNK:
                break
        await first.stop.aclose()
    other = await second.node()
    await other.send(Kind.RECEIPT, job, receipt.to_bytes())
    await other.expect(Kind.RECEIPT_ACK)
    order = submission.candidates[0].order.verify(DOMAIN)
    claim = make_claim(ANN, (order, 1, receipt.message.cumulative_cost))
    await other.send(Kind.CLAIM, NO_JOB, dumps(claim.to_json()))

    async def settled() -> bool:
        shown = (await second.http.get(path, headers=access(issued_at=int(time.time())))).json()
        return shown["settlement"] is not None

    await until(settled)
    assert cluster.escrow.settled == {(PAYER.address, ANN.address): receipt.message.cost}
