"""While its job waits, a client orders on further asks that its coordinator names, within what the request accepts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tallystick.client.config import Budget, ClientConfig
from tallystick.client.ledger.queries import KnownJob
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.queue_place import MAX_INVITATIONS, QueuePlace
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import Kind
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session, honest
from tests.client.parties import MODEL, Provider

ALICE = Provider.make("alice")


def _only(fake: FakeMarket, provider: Provider) -> None:
    """The shortlist has one provider; the others connect later."""
    fake.asks = lambda: [{"ask": provider.ask.to_json(), "free": 0}]


def _place(*providers: Provider) -> bytes:
    return QueuePlace(1, None, tuple(provider.ask.to_json() for provider in providers)).dumps()


async def _known(market: Market, session: Session) -> KnownJob:
    known = await market.find(session.job)
    assert known is not None
    return known


async def test_a_new_provider_is_used(fake: FakeMarket, market: Market) -> None:
    """The client orders on a provider that connected while its job waits; the answer and the receipt are that provider's."""
    first, second = fake.providers[:2]
    _only(fake, first)

    async def script(session: Session) -> None:
        await session.send(Kind.BEAT, _place(second))
        await session.further_posted.wait()
        await session.send(Kind.BEAT, _place(second))  # told again, it orders once
        await session.match(1)
        await session.answer()
        await session.chunk(b"{}", last=True)
        await session.finish()

    fake.script = script
    async with await market.submit(CHAT, BODY) as job:
        result = await job.result()
    assert (result.provider, len(job.candidates)) == (second.address, 2)
    known = await _known(market, fake.last)
    assert sorted((order.order.message.provider, order.state.value) for order in known.orders) == sorted(
        [(first.address, "closed"), (second.address, "recorded")]
    )
    assert len(fake.last.submission.candidates) == 2


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"output_price": 900_000}, {}),
        ({"model": "another"}, {}),
        ({"max_output_tokens": 1}, {}),
        ({}, {"pin": [ALICE.address]}),
        ({}, {"exclude": [Provider.make("new").address]}),
        ({}, {"min_reputation": 1}),
        ({"forged": True}, {}),
        ({"valid_until": 1}, {}),
    ],
)
async def test_asks_that_the_request_does_not_accept(
    fake: FakeMarket, market: Market, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    """No order: on a dearer ask, one of another model, too small, excluded or not pinned, expired or forged."""
    changes = dict(changes)
    forged = changes.pop("forged", False)
    first, new = fake.providers[0], Provider.make("new", **({"output_price": 300_000} | changes))
    if forged:
        new.ask = replace(new.ask, signature=bytes(65))
    fake.providers += (new,)
    _only(fake, first)

    async def script(session: Session) -> None:
        await session.send(Kind.BEAT, _place(new))
        await honest(session)

    fake.script = script
    async with await market.submit(CHAT, BODY, **options) as job:
        result = await job.result()
    assert (result.provider, len(job.candidates)) == (first.address, 1)
    assert not fake.last.further_posted.is_set()


async def test_a_refusal_leaves_the_job_as_it_was(fake: FakeMarket, market: Market) -> None:
    """A coordinator that does not take the order, or does not know the route, costs the job nothing; the order ends with it."""
    first, second = fake.providers[:2]
    for refusal in (
        Refusal(Code.UNKNOWN_ROUTE, "no such route", fault=Fault.CLIENT),
        Unavailable(Code.COORDINATOR_UNAVAILABLE, "down", fault=Fault.COORDINATOR),
    ):
        _only(fake, first)
        fake.refuses_further = refusal

        async def script(session: Session) -> None:
            await session.send(Kind.BEAT, _place(second))
            await session.further_posted.wait()
            await honest(session)

        fake.script = script
        async with await market.submit(CHAT, BODY) as job:
            assert (await job.result()).provider == first.address
        states = {order.order.message.provider: order.state.value for order in (await _known(market, fake.last)).orders}
        assert states == {first.address: "recorded", second.address: "closed"}


async def test_a_budget_bounds_further_orders(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """What a further order may cost must fit the budget beside the orders that are open."""
    first, second = fake.providers[:2]
    _only(fake, first)

    async def script(session: Session) -> None:
        await session.send(Kind.BEAT, _place(second))
        await honest(session)

    fake.script = script
    async with Market(fake.url, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        await job.result()
        cap = job.candidates[0].terms.max_cost
        assert len(job.candidates) == 2
    limited = replace(config, budgets=(Budget(per_day=Amount(2 * cap - 1)),))
    async with Market(fake.url, wallet, limited) as market, await market.submit(CHAT, BODY) as job:
        await job.result()
        assert len(job.candidates) == 1


async def test_a_coordinator_gains_few_orders(fake: FakeMarket, market: Market) -> None:
    """However many asks a coordinator names, and however often, a job has a bounded number of orders; rubbish is left out."""
    first = fake.providers[0]
    many = [Provider.make(f"new {number}") for number in range(3 * MAX_INVITATIONS)]
    fake.providers += tuple(many)
    _only(fake, first)

    async def script(session: Session) -> None:
        await session.send(Kind.BEAT, QueuePlace(1, None, ("rubbish", {"message": {}}, None)).dumps())
        for start in range(0, len(many), 4):
            await session.send(Kind.BEAT, _place(*many[start : start + 4]))
        await honest(session)

    fake.script = script
    async with await market.submit(CHAT, BODY) as job:
        assert (await job.result()).provider == first.address
    assert len(job.candidates) == 1 + MAX_INVITATIONS
    assert job.candidates[0].terms.model == MODEL
