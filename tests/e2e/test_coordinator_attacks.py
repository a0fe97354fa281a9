"""A coordinator under attack from other addresses states what it refuses, bounds its memory, and serves honest jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections import Counter
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from scripts.relay import load, processes
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.link import Capacity, Listing
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, Submission, dumps, loads, pack_link, unpack_link

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs more than one loopback address")

HONEST, BAD_ORDERS, SLOW, GARBAGE = 300, 3_000, 300, 200
GROWTH_MIB = 96


async def _forged(url: str, jobs: list[bytes]) -> Counter[tuple[int, str]]:
    """Posts orders with invalid signatures from one address. Returns the statuses."""
    answers: Counter[tuple[int, str]] = Counter()
    left = iter(jobs)

    async def post(session: aiohttp.ClientSession) -> None:
        for job in left:
            async with session.post(f"{url}/v1/jobs", data=job) as response:
                error = (await response.json())["error"]
                answers[response.status, error["code"]] += 1
                if response.status == 429:
                    assert response.headers["retry-after"] == "1"

    async with _session("127.0.0.2") as session:
        await asyncio.gather(*(post(session) for _ in range(16)))
    return answers


def _session(address: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, local_addr=(address, 0)))


async def _oversized(url: str) -> int:
    async with _session("127.0.0.3") as session, session.post(f"{url}/v1/jobs", data=bytes(33 << 20)) as response:
        return response.status


async def _garbage(port: int) -> None:
    """Sends bytes that are not HTTP; the connection must end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.4", 0))
    writer.write(secrets.token_bytes(4_000))
    await reader.read()
    writer.close()


async def _slow_head(port: int, over: asyncio.Event) -> None:
    """Sends a request head that never ends."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.5", 0))
    writer.write(b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\nx-slow: ")
    await over.wait()
    writer.close()


async def _rogue(site: processes.Site, targets: list[JobId]) -> str:
    """A node that sends chunks and receipts of other nodes' jobs, then floods its asks. Returns the reason of its closing."""
    node = await load.EnginelessNode.join(site.coordinator, Signer(os.urandom(32)), site.deployment.domain)
    for job in targets:
        for kind in (Kind.ACCEPT, Kind.CHUNK, Kind.FAIL, Kind.RECEIPT):
            await node.socket.send(pack_link(kind, job, b"not mine"))
    asks = pack_link(Kind.ASKS, payload=dumps(Listing.of_one_group((node.ask,), Capacity(1, 1)).to_json()))
    try:
        for _ in range(1_000):
            await node.socket.send(asks)
        while True:
            kind, _, payload = unpack_link(await node.socket.recv())
            if kind is Kind.ERROR:
                return str(loads(payload, "error")["error"]["code"])
    except ConnectionClosed:
        return "closed"


async def _huge_frame(site: processes.Site) -> int | None:
    """Returns the code with which a link is closed after an oversized frame."""
    async with connect(
        f"ws{site.coordinator.removeprefix('http')}/v1/node", max_size=None, local_addr=("127.0.0.6", 0)
    ) as socket:
        await socket.recv()
        with contextlib.suppress(ConnectionClosed):
            await socket.send(bytes(32 << 20))
            await socket.recv()
        return socket.close_code


def _with_a_bad_signature(job: bytes) -> bytes:
    made = Submission.loads(job)
    (candidate,) = made.candidates
    order = replace(candidate.order, signature=secrets.token_bytes(31) + candidate.order.signature[31:])
    return Submission(made.job, (replace(candidate, order=order, raw=None),), made.sealed).dumps()


async def test_honest_jobs_are_served_under_attack(tmp_path: Path) -> None:
    """Floods of forged orders, garbage, slow heads, oversized bodies and frames, and a malicious node do no harm."""
    async with processes.upstream() as mock, processes.market(tmp_path / "market", mock) as site:
        node = await load.EnginelessNode.join(site.coordinator, Signer(os.urandom(32)), site.deployment.domain)
        serving = asyncio.create_task(node.run())
        async with aiohttp.ClientSession() as session, session.get(f"{site.coordinator}/v1/info") as response:
            coordinator = (await response.json())["coordinator"]

        def sign(count: int) -> list[bytes]:
            domain = site.deployment.domain
            return load.sign_jobs(count, payer=site.payer, coordinator=coordinator, domain=domain, ask=node.ask)

        jobs = sign(HONEST + 100)
        await load.post(site.coordinator, jobs[:100], concurrency=8)
        forged = [_with_a_bad_signature(job) for job in sign(BAD_ORDERS // 10)] * 10
        before = processes.rss_mib(site.pids["coordinator"])
        port, over = int(site.coordinator.rpartition(":")[2]), asyncio.Event()
        slow = [asyncio.create_task(_slow_head(port, over)) for _ in range(SLOW)]
        async with asyncio.TaskGroup() as group:
            honest = group.create_task(load.post(site.coordinator, jobs[100:], concurrency=4))
            forging = group.create_task(_forged(site.coordinator, forged))
            oversized = group.create_task(_oversized(site.coordinator))
            rogue = group.create_task(_rogue(site, [Submission.loads(job).job for job in jobs[100:]]))
            huge = group.create_task(_huge_frame(site))
            for _ in range(GARBAGE):
                group.create_task(_garbage(port))
        over.set()
        await asyncio.gather(*slow)
        grown = processes.rss_mib(site.pids["coordinator"]) - before
        serving.cancel()
    refused = forging.result()
    assert len(honest.result().whole) == HONEST
    assert refused.keys() == {(401, "bad_signature"), (429, "rate_limited")}
    assert refused[401, "bad_signature"] < BAD_ORDERS / 2
    assert (oversized.result(), rogue.result(), huge.result()) == (413, "rate_limited", 1009)
    assert grown < GROWTH_MIB
