from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import shutil
import signal
import sqlite3
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from node.engines.demo import DemoEngine, Simulation
from node.engines.demo_answer import MODEL
from node.engines.discover import DiscoveredEngine
from node.service import engine_pool
from node.service.config import load_config
from node.service.daemon import build
from node.service.status_socket import read_status
from tallystick.chain.deployment import Deployment
from tallystick.cli.local.processes import free_port
from tallystick.protocol.eip712 import Verified, read_signed_bytes
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable, Undelivered
from tallystick.protocol.link import ClaimRequest, LateReceipt, read_asks
from tallystick.protocol.messages import Ask, Outcome, Receipt
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address
from tallystick.protocol.wire import Failure, Kind, dumps, loads
from tallystick.runtime.serving import serving
from tests.node.fake_coordinator import Connection, FakeCoordinator
from tests.node.harness import DOMAIN, PROVIDER, Client, PlacedJob, signer

ROOT = Path(__file__).parents[3]
OTHER = signer("another coordinator")
ASK = {"messages": [{"role": "user", "content": "what is a tally stick"}], "stream": True, "max_tokens": 100}


class Site:
    """A folder with a deployment and a config, an engine, and a coordinator. No chain responds: jobs must not need one."""

    def __init__(self, folder: Path, coordinator: FakeCoordinator, engine: DemoEngine, engine_port: int) -> None:
        self.folder, self.coordinator, self.engine, self.engine_port = folder, coordinator, engine, engine_port
        self.client = Client()
        deployment = Deployment(DOMAIN.chain_id, DOMAIN.contract, Address("0x" + "00" * 20), 6, 0, "http://127.0.0.1:1")
        deployment.save(folder / "deployment.json")

    def config(self, tables: str = "", **settings: Any) -> Path:
        """Writes a config; `tables` is added unchanged."""
        plain = {
            "coordinator": self.coordinator.url,
            "deployment": str(self.folder / "deployment.json"),
            "state": str(self.folder / "state"),
            "engine_check_interval": 0.1,
            "shutdown_grace": 10.0,
        } | settings
        lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
        lines += [
            "[[engines]]",
            f'url = "http://127.0.0.1:{self.engine_port}/v1"',
            "[link]",
            "min_backoff_seconds = 0.05",
            tables,
        ]
        path = self.folder / "node.toml"
        path.write_text("\n".join(lines))
        return path

    async def start(self, **settings: Any) -> Process:
        """Starts a node's process."""
        command = (sys.executable, "-m", "tests.node.run_daemon", str(self.config(**settings)))
        return await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=asyncio.subprocess.PIPE)

    async def place(self, connection: Connection, ask: Verified[Ask], body: dict[str, Any] | None = None) -> PlacedJob:
        """Dispatches a job to the node."""
        placed = self.client.order(ask, body or ASK, now=int(time.time()))
        await connection.send(Kind.DISPATCH, placed.job, placed.dispatch.dumps())
        return placed


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """Provides everything that a node needs around it."""
    engine = DemoEngine()
    async with asyncio.timeout(60), serving(engine.app, "127.0.0.1", 0) as port, FakeCoordinator().serving() as coordinator:
        yield Site(tmp_path, coordinator, engine, port)


@asynccontextmanager
async def node(site: Site, **settings: Any) -> AsyncIterator[tuple[Process, Connection, Verified[Ask]]]:
    """Runs a connected node; it is killed at the end if it still runs."""
    process = await site.start(**settings)
    try:
        connection = await site.coordinator.connections.get()
        yield process, connection, (await connection.asks())[0].verify(DOMAIN)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def receipt(connection: Connection, placed: PlacedJob) -> Receipt:
    """Returns a job's receipt, checked as coordinator and client would."""
    raw = await connection.until(Kind.RECEIPT, job=placed.job)
    signed = read_signed_bytes(Receipt, raw).verify(DOMAIN).message
    check_receipt(placed.order, placed.terms, signed)
    _, _, transcript, finished = placed.read(connection.of(Kind.CHUNK, placed.job))
    assert finished
    assert signed.result_commitment == transcript.commitment
    return signed


async def test_a_node_works_and_stops_in_order(site: Site) -> None:
    """A fresh node offers its engine's model and serves a streamed job without a chain. On SIGTERM it finishes running jobs,
    takes no new ones, submits its claim and exits with 0.
    """
    async with node(site) as (process, connection, ask):
        assert (ask.message.model, ask.message.context_tokens, ask.message.spec.engine) == (MODEL, 8_192, "tally-demo")
        first = await site.place(connection, ask)
        done = await receipt(connection, first)
        assert (done.outcome, done.seq) == (Outcome.COMPLETED, 1)
        head, body, _, _ = first.read(connection.of(Kind.CHUNK, first.job))
        assert head is not None
        assert (head.status, head.content_type) == (200, "text/event-stream")
        assert b"stand-in" in body
        assert b'"usage":{' not in body

        site.engine._usual = Simulation(token_seconds=0.05)
        slow = await site.place(connection, ask)
        await connection.until(Kind.CHUNK, 3, slow.job)
        process.send_signal(signal.SIGTERM)
        while any(capacity.free for capacity in connection.capacities().values()):
            await connection.until(Kind.BEAT, len(connection.of(Kind.BEAT)) + 1)
        late_job = await site.place(connection, ask)
        refused = Failure.loads(await connection.until(Kind.FAIL, job=late_job.job))
        assert refused.receipt is not None
        void = refused.receipt.verify(DOMAIN).message
        assert (refused.error.code, void.outcome, void.cost, void.seq) == (Code.NODE_BUSY, Outcome.REFUSED, 0, 2)
        last = await receipt(connection, slow)
        assert (last.outcome, last.seq) == (Outcome.COMPLETED, 3)
        claim = ClaimRequest.from_json(loads(await connection.until(Kind.CLAIM), "claim"))
        (row,) = claim.claim.verify(DOMAIN).message.rows
        assert (row.seq, row.cumulative_cost) == (3, last.cumulative_cost)
        assert await process.wait() == 0


async def test_receipts_survive_a_kill(site: Site) -> None:
    """After kill -9 a restarted node resends the unconfirmed receipt, refuses the same order, and continues with the next seq."""
    site.coordinator.acknowledge = False
    async with node(site) as (process, connection, ask):
        placed = await site.place(connection, ask)
        first = await connection.until(Kind.RECEIPT, job=placed.job)
        process.kill()
        await process.wait()
    site.coordinator.acknowledge = True
    async with node(site) as (process, connection, ask):
        late_receipt = LateReceipt.from_json(loads(await connection.until(Kind.LATE_RECEIPT, job=placed.job), "late receipt"))
        assert late_receipt.receipt.to_bytes() == first
        assert late_receipt.order.signature == placed.order.signature
        await connection.send(Kind.DISPATCH, placed.job, placed.dispatch.dumps())
        error = Failure.split(await connection.until(Kind.FAIL, job=placed.job))[0]["error"]
        assert error["code"] in ("order_replayed", "order_terms")
        following = await receipt(connection, await site.place(connection, ask))
        assert following.seq == 2
        process.terminate()
        assert await process.wait() == 0


async def test_a_restored_state_voids_nothing(site: Site) -> None:
    """It may lack a claim that rests on the receipt: with a lower total after it, the claim would cost the stake."""
    async with node(site) as (process, connection, ask):
        site.coordinator.acknowledge = False
        lost = await site.place(connection, ask)
        charged = await receipt(connection, lost)
        process.kill()
        await process.wait()
    with contextlib.closing(sqlite3.connect(next((site.folder / "state").glob("*.db")))) as database:
        database.execute("DELETE FROM completed_recoveries")
        database.commit()
    process = await site.start()
    try:
        connection = await site.coordinator.connections.get()
        await connection.until(Kind.LATE_RECEIPT, job=lost.job)
        await connection.send(Kind.RECEIPT_REFUSED, lost.job, dumps(Undelivered("the last chunk never came").as_json()))
        (ask,) = [offered.verify(DOMAIN) for offered in await connection.asks()]
        following = await receipt(connection, await site.place(connection, ask))
        assert (following.seq, following.cumulative_cost) == (2, charged.cumulative_cost + following.cost)
    finally:
        process.kill()
        await process.communicate()


async def last_free_receipt(connection: Connection, placed: PlacedJob) -> LateReceipt:
    """Waits for a receipt at no cost that comes late."""
    count = 1
    while True:
        raw = await connection.until(Kind.LATE_RECEIPT, count, job=placed.job)
        late_receipt = LateReceipt.from_json(loads(raw, "late receipt"))
        if not late_receipt.receipt.message.cost:
            return late_receipt
        count += 1


async def test_an_answer_whose_end_a_kill_lost_is_not_charged(site: Site) -> None:
    """The coordinator refuses its receipt as undelivered. Until then the restarted node offers nothing and signs nothing; then it
    signs a receipt at no cost with the next number, and goes on from the total before. What it finished and the coordinator got
    stays charged.
    """
    async with node(site) as (process, connection, ask):
        site.coordinator.acknowledge = False
        first = await site.place(connection, ask)
        paid = await receipt(connection, first)
        site.engine._usual = Simulation(token_seconds=1.0)
        cut = await site.place(connection, ask)
        await connection.until(Kind.CHUNK, 2, cut.job)
        site.engine._usual = Simulation()
        lost = await site.place(connection, ask)
        charged = await receipt(connection, lost)
        assert (charged.seq, charged.cumulative_cost) == (2, paid.cumulative_cost + charged.cost)
        process.kill()
        await process.wait()
    process = await site.start()
    try:
        connection = await site.coordinator.connections.get()
        await connection.until(Kind.LATE_RECEIPT, 2, job=lost.job)  # asked again while there is no answer
        assert not connection.of(Kind.LATE_RECEIPT, cut.job)
        await connection.send(Kind.RECEIPT_ACK, first.job)
        await connection.until(Kind.LATE_RECEIPT, 4, job=lost.job)
        assert not connection.of(Kind.LATE_RECEIPT, cut.job)
        assert not connection.hello.asks
        assert not any(loads(listing, "asks")["asks"] for listing in connection.of(Kind.ASKS))
        await connection.send(Kind.RECEIPT_REFUSED, lost.job, dumps(Undelivered("the last chunk never came").as_json()))
        free = [await last_free_receipt(connection, placed) for placed in (lost, cut)]
        for placed, late_receipt in zip((lost, cut), free, strict=True):
            signed = late_receipt.receipt.verify(DOMAIN).message
            check_receipt(placed.order, placed.terms, signed)
            assert (signed.outcome, signed.cost) == (Outcome.PROVIDER_ERROR, 0)
            assert signed.cumulative_cost == paid.cumulative_cost
        assert sorted(late_receipt.receipt.message.seq for late_receipt in free) == [3, 4]
        (ask,) = [offered.verify(DOMAIN) for offered in await connection.asks()]
        following = await receipt(connection, await site.place(connection, ask))
        assert (following.seq, following.cumulative_cost) == (5, paid.cumulative_cost + following.cost)
    finally:
        process.kill()
        await process.communicate()


async def test_an_order_cut_off_by_a_kill_is_released(site: Site) -> None:
    """After kill -9 in mid-response a restarted node signs a receipt at no cost with the next number, sends it at once, and never
    runs the order again.
    """
    async with node(site) as (process, connection, ask):
        assert (await receipt(connection, await site.place(connection, ask))).seq == 1
        site.engine._usual = Simulation(token_seconds=1.0)
        cut, another = await site.place(connection, ask), await site.place(connection, ask)
        for placed in (cut, another):
            await connection.until(Kind.CHUNK, 2, placed.job)
        process.kill()
        await process.wait()
        assert not connection.of(Kind.RECEIPT, cut.job)
    site.engine._usual = Simulation()
    async with node(site) as (process, connection, ask):
        numbers = []
        for placed in (cut, another):
            late_receipt = LateReceipt.from_json(loads(await connection.until(Kind.LATE_RECEIPT, job=placed.job), "late receipt"))
            signed = late_receipt.receipt.verify(DOMAIN).message
            check_receipt(placed.order, placed.terms, signed)
            assert (signed.outcome, signed.cost) == (Outcome.PROVIDER_ERROR, 0)
            numbers.append(signed.seq)
        assert sorted(numbers) == [2, 3]
        await connection.send(Kind.DISPATCH, cut.job, cut.dispatch.dumps())
        refused = Failure.loads(await connection.until(Kind.FAIL, job=cut.job))
        assert (refused.error.code, refused.receipt) == (Code.ORDER_REPLAYED, None)
        assert (await receipt(connection, await site.place(connection, ask))).seq == 4
        process.terminate()  # a clean stop stores the confirmations
        assert await process.wait() == 0
    async with node(site) as (_, connection, ask):
        assert (await receipt(connection, await site.place(connection, ask))).seq == 5
        assert not connection.of(Kind.LATE_RECEIPT, cut.job), "it was confirmed, and is closed once"


async def test_a_suspended_coordinator_is_offered_nothing(site: Site) -> None:
    """A coordinator that drops the link in mid-response is suspended once that cost too much, even after a restart; `tally node
    status` says why.
    """
    site.engine._usual = Simulation(token_seconds=0.3)
    rules = '[admission]\nmax_unpaid = "0.000001"\n'
    async with node(site, tables=rules) as (process, connection, ask):
        placed = await site.place(connection, ask)
        await connection.until(Kind.CHUNK, 5, placed.job)
        await connection.socket.close()
        again = await site.coordinator.connections.get()
        late_receipt = LateReceipt.from_json(loads(await again.until(Kind.LATE_RECEIPT, job=placed.job), "late receipt"))
        assert late_receipt.receipt.verify(DOMAIN).message.cost == 0
        assert again.hello.asks == () or read_asks(json_of(await again.until(Kind.ASKS))["asks"]) == ()
        more = await site.place(again, ask)
        refused = Failure.loads(await again.until(Kind.FAIL, job=more.job))
        assert (refused.error.code, refused.error.fault) == (Code.NODE_BUSY, Fault.COORDINATOR)
        assert refused.receipt is not None
        report = await read_status(site.folder / "state")
        (credit,) = report["coordinator_credit"].values()
        assert (credit["served"], int(credit["writtenOff"]) > 1) == (False, True)
        assert not report["ok"]
        assert "served again" in report["trouble"]
        assert report["alarms"][0]["what"] == "coordinator leaves work unpaid"
        process.kill()
        await process.wait()
    process = await site.start(tables=rules)
    try:
        connection = await site.coordinator.connections.get()
        assert connection.hello.asks == ()
    finally:
        process.kill()
        await process.communicate()


async def test_asks_follow_the_engine(site: Site) -> None:
    """A node whose engine goes away withdraws its asks and reports it at /healthz; both return with the engine."""
    port = free_port(0)
    async with serving(DemoEngine().app, "127.0.0.1", 0) as other:
        site.engine_port = other
        process = await site.start(metrics_port=port, trusted_proxies=["127.0.0.1"])
        connection = await site.coordinator.connections.get()
        assert len(await connection.asks()) == 1
        seen = len(connection.of(Kind.ASKS))
    try:
        while True:
            seen += 1
            if not read_asks(loads(await connection.until(Kind.ASKS, seen), "asks")["asks"]):
                break
        metrics_url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session:
            async with session.get(metrics_url + "/healthz") as response:
                assert response.status == 200
                state = await response.json()
                assert (state["ok"], list(state["engines"].values())) == (False, ["down"])
            async with session.get(metrics_url + "/nothing", headers={"accept": "text/html"}) as response:
                assert (response.status, 'href="/income"' in await response.text()) == (404, True)
            status, checks = await _ready(session, metrics_url, engines="fail")
            assert status == 503
            assert {"coordinator", "database", "disk", "chain", "debts", "clock"} <= checks.keys()
            assert (checks["coordinator"], checks["database"]) == ("pass", "pass")
            async with serving(DemoEngine().app, "127.0.0.1", other):
                while True:
                    seen += 1
                    if read_asks(loads(await connection.until(Kind.ASKS, seen), "asks")["asks"]):
                        break
                async with session.get(metrics_url + "/healthz") as response:
                    assert (await response.json())["ok"]
                assert (await _ready(session, metrics_url, engines="pass"))[1]["database"] == "pass"
                async with session.get(metrics_url + "/") as response:
                    assert "Ready to earn" in await response.text()
                forwarded = {"x-forwarded-proto": "https"}
                async with session.get(metrics_url + "/income/", headers=forwarded, allow_redirects=False) as response:
                    assert response.headers["location"] == f"https://127.0.0.1:{port}/income"
                for path in ("/income", "/money"):
                    async with session.get(metrics_url + path) as response:
                        assert (response.status, response.content_type) == (200, "text/html")
                async with session.get(metrics_url + "/metrics") as response:
                    assert "tallystick_node_unsecured_units" in await response.text()
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _ready(session: aiohttp.ClientSession, url: str, engines: str) -> tuple[int, dict[str, str]]:
    """The status of /readyz, and the state of each dependency, once that of the engines is this one."""
    while True:
        async with session.get(url + "/readyz") as response:
            checks = (await response.json(content_type=None))["checks"]
        states = {name: entries[0]["status"] for name, entries in checks.items()}
        if states["engines"] == engines:
            return response.status, states
        await asyncio.sleep(0.1)


async def test_two_nodes_do_not_share_a_state(site: Site) -> None:
    """A second node on the same state is refused, since both would use the same receipt numbers."""
    config = load_config(site.config(), environment={})
    async with AsyncExitStack() as first, AsyncExitStack() as second:
        await build(config, PROVIDER, first)
        with pytest.raises(BadMessage, match="another node is running on this state"):
            await build(config, PROVIDER, second)


async def test_a_node_without_a_deployment_says_so(site: Site) -> None:
    """A missing deployment file is reported in one line, with what to do."""
    config = load_config(site.config(deployment=str(site.folder / "missing.json")), environment={})
    async with AsyncExitStack() as stack:
        with pytest.raises(BadMessage, match="tally deploy"):
            await build(config, PROVIDER, stack)


async def test_a_node_without_an_engine_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an engine in the config, in the environment or on the default ports, the node says what to do."""

    async def nothing(_environment: object) -> list[DiscoveredEngine]:
        return []

    monkeypatch.setattr(engine_pool, "discover", nothing)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    config = replace(load_config(site.config(), environment={}), engines=())
    async with AsyncExitStack() as stack:
        with pytest.raises(Unavailable, match="OPENAI_BASE_URL"):
            await build(config, PROVIDER, stack)
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.example/v1")
    async with AsyncExitStack() as stack:
        assert list((await build(config, PROVIDER, stack)).engine_pool.engines) == ["api.example"]


async def test_reload(site: Site) -> None:
    """On SIGHUP prices and limits change without an interruption: a running job ends, and a wrong config changes nothing."""
    async with node(site) as (process, connection, ask):
        site.engine._usual = Simulation(token_seconds=0.02)
        running = await site.place(connection, ask)
        await connection.until(Kind.CHUNK, 2, running.job)
        path = site.config()
        good = path.read_text()
        path.write_text(good.replace("[link]", 'output_price = "0.2"\n[link]'))
        count = len(connection.of(Kind.ASKS))
        process.send_signal(signal.SIGHUP)
        (changed,) = read_asks(json_of(await connection.until(Kind.ASKS, count + 1))["asks"])
        assert (changed.message.output_price, changed.message.seq > ask.message.seq) == (200_000, True)
        path.write_text("slots = ")
        process.send_signal(signal.SIGHUP)
        assert (await receipt(connection, running)).outcome == Outcome.COMPLETED
        again = await site.place(connection, changed.verify(DOMAIN))
        assert (await receipt(connection, again)).outcome == Outcome.COMPLETED
        path.write_text(good.replace(str(site.engine_port), "1"))
        process.send_signal(signal.SIGHUP)
        assert json_of(await connection.until(Kind.ASKS, count + 2))["asks"] == [], "the engine of the new config does not answer"


async def test_a_refused_config_shows_in_the_status(site: Site) -> None:
    """After SIGHUP the status says why a config is not applied and which settings wait for a restart, until it is right."""
    async with node(site) as (process, _, _):
        path = site.config()
        good = path.read_text()

        async def after(text: str) -> tuple[str, list[str]]:
            path.write_text(text)
            process.send_signal(signal.SIGHUP)
            former = report["config_problem"], report["settings_for_restart"]
            async with asyncio.timeout(60):
                while True:
                    report.update(await read_status(site.folder / "state"))
                    current = report["config_problem"], report["settings_for_restart"]
                    if current != former:
                        return current
                    await asyncio.sleep(0.05)

        report = dict(await read_status(site.folder / "state"))
        assert (report["config_problem"], report["settings_for_restart"]) == ("", [])
        problem, _ = await after(good.replace("[link]", "no_such_setting = 1\n[link]"))
        assert "no_such_setting" in problem
        assert await after(good) == ("", [])
        problem, settings = await after(re.sub(r"engine_check_interval = .*", "engine_check_interval = 7.5", good))
        assert (problem, settings) == ("", ["engine_check_interval"])
        assert await after(good) == ("", [])


async def test_several_coordinators_at_once(site: Site) -> None:
    """A node works for each coordinator with the same engine and tabs, and loses nothing when one goes away."""
    async with FakeCoordinator().serving() as second, node(site, coordinators=[second.url]) as (process, first, ask):
        other = await second.connections.get()
        assert [signed.signature for signed in await other.asks()] == [ask.signature]
        for number, connection in enumerate((first, other, first)):
            assert (await receipt(connection, await site.place(connection, ask))).seq == number + 1
        await other.socket.close()
        assert (await receipt(first, await site.place(first, ask))).seq == 4
        again = await second.connections.get()
        assert (await receipt(again, await site.place(again, ask))).seq == 5
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
async def test_a_full_disk(site: Site) -> None:
    """A node that cannot write sends its jobs elsewhere, uncharged, and continues as soon as there is space."""
    async with node(site) as (process, connection, ask):
        assert (await receipt(connection, await site.place(connection, ask))).seq == 1
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        for _ in range(2):
            placed = await site.place(connection, ask)
            error = Failure.split(await connection.until(Kind.FAIL, job=placed.job))[0]["error"]
            assert (error["retry"], error["fault"]) == (True, "provider")
            assert not connection.of(Kind.CHUNK, placed.job)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert (await receipt(connection, await site.place(connection, ask))).seq == 2


async def test_recovery_of_a_lost_state(site: Site) -> None:
    """A node with its key and an empty state recovers its last receipts from its coordinator before it offers anything, and uses
    no number or total twice.
    """
    async with node(site) as (process, connection, ask):
        placed = [await site.place(connection, ask) for _ in range(2)]
        lost = [await receipt(connection, placed_job) for placed_job in placed]
        process.kill()
        await process.wait()
    raw = connection.of(Kind.RECEIPT, placed[1].job)[0]
    last = LateReceipt(read_signed_bytes(Receipt, raw), placed[1].order, placed[1].terms)
    forged = replace(last, receipt=replace(last.receipt, message=replace(last.receipt.message, seq=99)))
    site.coordinator.remembered = [last, forged]
    shutil.rmtree(site.folder / "state")
    async with node(site) as (process, connection, ask):
        assert connection.hello.asks == ()
        following = await receipt(connection, await site.place(connection, ask))
        assert (following.seq, following.cumulative_cost) == (3, lost[1].cumulative_cost + following.cost)
        process.send_signal(signal.SIGTERM)
        claim = ClaimRequest.from_json(loads(await connection.until(Kind.CLAIM), "claim"))
        assert claim.claim.message.rows[0].cumulative_cost == following.cumulative_cost
        assert await process.wait() == 0
    site.coordinator.remembered = []
    async with node(site) as (process, connection, ask):
        assert connection.hello.asks, "it knows now, and need not ask again"


async def status_of(site: Site, *, without: str = "no trouble") -> dict[str, Any]:
    """Returns the node's status report once its problem does not mention `without`."""
    for _ in range(200):
        with contextlib.suppress(Unavailable):
            report = await read_status(site.folder / "state")
            if without not in report["trouble"]:
                return report
        await asyncio.sleep(0.05)
    raise AssertionError("no node works without that trouble")


def remembered(placed: PlacedJob, connection: Connection) -> LateReceipt:
    """Returns a coordinator's record of a job."""
    raw = connection.of(Kind.RECEIPT, placed.job)[0]
    return LateReceipt(read_signed_bytes(Receipt, raw), placed.order, placed.terms)


async def test_recovery_waits_for_all_coordinators(site: Site) -> None:
    """A node with a new state offers nothing until both coordinators have answered, and says why; then it continues from the
    highest number. A restart waits for neither.
    """
    second = FakeCoordinator(account=OTHER.address)
    async with second.serving():
        settings = {"coordinators": [second.url]}
        async with node(site, **settings) as (process, first, ask):
            other = await second.connections.get()
            assert await other.asks()
            done = await site.place(first, ask)
            await receipt(first, done)
            placed = site.client.order(ask, ASK, now=int(time.time()), coordinator=OTHER)
            await other.send(Kind.DISPATCH, placed.job, placed.dispatch.dumps())
            assert (await receipt(other, placed)).seq == 2
            process.kill()
            await process.wait()
        site.coordinator.remembered, second.remembered = [remembered(done, first)], [remembered(placed, other)]
        shutil.rmtree(site.folder / "state")
        second.recalls = False
        process = await site.start(**settings)
        try:
            first, other = await site.coordinator.connections.get(), await second.connections.get()
            await first.until(Kind.RECALL)
            report = await status_of(site, without=site.coordinator.url.removeprefix("http://"))
            assert not report["ok"]
            assert second.url.removeprefix("http://") in report["trouble"]
            assert "--skip-recovery" in report["trouble"]
            offered = [read_asks(json_of(payload)["asks"]) for payload in first.of(Kind.ASKS)]
            assert (first.hello.asks, other.hello.asks, [asks for asks in offered if asks]) == ((), (), [])
            await other.send(Kind.RECALLED, payload=second.page(""))
            following = await receipt(first, await site.place(first, (await first.asks())[0].verify(DOMAIN)))
            assert following.seq == 3
            assert (await status_of(site))["ok"]
        finally:
            process.kill()
            await process.communicate()
    async with node(site, **settings) as (process, first, ask):
        assert (await receipt(first, await site.place(first, ask))).seq == 4, "all have answered: an absent one blocks no work"


async def test_an_operator_may_skip_a_coordinator(site: Site) -> None:
    """A coordinator that will not come back can be skipped; it must be one of the node's coordinators."""
    away = f"http://127.0.0.1:{free_port(0)}"
    async with node(site, coordinators=[away], skip_recovery=[away]) as (_, connection, ask):
        assert (await receipt(connection, await site.place(connection, ask))).seq == 1
    with pytest.raises(BadMessage, match="skip_recovery"):
        load_config(site.config(skip_recovery=["http://127.0.0.1:9"]), environment={})


def json_of(payload: bytes) -> dict[str, Any]:
    """Returns a frame's JSON."""
    document: dict[str, Any] = loads(payload, "frame")
    return document
