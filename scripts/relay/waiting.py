"""Jobs that wait: what thousands of them take of a coordinator's memory.

The slots of four nodes are taken by answers that last. The jobs that then come on a few client links, as the SDK's do, have a
small request and orders on all four nodes. Their payer's limits are raised to their number.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import orjson

from scripts.relay import mock, processes
from scripts.relay.processes import Site
from tallystick.client.orders.signing import OrderPolicy, sign_order, terms_for
from tallystick.client.orders.tab import Tab
from tallystick.protocol.criteria import DEFAULT_LIMIT
from tallystick.protocol.eip712 import Verified, read_signed
from tallystick.protocol.job_link import LINK_PATH, LINK_STREAM, MAX_COORDINATOR_MESSAGE, pack_greeting, pack_record, pack_submit
from tallystick.protocol.messages import Ask
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.routes import CHAT
from tallystick.protocol.sealing import ContentKey, KeySession
from tallystick.protocol.types import ZERO_HASH, Address, Amount, JobId
from tallystick.protocol.wire import Candidate, Kind, Submission

LINKS = 4
PROMPT = 200
"""Bytes of each prompt."""
_OUTPUT_TOKENS = 16
_HOUR = 3_600
_POLICY = OrderPolicy(Amount(0), 1_800, 600, 2 * _HOUR, 100)
_WAITING = "tallystick_jobs_waiting "
_LASTING = "100000 10"
"""What the mock engine is told of an answer that ends after the measurement."""


async def waiting_bytes(folder: Path, engine: str, jobs: int, seconds: float = 600) -> float:
    """Returns by how much the coordinator's resident memory grows for each job that waits, in bytes.

    `engine`: the base URL of the mock engine. Raises TimeoutError if the jobs do not all wait after `seconds`.
    """
    limits = dict.fromkeys(("max_jobs_per_payer", "max_jobs_per_address", "max_waiting_jobs"), 2 * jobs)
    limits |= {"max_waiting_jobs_per_model": 2 * jobs, "max_order_seconds": _HOUR, "job_timeout": _HOUR}
    market = processes.market(folder, engine, slots=1, core=processes.TESTED, coordinator=limits)
    async with market as site, aiohttp.ClientSession() as session:
        names = [f"node{number}" for number in range(1, DEFAULT_LIMIT)]
        await asyncio.gather(*(processes.add_node(site, name, engine, slots=1) for name in names))
        async with asyncio.timeout(seconds), _slots_taken(site, session), _links(site, session) as links:
            bodies = await _submissions(site, session, jobs)
            before = processes.rss_mib(site.pids["coordinator"])
            for number, body in enumerate(bodies):
                record = pack_record(1 + number // LINKS, Kind.SUBMIT, pack_submit(body, None))
                await links[number % LINKS].send_bytes(record)
            await _until_waiting(site, session, jobs)
            return (processes.rss_mib(site.pids["coordinator"]) - before) * 2**20 / jobs


async def count_waiting(coordinator: str, session: aiohttp.ClientSession) -> int:
    """Returns the number of jobs that wait at a coordinator."""
    async with session.get(f"{coordinator}/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(int(float(line.split()[1])) for line in lines if line.startswith(_WAITING))


async def _until_waiting(site: Site, session: aiohttp.ClientSession, jobs: int) -> None:
    while await count_waiting(site.coordinator, session) < jobs:  # noqa: ASYNC110 - another process has the event
        await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def _slots_taken(site: Site, session: aiohttp.ClientSession) -> AsyncIterator[None]:
    """Has an answer under way in each node's slot."""
    body = {"model": mock.MODEL, "messages": [{"role": "user", "content": "-"}], "stream": True, "user": _LASTING}
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(DEFAULT_LIMIT):
            response = await stack.enter_async_context(session.post(f"{site.gateway}/v1/chat/completions", json=body))
            await response.content.readany()
        yield


@contextlib.asynccontextmanager
async def _links(site: Site, session: aiohttp.ClientSession) -> AsyncIterator[list[aiohttp.ClientWebSocketResponse]]:
    """Opens client links that read and drop all that comes."""
    async with contextlib.AsyncExitStack() as stack:
        links = list[aiohttp.ClientWebSocketResponse]()
        readers = list[asyncio.Task[None]]()
        for _ in range(LINKS):
            opened = session.ws_connect(f"{site.coordinator}{LINK_PATH}", max_msg_size=MAX_COORDINATOR_MESSAGE)
            links.append(await stack.enter_async_context(opened))
            await links[-1].send_bytes(pack_record(LINK_STREAM, Kind.HELLO, pack_greeting("bench")))
            readers.append(asyncio.create_task(_drop_all(links[-1])))
        try:
            yield links
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)


async def _drop_all(link: aiohttp.ClientWebSocketResponse) -> None:
    async for _ in link:
        pass


async def _submissions(site: Site, session: aiohttp.ClientSession, jobs: int) -> list[bytes]:
    async with session.get(f"{site.coordinator}/v1/info") as response:
        coordinator = Address((await response.json())["coordinator"])
    async with session.get(f"{site.coordinator}/v1/asks", params={"model": mock.MODEL}) as response:
        listed = (await response.json())["asks"]
    asks = [read_signed(Ask, entry["ask"]).verify(site.deployment.domain) for entry in listed]
    keys = [KeySession(ask.message.sealing_suite, ask.message.sealing_key) for ask in asks]
    return [_submission(site, coordinator, asks, keys) for _ in range(jobs)]


def _submission(site: Site, coordinator: Address, asks: Sequence[Verified[Ask]], keys: Sequence[KeySession]) -> bytes:
    job, key, now, candidates = JobId(os.urandom(16)), ContentKey.new(), time.time_ns(), list[Candidate]()
    request = {"model": mock.MODEL, "messages": [{"role": "user", "content": "x" * PROMPT}], "max_tokens": _OUTPUT_TOKENS}
    plaintext = CHAT.encode() + b"\n" + orjson.dumps(request)
    for ask, session in zip(asks, keys, strict=True):
        terms = terms_for(ask, job=job, commitment=ZERO_HASH, output_tokens=_OUTPUT_TOKENS, body_bytes=len(plaintext))
        provider = ask.message.provider
        order = sign_order(
            Tab(),
            terms,
            signer=site.payer,
            provider=provider,
            coordinator=coordinator,
            domain=site.deployment.domain,
            policy=_POLICY,
            now_ns=now,
        ).order
        wrapped = session.wrap(key, job=job, order_hash=order.digest, provider=provider)
        candidates.append(Candidate(order, terms, wrapped))
    sealed = key.seal_request(job, plaintext)
    return Submission(job, tuple(candidates), sealed, hints=RankingHints(likely_tokens=PROMPT // 4), wait=600).dumps()
