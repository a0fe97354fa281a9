"""What a job that waits on a client's link takes in memory, counted in bytes."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import pytest

from coordinator.domain.limits import IntakeLimits, JobLimits
from coordinator.http.client_hub import ClientHub
from coordinator.http.job_service import JobService
from coordinator.ports import Backing
from coordinator.storage.memory import MemoryFunds
from tallystick.protocol.job_link import LINK_STREAM, pack_greeting, pack_record, pack_submit
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import Kind
from tallystick.runtime.lean_event import LeanEvent
from tests.coordinator.harness import CAP, PAYER, FakeNode, World, quiet

JOBS = 400
LINKS = 4
SEALED = 700
"""Bytes of a small request, sealed: a prompt of 200 bytes, and the options of its call."""
MOST = 12_000
"""Bytes a job, half as many again as were measured: the resident memory then grew by 90 MiB for 10,000 jobs."""


class Socket:
    """A connection whose client reads at once."""

    def send_parts(self, parts: Sequence[bytes]) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def _message(world: World, stream: int, nodes: Sequence[FakeNode]) -> bytes:
    made = world.submission(*nodes)
    candidates = tuple(replace(candidate, wrapped_key=os.urandom(80)) for candidate in made.candidates)
    posted = replace(made, candidates=candidates, sealed=os.urandom(SEALED), hints=RankingHints(likely_tokens=64))
    return pack_record(stream, Kind.SUBMIT, pack_submit(posted.dumps(), None))


class SlowFunds(MemoryFunds):
    """A chain that answers when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = LeanEvent()
        self.answers.set()

    async def backing(self, payer: Address, provider: Address, *, fresh: bool = False) -> Backing:
        await self.answers.wait()
        return await super().backing(payer, provider, fresh=fresh)


@pytest.mark.parametrize("answers", [True, False])
async def test_a_waiting_job_of_a_link_is_small(answers: bool) -> None:
    """From the bytes that its client sent to its place in the queue, with everything that waits for it: for a slot, or for the
    chain to tell what its payer has.
    """
    funds = SlowFunds()
    world = World(limits=JobLimits(jobs_per_payer=2 * JOBS), funds=funds)
    world.funds.free[PAYER.address] = Amount(10 * JOBS * CAP)
    nodes = [world.node(name, slots=1) for name in ("ann", "bob", "carl", "dora")]
    for _ in nodes:
        await world.started(*nodes)
    hub = ClientHub(JobService(world.market, intake=IntakeLimits(jobs_per_address=2 * JOBS)))
    links = [hub._link(f"10.0.0.{number}", lambda _limit: None) for number in range(LINKS)]
    for link in links:
        link.attach(Socket())
        link.message_received(pack_record(LINK_STREAM, Kind.HELLO, pack_greeting("test")))
    messages = [_message(world, 1 + number // LINKS, nodes) for number in range(JOBS)]
    if not answers:
        funds.answers.clear()
    gc.collect()
    tracemalloc.start()
    try:
        for number, message in enumerate(messages):
            links[number % LINKS].message_received(message)
        await quiet()
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert world.market.waiting == (JOBS if answers else 0)
    funds.answers.set()
    await quiet()
    assert world.market.waiting == JOBS
    assert size / JOBS < MOST, f"{size / JOBS:.0f} bytes a job"
    for link in links:
        link.lost()
    await hub.close()
    assert world.market.waiting == 0
