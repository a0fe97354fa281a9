"""The whole coordinator: it serves without a chain, keeps its state over restarts, and stops if a part fails."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from coordinator import app as module
from coordinator.app import running
from coordinator.chain.settler import Settler
from coordinator.config import CoordinatorConfig
from coordinator.health_checks import HealthChecks
from coordinator.jobs.market import Market
from coordinator.replication import Replication
from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.wire import NO_JOB, Kind, dumps
from tallystick.runtime import single_instance
from tests.coordinator.fake_escrow import DEPLOYMENT, FakeEscrow
from tests.coordinator.harness import COORDINATOR, DOMAIN, PAYER, make_ask, make_claim, make_submission, person
from tests.coordinator.http.test_api import access
from tests.coordinator.live_server import TIMEOUT_SECONDS, LinkNode
from tests.postgres import POSTGRES, empty_database


@pytest.fixture
def config(tmp_path: Path) -> CoordinatorConfig:
    """The config of a coordinator on a free port, whose chain never answers."""
    DEPLOYMENT.save(tmp_path / "deployment.json")
    return CoordinatorConfig(
        deployment=tmp_path / "deployment.json", port=0, db=f"sqlite:///{tmp_path}/coordinator.db", settle_interval=0.01
    )


@asynccontextmanager
async def _client(config: CoordinatorConfig) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        running(config, COORDINATOR) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        yield http


async def test_it_serves_without_a_chain(config: CoordinatorConfig) -> None:
    """A chain that is down delays settlement alone: the market serves and identifies itself."""
    async with _client(config) as http:
        info = (await http.get("/v1/info")).json()
        assert (info["coordinator"], info["contract"]) == (COORDINATOR.address, DEPLOYMENT.escrow)
        ready = await http.get("/readyz", timeout=60)
        assert (ready.status_code, ready.headers["content-type"]) == (503, "application/health+json")
        report = ready.json()
        assert report["status"] == "fail"
        assert report["checks"]["database"][0]["status"] == "pass"
        (chain,) = report["checks"]["chain"]
        assert (chain["status"], chain["output"]) == ("fail", "it does not answer")
        assert "`rpc`" in chain["remedy"]
        assert DEPLOYMENT.rpc not in ready.text, "an RPC address may contain a key"
        alive = await http.get("/healthz")
        assert (alive.status_code, alive.json()["status"]) == (200, "failing")
        assert alive.json()["checks"] == {"database": "pass", "disk": "pass", "chain": "fail", "claims": "pass"}
        for former, route in (("/v1/health", "/healthz"), ("/v1/ready", "/readyz")):
            assert (await http.get(former)).json().keys() == (await http.get(route)).json().keys()
        response = await http.post("/v1/jobs", content=make_submission(make_ask(person("ann"))).dumps())
        assert response.status_code == 400, "its orders are of another time"


async def test_it_starts_and_stops_again(config: CoordinatorConfig) -> None:
    """A second start on the same database works, and a stop leaves no task running."""
    before = asyncio.all_tasks()
    for _ in range(2):
        async with _client(config) as http:
            assert (await http.get("/v1/models")).json() == {"data": [], "next": None}
    left = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not left & {"settler", "sweep", "group-commit", "http-server"}


async def test_a_job_over_restarts(config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job runs over HTTP, the link and SQLite, and is claimed and settled; the next process knows all of it."""
    escrow = FakeEscrow()
    escrow.free[PAYER.address] = 10_000
    monkeypatch.setattr(module, "Escrow", lambda *_: escrow)
    monkeypatch.setattr("coordinator.chain.settler.read_events", escrow.read_events)
    node_key = person("ann")
    submission = make_submission(make_ask(node_key), now=int(time.time()))
    path = f"/v1/jobs/{submission.job.hex()}"
    async with _client(config) as http:
        node = await LinkNode.join(_node_url(http), node_key)
        response = asyncio.create_task(http.post("/v1/jobs", content=submission.dumps()))
        job, receipt = await node.take_job()
        await node.finish(job, receipt)
        assert (await response).status_code == 200
        order = submission.candidates[0].order.verify(DOMAIN)
        claim = make_claim(node_key, (order, 1, receipt.message.cumulative_cost))
        await node.send(Kind.CLAIM, NO_JOB, dumps(claim.to_json()))
        shown = await _settled(http, path)
        assert (shown["state"], shown["receipt"]["signature"]) == ("completed", "0x" + receipt.signature.hex())
    assert escrow.settled == {(PAYER.address, node_key.address): receipt.message.cost}
    async with _client(config) as http:
        assert (await http.get(path, headers=_access())).json() == shown
        again = await http.post("/v1/jobs", content=submission.dumps())
        assert (again.status_code, again.json()["error"]["code"]) == (409, "order_replayed")
        node = await LinkNode.join(_node_url(http), node_key)
        await node.finish(job, receipt)
    assert len(escrow.sent) == 1


def _access() -> dict[str, str]:
    return access(issued_at=int(time.time()))


def _node_url(http: httpx.AsyncClient) -> str:
    return f"ws://{http.base_url.host}:{http.base_url.port}/v1/node"


async def _settled(http: httpx.AsyncClient, path: str) -> Any:
    """Returns the JSON of a job once it is settled."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            shown = (await http.get(path, headers=_access())).json()
            if shown["settlement"] is not None:
                return shown
            await asyncio.sleep(0.01)


async def test_a_failed_part_stops_the_coordinator(config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the sweep or the settler fails with a bug, the process stops with its error instead of running without deadlines."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    for part, name in ((Market, "sweep"), (Settler, "settle")):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, broken)
            patch.setattr(module, "SWEEP_SECONDS", 0.001)
            with pytest.raises(ExceptionGroup) as caught:
                async with running(config, COORDINATOR):
                    await asyncio.wait_for(asyncio.Event().wait(), 60)
            assert caught.value.subgroup(ZeroDivisionError) is not None


async def test_a_start_that_fails_late_closes_its_connections(config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that serves already, and cannot join the others, leaves none to the garbage collector, which would write tracebacks."""
    built, closed = list[object](), list[object]()
    build, close = module._build, HealthChecks.close

    async def kept(*args: Any, **options: Any) -> Any:
        parts = await build(*args, **options)
        built.append(parts.health)
        return parts

    async def closing(checks: HealthChecks) -> None:
        await close(checks)
        closed.append(checks)

    async def fails(*_: object) -> None:
        raise Unavailable(Code.DATABASE_UNAVAILABLE, "the table of replicas cannot be reached")

    monkeypatch.setattr(module, "_build", kept)
    monkeypatch.setattr(HealthChecks, "close", closing)
    monkeypatch.setattr(Replication, "join", fails)
    with pytest.raises(Unavailable, match="table of replicas"):
        async with running(config, COORDINATOR):
            pass
    assert closed == built != []


async def test_a_port_in_use(config: CoordinatorConfig) -> None:
    """A port in use is reported as such, and everything that was opened is closed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Unavailable, match="cannot listen"):
            async with running(replace(config, port=taken.getsockname()[1]), COORDINATOR):
                pass


async def test_no_deployment(config: CoordinatorConfig, tmp_path: Path) -> None:
    """The error names a deployment file that is missing or broken."""
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(BadMessage, match=r"broken\.json"):
        async with running(replace(config, deployment=tmp_path / "broken.json"), COORDINATOR):
            pass
    with pytest.raises(BadMessage, match=r"missing\.json"):
        async with running(replace(config, deployment=tmp_path / "missing.json"), COORDINATOR):
            pass


async def test_no_database(config: CoordinatorConfig) -> None:
    """A database that does not answer is reported at the start."""
    with pytest.raises(Unavailable, match="database") as caught:
        async with running(replace(config, db="postgresql+asyncpg://nobody@127.0.0.1:1/nothing"), COORDINATOR):
            pass
    assert caught.value.code is Code.DATABASE_UNAVAILABLE


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
async def test_a_coordinator_that_lost_its_lock_does_not_go_on(
    config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection that held the database's lock is lost, another coordinator may start, so this one stops and says why."""
    monkeypatch.setattr(single_instance, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(single_instance, "ADVISORY_LOCK", 0x7A15)

    shared = replace(config, db=await empty_database())

    async def run_until_cut() -> None:
        async with running(shared, COORDINATOR):
            with pytest.raises(Unavailable, match="runs a coordinator"):
                async with running(shared, COORDINATOR):
                    pass
            await _cut(shared.db, 0x7A15)
            await asyncio.wait_for(asyncio.Event().wait(), 60)

    with pytest.raises(Unavailable, match="connection that held this coordinator's database was lost"):
        await run_until_cut()


async def _cut(url: str, key: int) -> None:
    """Makes the server end the session that holds an advisory lock."""
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        kill = (
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = :key AND granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        await connection.execute(sa.text(kill), {"key": key})
    await engine.dispose()


async def test_a_second_coordinator_does_not_start(config: CoordinatorConfig) -> None:
    """A second coordinator on the same database is refused, and the first continues."""
    async with _client(config) as http:
        with pytest.raises(Unavailable, match="runs a coordinator on the database"):
            async with running(config, COORDINATOR):
                pass
        assert (await http.get("/healthz")).status_code == 200


async def test_a_lost_database_is_reported(config: CoordinatorConfig, tmp_path: Path) -> None:
    """If the database's file is gone, the coordinator is not ready, and its liveness route still answers."""
    async with _client(config) as http:
        (tmp_path / "coordinator.db").unlink()
        ready = await http.get("/readyz", timeout=60)
        while ready.json()["checks"]["database"][0]["status"] == "pass":  # of the check at the start
            await asyncio.sleep(0.2)
            ready = await http.get("/readyz", timeout=60)
        assert ready.status_code == 503
        assert "`db`" in ready.json()["checks"]["database"][0]["remedy"]
        assert (await http.get("/healthz")).status_code == 200
