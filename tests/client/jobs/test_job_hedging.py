"""A job that runs at two providers: what the client accepts, what it counts, and what it shows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tallystick.client.ledger.schema import OrderState
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address
from tallystick.protocol.wire import Kind
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session, completion, eventually, run
from tests.client.parties import MODEL, Provider

LATE = 0.25


async def _ends(session: Session, text: str) -> None:
    await session.answer()
    await session.chunk(completion(text), last=True)
    await session.finish()


async def _states(market: Market, session: Session) -> dict[Address, OrderState]:
    known = await market.find(session.job)
    assert known is not None
    return {order.order.message.provider: order.state for order in known.orders}


async def test_the_option_is_sent_to_the_coordinator(market: Market, fake: FakeMarket) -> None:
    """The submission has milliseconds; 0 is never, and so is the default."""
    for option, sent in ((LATE, 250), (0, None), (None, None), (0.0001, 1), (600, 600_000)):
        async with await market.submit(CHAT, BODY, hedge_after=option) as job:
            await job.result()
        assert fake.sessions[job.id].submission.hedge_after_ms == sent
    for wrong in (-1, 601, float("nan"), float("inf"), True, "2"):
        with pytest.raises(BadMessage, match="hedge_after: expected a number of seconds from 0 to 600"):
            await market.submit(CHAT, BODY, hedge_after=wrong)  # type: ignore[arg-type]


async def test_the_second_provider_wins(market: Market, fake: FakeMarket) -> None:
    """The answer and the receipt are the second provider's; the receipt at no cost of the first one releases its cap."""

    async def hedged(session: Session) -> None:
        await session.match(0)
        await session.hedge(1)
        await session.send(Kind.MATCH, session.matched)
        await session.answer()
        session.swap()
        await session.void()
        session.swap()
        await session.chunk(completion("from bob"), last=True)
        await session.finish()

    fake.script = hedged
    result = await market.chat(MODEL, BODY["messages"], tally={"hedge_after": LATE})
    alice, bob = fake.providers
    assert (result.text, result.provider) == ("from bob", bob.address)
    states = await _states(market, fake.sessions[result.job])
    assert (states[alice.address], states[bob.address]) == (OrderState.RELEASED, OrderState.RECORDED)
    assert (await market.tab(alice.address)).open_caps == 0
    assert (await market.tab(alice.address)).accepted == 0
    (spent,) = await market._ledger.spending(0, ())
    assert (spent.requests, spent.hedged, spent.cost, spent.hedge_cost) == (1, 1, 3, 0)


@pytest.mark.parametrize(("price", "extra"), [(4_000_000, 18), (40_000, -1)], ids=["dearer", "cheaper"])
async def test_what_hedging_cost(market: Market, fake: FakeMarket, price: int, extra: int) -> None:
    """The winner's receipt less what the first provider would have charged for it; sums over jobs, none for other jobs."""
    fake.providers = [Provider.make("alice"), Provider.make("bob", output_price=price)]

    async def hedged(session: Session) -> None:
        await session.match(0)
        await session.hedge(1)
        await session.send(Kind.MATCH, session.matched)
        await _ends(session, "from bob")

    await run(market)
    fake.script = hedged
    for _ in range(2):
        result = await market.chat(MODEL, BODY["messages"], tally={"hedge_after": LATE})
        assert result.provider == fake.providers[1].address
        assert result.cost == 3 + extra
    (spent,) = await market._ledger.spending(0, ())
    assert (spent.requests, spent.hedged, spent.hedge_cost) == (3, 2, 2 * extra)
    (alice,) = [row for row in await market._ledger.spending(0, ("provider",)) if row.group == (fake.providers[0].address,)]
    assert (alice.requests, alice.hedged, alice.hedge_cost) == (1, 0, 0)


async def test_the_first_provider_wins(market: Market, fake: FakeMarket) -> None:
    """Without another match the answer is the first provider's. The receipt at no cost of the second one is fetched later."""

    async def hedged(session: Session) -> None:
        await session.match(0)
        await session.hedge(1)
        session.swap()
        await _ends(session, "from alice")
        session.survives = True
        session.swap()
        receipt, state = session.receipt, session.state
        session.release()
        session.receipt, session.state = receipt, state

    fake.script = hedged
    result = await market.chat(MODEL, BODY["messages"], tally={"hedge_after": LATE})
    alice, bob = fake.providers
    assert (result.text, result.provider) == ("from alice", alice.address)

    async def released() -> bool:
        return (await _states(market, fake.sessions[result.job]))[bob.address] is OrderState.RELEASED

    await eventually(released)
    assert (await market.tab(bob.address)).open_caps == 0


async def test_the_first_provider_fails(market: Market, fake: FakeMarket) -> None:
    """If the first of two fails, the second is matched without another attempt."""

    async def hedged(session: Session) -> None:
        await session.match(0)
        await session.hedge(1)
        session.swap()
        await session.void(Outcome.PROVIDER_ERROR)
        session.swap()
        await session.send(Kind.MATCH, session.matched)
        await _ends(session, "from bob")

    fake.script = hedged
    result = await market.chat(MODEL, BODY["messages"], tally={"hedge_after": LATE})
    assert (result.text, result.provider) == ("from bob", fake.providers[1].address)


async def test_the_second_provider_fails(market: Market, fake: FakeMarket) -> None:
    """The receipt at no cost of the second attempt leaves the first one the current one."""

    async def hedged(session: Session) -> None:
        await session.match(0)
        await session.hedge(1)
        await session.void()
        session.swap()
        await _ends(session, "from alice")

    fake.script = hedged
    result = await market.chat(MODEL, BODY["messages"], tally={"hedge_after": LATE})
    assert (result.text, result.provider) == ("from alice", fake.providers[0].address)


async def _beside_nothing(session: Session) -> None:
    await session.match(0, kind=Kind.HEDGE)


async def _twice(session: Session) -> None:
    await session.match(0)
    await session.hedge(1)
    await session.send(Kind.HEDGE, session.matched)


async def _the_same_order(session: Session) -> None:
    await session.match(0)
    await session.send(Kind.HEDGE, session.matched)


async def _after_output(session: Session) -> None:
    await session.match(0)
    await session.answer()
    await session.hedge(1)


async def _changes_after_output(session: Session) -> None:
    await session.match(0)
    await session.hedge(1)
    session.swap()
    await session.answer()
    session.swap()
    await session.send(Kind.MATCH, session.matched)


async def _matched_twice(session: Session) -> None:
    await session.match(0)
    await session.hedge(1)
    await session.send(Kind.MATCH, session.matched)
    await session.send(Kind.MATCH, session.matched)


async def _back_again(session: Session) -> None:
    await session.match(0)
    first = session.matched
    await session.hedge(1)
    await session.send(Kind.MATCH, session.matched)
    await session.send(Kind.MATCH, first)


async def _chunks_of_the_other(session: Session) -> None:
    await session.match(0)
    await session.hedge(1)
    await session.answer()


async def _after_its_void(session: Session) -> None:
    await session.match(0)
    await session.hedge(1)
    await session.void()
    await session.send(Kind.MATCH, session.matched)


async def _void_of_a_stranger(session: Session) -> None:
    await session.match(0)
    session.take(1)
    await session.send(Kind.VOID, session.release().to_bytes())


@pytest.mark.parametrize(
    "script",
    [
        _beside_nothing,
        _twice,
        _the_same_order,
        _after_output,
        _changes_after_output,
        _matched_twice,
        _back_again,
        _chunks_of_the_other,
        _after_its_void,
        _void_of_a_stranger,
    ],
)
async def test_frames_out_of_order(market: Market, fake: FakeMarket, script: Callable[[Session], Awaitable[None]]) -> None:
    """A coordinator that mixes up the two attempts is at fault, and the job ends."""

    async def wrong(session: Session) -> None:
        await script(session)
        await _ends(session, "whatever")

    fake.script = wrong
    with pytest.raises(TallyError) as caught:
        await market.chat(MODEL, BODY["messages"], tally={"hedge_after": LATE})
    assert caught.value.fault.value == "coordinator"


async def test_a_second_attempt_that_nobody_asked_for(market: Market, fake: FakeMarket) -> None:
    """A coordinator that hedges a job on its own is refused: both orders would count against the client's budgets."""

    async def hedged(session: Session) -> None:
        await session.match(0)
        await session.hedge(1)

    fake.script = hedged
    with pytest.raises(BadMessage, match="of a job that allows it"):
        await run(market)
