"""Request bodies: shares of addresses, the minimum rate, and which body is evicted when the total is used up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits
from coordinator.http.request_bodies import RequestBodies
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tests.virtual_time import on_virtual_time

LIMIT = 1_000


class Sender:
    """One client that sends what the test says."""

    def __init__(self, bodies: RequestBodies, address: str) -> None:
        self.reservation = bodies.begin(address)
        self._parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.task = asyncio.create_task(bodies.read(self._parts.get, self.reservation, LIMIT, "a job"))

    async def send(self, size: int, *, more: bool = True) -> None:
        self._parts.put_nowait({"type": "http.request", "body": bytes(size), "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)

    async def error(self) -> TallyError:
        with pytest.raises(TallyError) as caught:
            await self.task
        return caught.value


async def test_one_address_does_not_hold_the_whole_intake() -> None:
    """Unfinished bodies of one address, or one /64, take its share alone; another address is served meanwhile."""
    bodies = RequestBodies(IntakeLimits(total_body_bytes=10_000, address_bytes=2_000))
    flood = [Sender(bodies, f"2001:db8::{n}") for n in range(1, 5)]
    for sender in flood:
        await sender.send(600)
    error = await flood[3].error()
    assert (error.code, error.fault) == (Code.RATE_LIMITED, Fault.CLIENT)
    assert bodies.held == 4 * 600
    bodies.close(flood[3].reservation)
    honest = Sender(bodies, "2001:db8:0:1::1")
    await honest.send(900, more=False)
    assert len(await honest.task) == 900
    for sender in flood:
        sender.task.cancel()


async def test_a_large_address_makes_room_for_a_small_one() -> None:
    """When the total is used up, the address that holds most loses its largest unfinished body, not the newcomer."""
    bodies = RequestBodies(IntakeLimits(total_body_bytes=3_000, address_bytes=2_000))
    flood = [Sender(bodies, f"10.0.0.{n}") for n in range(3)]
    for sender, size in zip(flood, (1_000, 990, 1_000), strict=True):
        await sender.send(size)
    honest = Sender(bodies, "10.0.1.1")
    await honest.send(100, more=False)
    assert len(await honest.task) == 100
    evicted = [sender for sender in flood if sender.reservation.evicted]
    assert len(evicted) == 1
    assert (await evicted[0].error()).code is Code.RATE_LIMITED
    assert bodies.held <= 3_000
    greedy = Sender(bodies, "10.0.1.2")
    await greedy.send(1_000)
    assert (await greedy.error()).fault is Fault.COORDINATOR
    bodies.close(greedy.reservation)
    assert bodies.held <= 3_000
    for sender in (*flood, honest):
        sender.task.cancel()
        bodies.close(sender.reservation)
    assert (bodies.held, bodies.open) == (0, 0)


async def test_complete_bodies_are_not_evicted() -> None:
    """A running job keeps its body; a newcomer gets rate_limited."""
    bodies = RequestBodies(IntakeLimits(total_body_bytes=1_500))
    running = Sender(bodies, "10.0.0.1")
    await running.send(1_000, more=False)
    await running.task
    refused = Sender(bodies, "10.0.0.2")
    await refused.send(600)
    error = await refused.error()
    assert (error.code, error.fault, error.retry) == (Code.RATE_LIMITED, Fault.COORDINATOR, True)


@on_virtual_time
async def test_a_slow_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the grace period a body must arrive at the minimum rate; an occasional byte is not enough."""
    monkeypatch.setattr(resource_bounds, "BODY_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(resource_bounds, "BODY_RATE", 1_000)
    bodies = RequestBodies(IntakeLimits())
    drip, steady = Sender(bodies, "10.0.0.1"), Sender(bodies, "10.0.0.2")
    began = asyncio.get_running_loop().time()
    while not drip.task.done():
        await drip.send(1)
        await steady.send(40)
        await asyncio.sleep(0.02)
    assert asyncio.get_running_loop().time() - began < 0.5
    error = await drip.error()
    assert isinstance(error, BadMessage)
    assert "must arrive within" in str(error)
    await steady.send(1, more=False)
    assert len(await steady.task) > 100


async def test_too_long_a_body_and_too_many_requests() -> None:
    """A body or a number of requests beyond the limit is refused with the reason; closing one makes room."""
    bodies = RequestBodies(IntakeLimits(jobs_per_address=2))
    long = Sender(bodies, "10.0.0.1")
    await long.send(LIMIT + 1)
    error = await long.error()
    assert isinstance(error, Refusal)
    assert error.code is Code.BODY_TOO_LARGE
    bodies.begin("::ffff:10.0.0.1")
    with pytest.raises(Unavailable, match=r"2 jobs here.*\(max_jobs_per_address\)"):
        bodies.begin("10.0.0.1")
    bodies.close(long.reservation)
    bodies.begin("10.0.0.1")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 400), st.booleans()), max_size=40))
def test_the_sum_is_always_right_and_within_its_limits(steps: list[tuple[int, int, bool]]) -> None:
    """After any sequence of steps, the held bytes are the sum of the open reservations, within the limits."""

    async def play() -> None:
        bodies = RequestBodies(IntakeLimits(total_body_bytes=1_500, address_bytes=700, jobs_per_address=10))
        senders: list[Sender] = []
        for address, size, more in steps:
            if sum(sender.reservation.address == f"10.0.0.{address}" for sender in senders) < 10:
                senders.append(Sender(bodies, f"10.0.0.{address}"))
                await senders[-1].send(size, more=more)
            for sender in [other for other in senders if other.task.done() and other.task.exception()]:
                bodies.close(sender.reservation)
                senders.remove(sender)
            assert bodies.held == sum(sender.reservation.bytes for sender in senders) <= 1_500
            assert bodies.open == len(senders)
        for sender in senders:
            sender.task.cancel()
            bodies.close(sender.reservation)
        assert (bodies.held, bodies.open) == (0, 0)

    asyncio.run(play())
