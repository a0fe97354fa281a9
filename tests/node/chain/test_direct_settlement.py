"""The node's tabs, its view of the chain and its own settlement against the real contract."""

from __future__ import annotations

import pytest

from node.chain.direct_settlement import DirectSettlement
from node.chain.escrow_view import EscrowView
from node.domain.tabs import CreditLimits, Funds, Tabs
from tallystick.chain.events import RowSkipped, Settled
from tallystick.chain.rpc import Sender
from tallystick.protocol.eip712 import Signed, Signer
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Claim, ClaimRow, Order
from tallystick.protocol.types import Amount
from tests.chain.harness import DOLLAR, RULES, World, person

KEY, OWNER, PROVIDER, SYBIL = (person(f"on chain {name}") for name in ("key", "owner", "provider", "sybil"))


async def reserved(world: World, amount: int = 10 * DOLLAR) -> Sender:
    """Makes a purse that is fully reserved for the provider; returns its owner's sender."""
    sender = await world.purse(KEY, OWNER, amount)
    await world.escrow.reserve(sender, KEY.address, PROVIDER.address, Amount(amount))
    return sender


async def seen(world: World) -> Funds:
    """Returns the funds that a node sees now."""
    return await EscrowView(world.escrow, PROVIDER.address).funds(KEY.address)


async def admits(world: World, funds: Funds, cap: int) -> Code | None:
    """Returns the error code with which a job is refused on these funds; None if it is admitted."""
    order = world.order(KEY, PROVIDER.address, cap).message
    try:
        Tabs(CreditLimits()).admit(order, Amount(cap), funds, await world.rpc.now())
    except Refusal as refusal:
        return refusal.code
    return None


async def test_a_releasing_reservation_is_no_security(world: World) -> None:
    """A reservation secures a job until its release begins; from then on neither it nor the released funds are security."""
    sender = await reserved(world)
    assert await admits(world, await seen(world), 10 * DOLLAR) is None
    await world.escrow.release(sender, KEY.address, PROVIDER.address)
    for wait in (0, RULES.release + 1):
        if wait:
            await world.advance(wait)
        funds = await seen(world)
        assert (funds.reserved, funds.releasing, funds.payable) == (0, 10 * DOLLAR, 10 * DOLLAR)
        assert await admits(world, funds, 1) is Code.INSUFFICIENT_FUNDS
    await world.escrow.finish_release(sender, KEY.address, PROVIDER.address)
    assert await admits(world, await seen(world), 250_001) is Code.UNSECURED
    assert await admits(world, await seen(world), 250_000) is None
    await world.escrow.thaw(sender, KEY.address, Amount(10 * DOLLAR))
    assert await admits(world, await seen(world), 250_000) is Code.INSUFFICIENT_FUNDS


async def test_a_reservation_that_is_renewed_counts_again(world: World) -> None:
    """Reserving more cancels a release."""
    sender = await reserved(world)
    await world.escrow.release(sender, KEY.address, PROVIDER.address)
    await world.top_up(KEY, OWNER, DOLLAR)
    await world.escrow.reserve(sender, KEY.address, PROVIDER.address, Amount(DOLLAR))
    assert (await seen(world)).reserved == 11 * DOLLAR


async def test_a_rate_is_what_the_coordinator_registered(world: World) -> None:
    """The rate is 0 at first, then the registered one."""
    coordinator = await world.sender(SYBIL)
    assert await EscrowView(world.escrow, PROVIDER.address).rate(SYBIL.address) == 0
    await world.escrow.set_fee(coordinator, 125)
    assert await EscrowView(world.escrow, PROVIDER.address).rate(SYBIL.address) == 125


def claim(world: World, provider: Signer, order: Signed[Order], total: int) -> Signed[Claim]:
    """Returns a provider's claim on one order."""
    row = ClaimRow(payer=order.message.payer, order_hash=order.message.digest(world.domain), seq=1, cumulative_cost=Amount(total))
    return provider.sign(Claim(provider=provider.address, rows=(row,)), world.domain)


async def test_direct_settlement_of_a_claim(world: World) -> None:
    """The node collects during a release, pays the gas and records it; without coins it refuses and sends nothing."""
    noted: list[tuple[str, int, int, int]] = []

    async def note(tx: str, at: int, gas_used: int, fee: int) -> None:
        noted.append((tx, at, gas_used, fee))

    owner = await reserved(world)
    await world.escrow.release(owner, KEY.address, PROVIDER.address)
    order = world.order(KEY, PROVIDER.address, DOLLAR)
    settlement = DirectSettlement(world.escrow, Sender(world.rpc, PROVIDER, poll=0.001), note, now=lambda: 7.0)
    signed = claim(world, PROVIDER, order, 400_000)
    with pytest.raises(Refusal, match="no coins"):
        await settlement.settle(signed, [order])
    await world.sender(PROVIDER)
    collected = await settlement.settle(signed, [order])
    assert collected.paid == {KEY.address: 400_000}
    assert [(tx, at) for tx, at, _, _ in noted] == [(collected.transactions[0], 7)]
    assert min(noted[0][2:]) > 0
    assert (await seen(world)).settled == 400_000
    again = await settlement.settle(signed, [order])
    assert again.paid == {}, "what is settled already is skipped"


async def test_why_releasing_funds_are_no_security(world: World) -> None:
    """A provider that counted a releasable reservation as security would lose: another claim is paid first, and its row is
    skipped.
    """
    sender = await reserved(world)
    await world.escrow.release(sender, KEY.address, PROVIDER.address)
    await world.advance(RULES.release + 1)
    await world.escrow.finish_release(sender, KEY.address, PROVIDER.address)
    assert await collects(world, SYBIL, 10 * DOLLAR) == [10 * DOLLAR]
    assert await collects(world, PROVIDER, 10 * DOLLAR) == []


async def collects(world: World, provider: Signer, amount: int) -> list[int]:
    """Returns the payment of a provider's claim; zero if it is skipped."""
    result = await world.escrow.settle(
        await world.sender(provider), [world.claim(provider, world.row(KEY, provider.address, amount))]
    )
    assert len(result.of(Settled)) + len(result.of(RowSkipped)) == 1
    return [int(event.paid) for event in result.of(Settled)]
