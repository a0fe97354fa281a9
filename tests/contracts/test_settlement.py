from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.escrow import Purse
from tallystick.chain.events import CashedOut, FeeEarned, PayoutSet, RowSkipped, Settled, SkipReason
from tallystick.chain.rpc import Sender
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Amount, Seconds
from tests.chain.harness import DOLLAR, World, person, refused

KEY, OWNER, STRANGER, PROVIDER, COORDINATOR = map(person, ("key", "owner", "stranger", "provider", "coordinator"))


@pytest.fixture
async def provider(world: World) -> Sender:
    """A payer with ten dollars, and the provider's sender."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    return await world.sender(PROVIDER)


async def _credit(world: World) -> int:
    return (await world.escrow.provider(PROVIDER.address)).credit


async def test_life_of_a_tab(world: World, provider: Sender) -> None:
    """A provider collects its receipts' sum, twice, and cashes out; the payer keeps the rest."""
    (first,) = (await world.settle(provider, world.row(KEY, PROVIDER.address, 5 * DOLLAR, 3 * DOLLAR))).of(Settled)
    assert (first.payer, first.provider, first.paid, first.fee, first.settled) == (
        KEY.address,
        PROVIDER.address,
        3 * DOLLAR,
        0,
        3 * DOLLAR,
    )
    (second,) = (await world.settle(provider, world.row(KEY, PROVIDER.address, 5 * DOLLAR, 4 * DOLLAR))).of(Settled)
    assert (second.paid, second.settled) == (DOLLAR, 4 * DOLLAR)
    (out,) = (await world.escrow.cash_out(provider, PROVIDER.address)).of(CashedOut)
    assert (out.account, out.payout, out.amount) == (PROVIDER.address, PROVIDER.address, 4 * DOLLAR)
    assert await world.escrow.token.balance_of(PROVIDER.address) == 4 * DOLLAR
    assert (await world.escrow.purse(KEY.address)).free == 6 * DOLLAR
    with refused("NoCredit", account=PROVIDER.address):
        await world.escrow.cash_out(provider, PROVIDER.address)


async def test_never_above_the_ceiling(world: World, provider: Sender) -> None:
    """A total above the payer's signed ceiling pays up to the ceiling."""
    (paid,) = (await world.settle(provider, world.row(KEY, PROVIDER.address, 2 * DOLLAR, 9 * DOLLAR))).of(Settled)
    assert paid.paid == 2 * DOLLAR


async def test_reservation_first_then_free(world: World, provider: Sender) -> None:
    """The reservation is spent first, then the free balance; without a target nothing is refilled."""
    await world.escrow.reserve(await world.sender(OWNER), KEY.address, PROVIDER.address, Amount(2 * DOLLAR))
    await world.settle(provider, world.row(KEY, PROVIDER.address, DOLLAR))
    assert (await world.escrow.tab(KEY.address, PROVIDER.address)).reserved == DOLLAR
    assert (await world.escrow.purse(KEY.address)).free == 8 * DOLLAR
    await world.settle(provider, world.row(KEY, PROVIDER.address, 4 * DOLLAR))
    assert (await world.escrow.tab(KEY.address, PROVIDER.address)).reserved == 0
    assert (await world.escrow.purse(KEY.address)).free == 6 * DOLLAR


async def test_another_providers_reservation_is_not_touched(world: World, provider: Sender) -> None:
    """A reservation secures one provider against all others."""
    await world.escrow.reserve(await world.sender(OWNER), KEY.address, STRANGER.address, Amount(7 * DOLLAR))
    (paid,) = (await world.settle(provider, world.row(KEY, PROVIDER.address, 9 * DOLLAR))).of(Settled)
    assert paid.paid == 3 * DOLLAR
    assert (await world.escrow.tab(KEY.address, STRANGER.address)).reserved == 7 * DOLLAR


async def test_a_settlement_refills_the_reservation(world: World, provider: Sender) -> None:
    """After paying, the reservation is filled to the order's target from the free balance."""
    target = {"reserve_target": Amount(4 * DOLLAR)}
    await world.settle(provider, world.row(KEY, PROVIDER.address, DOLLAR, **target))
    assert (await world.escrow.tab(KEY.address, PROVIDER.address)).reserved == 4 * DOLLAR
    await world.settle(provider, world.row(KEY, PROVIDER.address, 8 * DOLLAR, **target))
    assert (await world.escrow.tab(KEY.address, PROVIDER.address)).reserved == 2 * DOLLAR
    assert (await world.escrow.purse(KEY.address)).free == 0


async def test_short_money_pays_in_part_and_the_rest_later(world: World, provider: Sender) -> None:
    """A shortfall loses nothing: after a top-up the same row collects exactly the rest, once."""
    row = world.row(KEY, PROVIDER.address, 14 * DOLLAR)
    (paid,) = (await world.settle(provider, row)).of(Settled)
    assert (paid.paid, paid.settled) == (10 * DOLLAR, 10 * DOLLAR)
    (skipped,) = (await world.settle(provider, row)).of(RowSkipped)
    assert skipped.reason == SkipReason.UNFUNDED
    await world.top_up(KEY, OWNER, 9 * DOLLAR)
    (paid,) = (await world.settle(provider, row)).of(Settled)
    assert (paid.paid, paid.settled) == (4 * DOLLAR, 14 * DOLLAR)
    (skipped,) = (await world.settle(provider, row)).of(RowSkipped)
    assert skipped.reason == SkipReason.NOTHING_OWED
    assert (await world.escrow.purse(KEY.address)).free == 5 * DOLLAR


async def test_money_under_thaw_still_pays(world: World, provider: Sender) -> None:
    """Free money pays signed orders until it is withdrawn; the thaw shrinks accordingly."""
    owner = await world.sender(OWNER)
    await world.escrow.thaw(owner, KEY.address, Amount(10 * DOLLAR))
    await world.settle(provider, world.row(KEY, PROVIDER.address, 7 * DOLLAR))
    purse = await world.escrow.purse(KEY.address)
    assert (purse.free, purse.thawing) == (3 * DOLLAR, 3 * DOLLAR)
    await world.settle(provider, world.row(KEY, PROVIDER.address, 10 * DOLLAR))
    assert await world.escrow.purse(KEY.address) == Purse(OWNER.address, Amount(0), Amount(0), Seconds(0))
    with refused("NotThawing"):
        await world.escrow.withdraw(owner, KEY.address)


@pytest.mark.parametrize("signer", [STRANGER, PROVIDER], ids=["a stranger", "the provider itself"])
async def test_nothing_is_paid_without_the_providers_signature(world: World, provider: Sender, signer: Signer) -> None:
    """Any sender, including the provider, needs the provider's signature over exactly these rows."""
    row, other = world.row(KEY, PROVIDER.address, DOLLAR), world.row(KEY, PROVIDER.address, 2 * DOLLAR)
    relay = await world.sender(signer)
    signed = world.claim(PROVIDER, row)
    forged = replace(signed, signature=STRANGER.sign_digest(signed.claim(world.domain).digest(world.domain)))
    inflated = replace(signed, rows=(replace(row, cumulative_cost=Amount(2 * DOLLAR)),))
    for bad in (
        replace(signed, signature=b""),
        replace(signed, signature=signed.signature[:64]),
        replace(signed, rows=(row, other)),
        replace(signed, rows=(replace(row, seq=2),)),
        inflated,
        forged,
    ):
        events = (await world.escrow.settle(relay, [bad])).of(RowSkipped)
        assert [(e.provider, e.reason) for e in events] == [(PROVIDER.address, SkipReason.BAD_CLAIM)] * len(bad.rows)
    (paid,) = (await world.escrow.settle(relay, [signed])).of(Settled)
    assert paid.paid == DOLLAR


@pytest.mark.parametrize("reason", [r for r in SkipReason if r not in (SkipReason.NONE, SkipReason.BAD_CLAIM)])
async def test_every_reason_to_skip(world: World, provider: Sender, reason: SkipReason) -> None:
    """Each bad row is skipped with its reason and changes nothing, and the good rows around it are paid."""
    good = [world.row(KEY, PROVIDER.address, DOLLAR), world.row(KEY, PROVIDER.address, 2 * DOLLAR)]
    poor = person("poor")
    await world.purse(poor, OWNER, 0)
    row = world.row(KEY, PROVIDER.address, 5 * DOLLAR)
    signed = row.order
    bad = {
        SkipReason.SELF_DEALING: [world.row(PROVIDER, PROVIDER.address, DOLLAR)],
        SkipReason.EXPIRED: [world.row(KEY, PROVIDER.address, 5 * DOLLAR, claim_by=await world.rpc.timestamp() - 1)],
        SkipReason.BAD_SIGNATURE: [
            replace(row, order=Signed(signed.message, STRANGER.sign_digest(signed.message.digest(world.domain)))),
            replace(row, order=Signed(replace(signed.message, ceiling=Amount(6 * DOLLAR)), signed.signature)),
            replace(row, order=Signed(replace(signed.message, terms_hash=ZERO_HASH), signed.signature)),
            replace(row, order=Signed(signed.message, bytes(64) + b"\x1b")),
            SettleRow(world.order(KEY, STRANGER.address, 5 * DOLLAR), 1, Amount(DOLLAR)),
            SettleRow(_foreign(world, chain_id=1), 1, Amount(DOLLAR)),
            SettleRow(_foreign(world, contract=STRANGER.address), 1, Amount(DOLLAR)),
        ],
        SkipReason.UNKNOWN_PURSE: [world.row(STRANGER, PROVIDER.address, DOLLAR)],
        SkipReason.NOTHING_OWED: [
            world.row(KEY, PROVIDER.address, 0),
            world.row(KEY, PROVIDER.address, 5 * DOLLAR, DOLLAR),
            world.row(KEY, PROVIDER.address, DOLLAR, 5 * DOLLAR),
        ],
        SkipReason.UNFUNDED: [world.row(poor, PROVIDER.address, DOLLAR)],
    }[reason]
    result = await world.settle(provider, good[0], *bad, good[1])
    assert [e.reason for e in result.of(RowSkipped)] == [reason] * len(bad)
    assert [e.settled for e in result.of(Settled)] == [DOLLAR, 2 * DOLLAR]
    assert await _credit(world) == 2 * DOLLAR
    assert (await world.escrow.purse(KEY.address)).free == 8 * DOLLAR


def _foreign(world: World, **changes: object) -> Signed:  # type: ignore[type-arg]
    """A valid order for another chain or contract."""
    order = world.order(KEY, PROVIDER.address, 5 * DOLLAR).message
    fields = {"chain_id": world.domain.chain_id, "contract": world.domain.contract} | changes
    return Signed(order, KEY.sign_digest(order.digest(Domain(**fields))))  # type: ignore[arg-type]


async def test_claim_by_is_the_last_second(world: World, provider: Sender) -> None:
    """A row pays in the second of claimBy and not in the next."""
    at = await world.rpc.timestamp() + 1_000
    row = world.row(KEY, PROVIDER.address, DOLLAR, claim_by=at)
    await world.rpc.request("evm_setNextBlockTimestamp", at)
    assert (await world.settle(provider, row)).of(Settled)
    expiring = world.row(KEY, PROVIDER.address, 2 * DOLLAR, claim_by=at)
    assert (await world.settle(provider, expiring)).of(RowSkipped)[0].reason == SkipReason.EXPIRED


async def test_one_bad_claim_leaves_the_others(world: World, provider: Sender) -> None:
    """A batch of many providers pays all but the one whose signature is bad."""
    second = person("second provider")
    good, bad = world.claim(PROVIDER, world.row(KEY, PROVIDER.address, DOLLAR)), world.row(KEY, second.address, DOLLAR)
    result = await world.escrow.settle(
        await world.sender(STRANGER), [ClaimBatch(second.address, (bad,)), good, world.claim(second, bad)]
    )
    assert [type(e).__name__ for e in result.events] == ["RowSkipped", "Settled", "Settled"]
    assert [e.provider for e in result.of(Settled)] == [PROVIDER.address, second.address]


async def test_order_of_rows_does_not_matter(world: World) -> None:
    """Any permutation, also with duplicates, ends in the same balances."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    provider = await world.sender(PROVIDER)
    rows = [world.row(KEY, PROVIDER.address, n * DOLLAR) for n in (1, 2, 3)]
    before = await world.rpc.request("evm_snapshot")
    for order in itertools.permutations([*rows, rows[2]]):
        await world.settle(provider, *order)
        assert await _credit(world) == 3 * DOLLAR
        await world.rpc.request("evm_revert", before)
        world.forget_nonces()


async def test_the_fee_is_inside_the_signed_limit(world: World, provider: Sender) -> None:
    """The coordinator gets its own rate of the payment, or the payer's signed rate if that is lower."""
    coordinator = await world.sender(COORDINATOR)
    await world.escrow.set_fee(coordinator, 500)
    terms: dict[str, Any] = {"coordinator": COORDINATOR.address}
    result = await world.settle(
        provider,
        world.row(KEY, PROVIDER.address, DOLLAR, max_fee_bps=1_000, **terms),
        world.row(KEY, PROVIDER.address, 2 * DOLLAR, max_fee_bps=300, **terms),
        world.row(KEY, PROVIDER.address, 3 * DOLLAR, max_fee_bps=0, **terms),
        world.row(KEY, PROVIDER.address, 4 * DOLLAR, max_fee_bps=900),
        world.row(KEY, PROVIDER.address, 4 * DOLLAR + 19, max_fee_bps=1_000, **terms),
    )
    assert [e.fee for e in result.of(Settled)] == [50_000, 30_000, 0, 0, 0]
    assert [(e.coordinator, e.amount) for e in result.of(FeeEarned)] == [(COORDINATOR.address, 80_000)]
    assert (await world.escrow.provider(COORDINATOR.address)).credit == 80_000
    assert await _credit(world) == 4 * DOLLAR + 19 - 80_000
    await world.escrow.cash_out(provider, COORDINATOR.address)
    assert await world.escrow.token.balance_of(COORDINATOR.address) == 80_000


async def test_fees_of_several_coordinators(world: World, provider: Sender) -> None:
    """Each row's fee goes to the coordinator that its order names."""
    others = [person("c1"), person("c2")]
    for coordinator in others:
        await world.escrow.set_fee(await world.sender(coordinator), 100)
    rows = [world.row(KEY, PROVIDER.address, n * DOLLAR, coordinator=others[n % 2].address, max_fee_bps=100) for n in range(1, 6)]
    await world.settle(provider, *rows)
    credits_ = [(await world.escrow.provider(coordinator.address)).credit for coordinator in others]
    assert credits_ == [20_000, 30_000]


async def test_a_rate_is_at_most_everything(world: World, provider: Sender) -> None:
    """Rates are limited to 100 %, at which the provider gets nothing."""
    with refused("FeeTooHigh", bps=10_001):
        await world.escrow.set_fee(provider, 10_001)
    await world.escrow.set_fee(await world.sender(COORDINATOR), 10_000)
    assert (await world.escrow.provider(COORDINATOR.address)).fee_bps == 10_000
    row = world.row(KEY, PROVIDER.address, DOLLAR, coordinator=COORDINATOR.address, max_fee_bps=10_000)
    await world.settle(provider, row)
    assert (await world.escrow.provider(COORDINATOR.address)).credit == DOLLAR


async def test_an_empty_batch_is_a_mistake(world: World, provider: Sender) -> None:
    """Settling nothing is refused; a claim without rows does nothing."""
    with refused("EmptyBatch"):
        await world.escrow.settle(provider, [])
    assert (await world.escrow.settle(provider, [ClaimBatch(PROVIDER.address, ())])).events == ()


async def test_cash_out_goes_to_the_payout_address(world: World, provider: Sender) -> None:
    """Anyone may pay out credit, only to the payout address that the account set, and never to the escrow or the token."""
    vault = person("vault").address
    await world.settle(provider, world.row(KEY, PROVIDER.address, DOLLAR))
    (changed,) = (await world.escrow.set_payout(provider, vault)).of(PayoutSet)
    assert (changed.account, changed.payout) == (PROVIDER.address, vault)
    await world.escrow.cash_out(await world.sender(STRANGER), PROVIDER.address)
    assert await world.escrow.token.balance_of(vault) == DOLLAR
    for nobody in (world.deployment.escrow, world.deployment.token):
        with refused("BadPayee", payee=nobody):
            await world.escrow.set_payout(provider, nobody)
    await world.escrow.set_payout(provider, ZERO_ADDRESS)
    assert (await world.escrow.provider(PROVIDER.address)).payout == PROVIDER.address


async def test_the_largest_amounts(world: World, provider: Sender) -> None:
    """Totals and ceilings of 96 bits pay what is available and overflow nothing."""
    most = (1 << 96) - 1
    (paid,) = (await world.settle(provider, world.row(KEY, PROVIDER.address, most, reserve_target=Amount(most)))).of(Settled)
    assert paid.paid == 10 * DOLLAR
