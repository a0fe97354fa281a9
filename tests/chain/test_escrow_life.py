"""The life cycle of each kind of state in the escrow, through the typed wrapper, on the embedded chain and on anvil."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tallystick.chain.escrow import Purse, TabState
from tallystick.chain.event_reader import read_events
from tallystick.chain.events import (
    CashedOut,
    Deposited,
    FeeEarned,
    PayoutSet,
    PurseOpened,
    Released,
    ReleaseStarted,
    Reserved,
    RowSkipped,
    Settled,
    SkipReason,
    Slashed,
    Staked,
    ThawCancelled,
    ThawStarted,
    Unstaked,
    UnstakeStarted,
    Withdrawn,
)
from tallystick.protocol.messages import Bind, Release
from tallystick.protocol.types import Amount, Hash, Seconds
from tests.chain.harness import DOLLAR, FAR, RULES, World, person, refused

KEY, OWNER, PROVIDER, COORDINATOR, STRANGER = map(person, ("key", "owner", "provider", "coordinator", "stranger"))


async def test_the_life_of_a_purse(either: World) -> None:
    """A purse is opened by a stranger with the key's signature, filled in three ways, thawed, cancelled, thawed again and
    withdrawn.
    """
    escrow, token = either.escrow, either.escrow.token
    owner, stranger = await either.sender(OWNER), await either.sender(STRANGER)
    bind = KEY.sign(Bind(key=KEY.address, owner=OWNER.address), either.domain)
    assert (await escrow.open_purse(stranger, KEY.address, OWNER.address, bind)).of(PurseOpened)
    held = await token.balance_of(OWNER.address)
    await either.top_up(KEY, OWNER, DOLLAR)
    await either.give(OWNER.address, 5 * DOLLAR)
    deadline = Seconds(await either.rpc.timestamp() + 1_000)
    permit = await token.permit(OWNER, either.deployment.escrow, Amount(2 * DOLLAR), deadline)
    (deposited,) = (await escrow.deposit_with_permit(owner, KEY.address, permit)).of(Deposited)
    assert deposited.amount == 2 * DOLLAR
    salt, amount = Hash(b"\x05" * 32), Amount(3 * DOLLAR)
    signed = await token.authorize(OWNER, either.deployment.escrow, KEY.address, amount, salt, valid_before=deadline)
    assert (await escrow.deposit_with_authorization(stranger, KEY.address, signed)).of(Deposited)
    assert await escrow.purse(KEY.address) == Purse(OWNER.address, Amount(6 * DOLLAR), Amount(0), Seconds(0))

    assert (await escrow.thaw(owner, KEY.address, Amount(DOLLAR))).of(ThawStarted)
    assert (await escrow.cancel_thaw(owner, KEY.address)).of(ThawCancelled)
    (started,) = (await escrow.thaw(owner, KEY.address, Amount(4 * DOLLAR))).of(ThawStarted)
    assert started.thaw_at == await either.rpc.timestamp() + RULES.thaw
    with refused("TooEarly", readyAt=started.thaw_at):
        await escrow.withdraw(owner, KEY.address)
    await either.advance(RULES.thaw)
    (withdrawn,) = (await escrow.withdraw(owner, KEY.address)).of(Withdrawn)
    assert withdrawn.amount == 4 * DOLLAR == await token.balance_of(OWNER.address) - held
    assert (await escrow.purse(KEY.address)).free == 2 * DOLLAR


async def test_the_life_of_a_tab(either: World) -> None:
    """A reservation is made by the owner, raised by an order, released after its wait, and given back by the provider in
    both ways.
    """
    escrow = either.escrow
    owner, provider = await either.purse(KEY, OWNER, 10 * DOLLAR), await either.sender(PROVIDER)
    (reserved,) = (await escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(2 * DOLLAR))).of(Reserved)
    assert reserved.reserved == 2 * DOLLAR
    order = either.order(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(5 * DOLLAR))
    assert (await escrow.secure(await either.sender(STRANGER), order)).of(Reserved)[0].amount == 3 * DOLLAR
    (started,) = (await escrow.release(owner, KEY.address, PROVIDER.address)).of(ReleaseStarted)
    with refused("TooEarly", readyAt=started.release_at):
        await escrow.finish_release(owner, KEY.address, PROVIDER.address)
    await either.advance(RULES.release)
    assert (await escrow.finish_release(owner, KEY.address, PROVIDER.address)).of(Released)[0].amount == 5 * DOLLAR
    await escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(3 * DOLLAR))
    assert (await escrow.give_back(provider, KEY.address, Amount(2 * DOLLAR))).of(Released)[0].reserved == 2 * DOLLAR
    consent = Release(payer=KEY.address, provider=PROVIDER.address, floor=Amount(DOLLAR), deadline=FAR)
    await escrow.give_back_signed(owner, PROVIDER.sign(consent, either.domain))
    assert await escrow.tab(KEY.address, PROVIDER.address) == TabState(Amount(0), Amount(DOLLAR), Seconds(0))


async def test_the_life_of_a_settlement(either: World) -> None:
    """A stranger settles for a provider: part of the amount while the purse is short, and the rest later. The fee stays
    within its limit, a bad row is skipped with its reason, and both parties cash out.
    """
    escrow, token = either.escrow, either.escrow.token
    await either.purse(KEY, OWNER, 3 * DOLLAR)
    coordinator = await either.sender(COORDINATOR)
    await escrow.set_fee(coordinator, 500)
    stranger, provider = await either.sender(STRANGER), await either.sender(PROVIDER)
    terms = {"coordinator": COORDINATOR.address, "max_fee_bps": 200, "reserve_target": Amount(DOLLAR)}
    good = either.row(KEY, PROVIDER.address, 5 * DOLLAR, None, **terms)
    bad = either.row(person("nobody"), PROVIDER.address, DOLLAR)
    result = await escrow.settle(stranger, [either.claim(PROVIDER, bad, good)])
    assert [e.reason for e in result.of(RowSkipped)] == [SkipReason.UNKNOWN_PURSE]
    assert [(e.paid, e.fee) for e in result.of(Settled)] == [(3 * DOLLAR, 60_000)]
    assert [e.amount for e in result.of(FeeEarned)] == [60_000]
    await either.top_up(KEY, OWNER, 10 * DOLLAR)
    again = [await escrow.settle(stranger, [either.claim(PROVIDER, good)]) for _ in range(2)]
    assert [e.paid for e in again[0].of(Settled)] == [2 * DOLLAR]
    assert [e.reason for e in again[1].of(RowSkipped)] == [SkipReason.NOTHING_OWED]
    assert await escrow.tab(KEY.address, PROVIDER.address) == TabState(Amount(5 * DOLLAR), Amount(DOLLAR), Seconds(0))
    payout = person("payout").address
    before = await token.balance_of(payout)
    assert (await escrow.set_payout(provider, payout)).of(PayoutSet)
    assert (await escrow.cash_out(stranger, PROVIDER.address)).of(CashedOut)[0].amount == 4_900_000
    assert await token.balance_of(payout) - before == 4_900_000
    assert (await escrow.cash_out(coordinator, COORDINATOR.address)).of(CashedOut)[0].amount == 100_000


async def test_the_life_of_a_stake(either: World) -> None:
    """A stake is deposited, announced for withdrawal, slashed for both kinds of evidence, and the rest is withdrawn; the
    reporter is paid.
    """
    escrow = either.escrow
    provider, reporter = await either.stake(PROVIDER, 30 * DOLLAR), await either.sender(STRANGER)
    held = await escrow.token.balance_of(PROVIDER.address)
    (started,) = (await escrow.unstake(provider, Amount(25 * DOLLAR))).of(UnstakeStarted)
    with refused("TooEarly", readyAt=started.unstake_at):
        await escrow.withdraw_stake(provider)
    first, second = (either.receipt(PROVIDER, KEY.address, 7, total) for total in (100, 101))
    (slashed,) = (await escrow.slash_equivocation(reporter, first, second)).of(Slashed)
    assert (slashed.amount, slashed.reward) == (RULES.penalty, RULES.penalty // 5)
    assert await escrow.evidence_used(slashed.evidence)
    with refused("EvidenceUsed", evidence=slashed.evidence):
        await escrow.slash_equivocation(reporter, second, first)
    rows = (either.row(KEY, PROVIDER.address, DOLLAR),)
    claim = PROVIDER.sign(either.claim(PROVIDER, *rows).claim(either.domain), either.domain)
    assert (await escrow.slash_overclaim(reporter, claim, 0, first)).of(Slashed)[0].amount == RULES.penalty
    await either.advance(RULES.unstake)
    assert (await escrow.withdraw_stake(provider)).of(Unstaked)[0].amount == 10 * DOLLAR
    assert await escrow.token.balance_of(PROVIDER.address) - held == 10 * DOLLAR
    account = await escrow.provider(STRANGER.address)
    assert (account.credit, (await escrow.provider(RULES.treasury)).credit) == (4 * DOLLAR, 16 * DOLLAR)


async def test_events_equal_those_that_calls_returned(either: World) -> None:
    """A follower later reads exactly the events that the calls returned, each once and in order."""
    await either.purse(KEY, OWNER, DOLLAR)
    await either.stake(PROVIDER, DOLLAR)
    await either.settle(await either.sender(PROVIDER), either.row(KEY, PROVIDER.address, DOLLAR))
    page = await read_events(either.rpc, either.deployment, either.deployment.block)
    assert [type(event) for event in page.events] == [PurseOpened, Deposited, Staked, Settled]
    assert (await read_events(either.rpc, either.deployment, page.cursor, after=page.tip)).events == ()
    blocks = [await either.rpc.block(event.at.block) for event in page.events]
    assert [block and block.hash for block in blocks] == [event.at.block_hash for event in page.events]


async def test_the_rules_are_those_that_were_deployed(either: World) -> None:
    """The waits and the penalty read from the chain are those that were deployed, and the deployment passes its check."""
    assert await either.escrow.rules() == RULES
    await either.escrow.check()


REFUSALS: dict[str, Callable[[World], Awaitable[object]]] = {
    "UnknownPurse": lambda w: w.escrow.deposit(w.deployer, KEY.address, Amount(1)),
    "ZeroAmount": lambda w: w.escrow.stake(w.deployer, Amount(0)),
    "AmountTooLarge": lambda w: w.escrow.stake(w.deployer, Amount(1 << 96)),
    "ERC20InsufficientAllowance": lambda w: w.escrow.stake(w.deployer, Amount(1)),
    "EmptyBatch": lambda w: w.escrow.settle(w.deployer, []),
    "NoCredit": lambda w: w.escrow.cash_out(w.deployer, KEY.address),
    "FeeTooHigh": lambda w: w.escrow.set_fee(w.deployer, 10_001),
    "InsufficientStake": lambda w: w.escrow.unstake(w.deployer, Amount(1)),
    "NotUnstaking": lambda w: w.escrow.withdraw_stake(w.deployer),
    "BadSignature": lambda w: w.escrow.open_purse(w.deployer, KEY.address, OWNER.address),
    "ZeroAddress": lambda w: w.escrow.open_purse(w.deployer, KEY.address, RULES.treasury.__class__("0x" + "00" * 20)),
    "NothingReserved": lambda w: w.escrow.give_back(w.deployer, KEY.address, Amount(0)),
    "Expired": lambda w: w.escrow.secure(w.deployer, w.order(KEY, PROVIDER.address, 1, deadline=1)),
    "MintTooLarge": lambda w: w.escrow.token.mint(w.deployer, KEY.address, Amount(10**18)),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_refusals_have_the_same_name_everywhere(either: World, name: str) -> None:
    """A custom error is decoded alike on both chains, and a refused call changes nothing."""
    before = await either.rpc.quantity("eth_getTransactionCount", either.deployer.address, "latest")
    with refused(name):
        await REFUSALS[name](either)
    assert await either.rpc.quantity("eth_getTransactionCount", either.deployer.address, "latest") == before
