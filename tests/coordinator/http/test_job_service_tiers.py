"""What an access tier allows a payer is used up by its own jobs alone, not by its old orders that others post again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.protocol.tiers import Tier
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import Kind, Submission
from tests.coordinator.harness import PAYER, World, make_submission, person
from tests.coordinator.live_server import Served, served, until

TIER = Tier(name="new", jobs_per_minute=1, jobs_in_flight=1)


async def place(at: Served, submission: Submission) -> None:
    """Posts a job, which runs to its end at a provider."""
    node = at.world.node("ann")
    async with at.http.stream("POST", "/v1/jobs", content=submission.dumps()) as response:
        assert response.status_code == 200
        await until(lambda: node.got(Kind.DISPATCH, submission.job))
        node.accept(submission.job)
        node.chunk(submission.job)
        node.complete(submission.job)
        await until(lambda: not at.world.market.live_jobs)


@pytest.mark.parametrize("kind", ["replayed", "expired", "misdirected", "unfunded", "forged", "forged later"])
async def test_orders_that_place_no_job(kind: str) -> None:
    """Each is refused for what it is, and the payer's next job is placed."""
    world = World()
    async with served(world, tiers=(TIER,)) as at:
        await world.market.start()
        node = world.node("ann")
        world.funds.free[PAYER.address] = Amount(10**9)
        submission = make_submission(node.asks[0])
        if kind == "replayed":
            await place(at, submission)
            world.clock.seconds += 60
        elif kind == "expired":
            world.clock.seconds += 7 * 86_400
        elif kind == "misdirected":
            submission = make_submission(node.asks[0], coordinator=person("another coordinator").address)
        elif kind == "unfunded":
            world.funds.free[PAYER.address] = Amount(0)
        else:
            asks = (node.asks[0], world.node("bob").asks[0])
            submission = make_submission(*asks)
            place_of = 0 if kind == "forged" else 1
            order = submission.candidates[place_of].order
            flipped = bytes((*order.signature[:9], order.signature[9] ^ 1, *order.signature[10:]))
            forged = replace(submission.candidates[place_of], order=replace(order, signature=flipped))
            candidates = [*submission.candidates]
            candidates[place_of] = forged
            submission = replace(submission, candidates=tuple(candidates), ranked=True)
            if kind == "forged later":
                submission = replace(submission, candidates=tuple(reversed(candidates)))
        codes = [(await at.post(replace(submission, sealed=b"other bytes"))).json()["error"]["code"] for _ in range(3)]
        expected = {"replayed": "order_replayed", "expired": "order_expired", "misdirected": "order_misdirected"}
        assert set(codes) == {expected.get(kind, "insufficient_funds" if kind == "unfunded" else "bad_signature")}
        world.funds.free[PAYER.address] = Amount(10**9)
        now = int(world.clock.now())
        await place(at, make_submission(node.asks[0], now=now, terms={"max_output_tokens": 9}))


async def test_a_job_of_another_replica() -> None:
    """An order that another replica placed is refused before it counts against its payer."""
    world = World()
    async with served(world, tiers=(TIER,)) as at:
        await world.market.start()
        node = world.node("ann")
        world.funds.free[PAYER.address] = Amount(10**9)
        submission = make_submission(node.asks[0])

        class Shared:
            async def is_placed(self, job: object) -> bool:
                return job == submission.job

        world.market.admission.shared = Shared()  # type: ignore[assignment]  # a part of the port
        for _ in range(3):
            assert (await at.post(submission)).json()["error"]["code"] == "order_replayed"
        await place(at, make_submission(node.asks[0], terms={"max_output_tokens": 9}))
