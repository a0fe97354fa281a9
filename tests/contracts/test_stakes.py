from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.chain.deploy import deploy
from tallystick.chain.events import Slashed, Staked, Unstaked, UnstakeStarted
from tallystick.chain.rpc import Sender
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.messages import Claim, ClaimRow, Receipt
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Amount
from tests.chain.harness import DOLLAR, RULES, World, person, refused

PROVIDER, REPORTER, PAYER = person("provider"), person("reporter"), person("payer").address


def _claim(world: World, seq: int, total: int) -> Signed[Claim]:
    row = ClaimRow(payer=PAYER, order_hash=ZERO_HASH, seq=seq, cumulative_cost=Amount(total))
    return PROVIDER.sign(Claim(provider=PROVIDER.address, rows=(row,)), world.domain)


def _equivocation(world: World, seq: int) -> tuple[Signed[Receipt], Signed[Receipt]]:
    return world.receipt(PROVIDER, PAYER, seq, DOLLAR), world.receipt(PROVIDER, PAYER, seq, 2 * DOLLAR)


async def _stake(world: World) -> tuple[int, int]:
    account = await world.escrow.provider(PROVIDER.address)
    return account.stake, account.unstaking


@pytest.fixture
async def reporter(world: World) -> Sender:
    """A provider with 25 dollars at stake, and a reporter's sender."""
    await world.stake(PROVIDER, 25 * DOLLAR)
    return await world.sender(REPORTER)


async def test_stake_and_unstake(world: World) -> None:
    """A stake leaves after its wait, in full; the leaving part no longer counts."""
    sender = await world.stake(PROVIDER, 5 * DOLLAR)
    await world.give(PROVIDER.address, DOLLAR)
    await world.escrow.token.approve(sender, world.deployment.escrow, Amount(DOLLAR))
    (staked,) = (await world.escrow.stake(sender, Amount(DOLLAR))).of(Staked)
    assert (staked.provider, staked.amount) == (PROVIDER.address, DOLLAR)
    (started,) = (await world.escrow.unstake(sender, Amount(4 * DOLLAR))).of(UnstakeStarted)
    account = await world.escrow.provider(PROVIDER.address)
    assert (account.stake, account.unstaking, account.unstake_at) == (2 * DOLLAR, 4 * DOLLAR, started.unstake_at)
    with refused("TooEarly", readyAt=started.unstake_at):
        await world.escrow.withdraw_stake(sender)
    await world.advance(RULES.unstake)
    (left,) = (await world.escrow.withdraw_stake(sender)).of(Unstaked)
    assert left.amount == await world.escrow.token.balance_of(PROVIDER.address) == 4 * DOLLAR
    assert await _stake(world) == (2 * DOLLAR, 0)
    with refused("NotUnstaking"):
        await world.escrow.withdraw_stake(sender)


async def test_unstaking_can_be_changed_and_called_off(world: World) -> None:
    """A new announcement replaces the old one and waits again; announcing zero returns everything to the stake."""
    sender = await world.stake(PROVIDER, 5 * DOLLAR)
    await world.escrow.unstake(sender, Amount(DOLLAR))
    await world.advance(RULES.unstake)
    await world.escrow.unstake(sender, Amount(5 * DOLLAR))
    with refused("TooEarly"):
        await world.escrow.withdraw_stake(sender)
    await world.escrow.unstake(sender, Amount(0))
    assert await _stake(world) == (5 * DOLLAR, 0)
    with refused("InsufficientStake", available=5 * DOLLAR, wanted=6 * DOLLAR):
        await world.escrow.unstake(sender, Amount(6 * DOLLAR))
    with refused("ZeroAmount"):
        await world.escrow.stake(sender, Amount(0))


async def test_equivocation_is_slashed(world: World, reporter: Sender) -> None:
    """Two different receipts for one payer and seq cost the penalty, of which the reporter gets a fifth."""
    first = world.receipt(PROVIDER, PAYER, 1, DOLLAR)
    second = world.receipt(PROVIDER, PAYER, 1, DOLLAR, finished_at=7)
    (slashed,) = (await world.escrow.slash_equivocation(reporter, first, second)).of(Slashed)
    assert (slashed.provider, slashed.reporter) == (PROVIDER.address, REPORTER.address)
    assert (slashed.amount, slashed.reward) == (10 * DOLLAR, 2 * DOLLAR)
    assert await _stake(world) == (15 * DOLLAR, 0)
    assert (await world.escrow.provider(REPORTER.address)).credit == 2 * DOLLAR
    assert (await world.escrow.provider(RULES.treasury)).credit == 8 * DOLLAR
    assert await world.escrow.evidence_used(slashed.evidence)
    with refused("EvidenceUsed", evidence=slashed.evidence):
        await world.escrow.slash_equivocation(reporter, second, first)


async def test_what_is_no_equivocation(world: World, reporter: Sender) -> None:
    """The same receipt twice, another seq, payer or provider, or a forged receipt is no evidence."""
    first = world.receipt(PROVIDER, PAYER, 1, DOLLAR)
    for other in (
        first,
        world.receipt(PROVIDER, PAYER, 2, DOLLAR),
        world.receipt(PROVIDER, REPORTER.address, 1, DOLLAR),
        world.receipt(REPORTER, PAYER, 1, 2 * DOLLAR),
    ):
        with refused("NotEvidence"):
            await world.escrow.slash_equivocation(reporter, first, other)
    forged = replace(first.message, cost=Amount(9))
    framed = Signed(forged, REPORTER.sign_digest(forged.digest(world.domain)))
    for pair in ((first, framed), (framed, first)):
        with refused("BadSignature", signer=PROVIDER.address):
            await world.escrow.slash_equivocation(reporter, *pair)
    assert await _stake(world) == (25 * DOLLAR, 0)


async def test_an_overclaim_is_slashed(world: World, reporter: Sender) -> None:
    """A claim row above the receipt of the same or a later seq costs the penalty, once."""
    receipt = world.receipt(PROVIDER, PAYER, 5, DOLLAR)
    high = _claim(world, 5, DOLLAR + 1)
    (slashed,) = (await world.escrow.slash_overclaim(reporter, high, 0, receipt)).of(Slashed)
    assert slashed.amount == 10 * DOLLAR
    with refused("EvidenceUsed"):
        await world.escrow.slash_overclaim(reporter, high, 0, receipt)
    await world.escrow.slash_overclaim(reporter, _claim(world, 4, DOLLAR + 1), 0, receipt)
    assert await _stake(world) == (5 * DOLLAR, 0)


async def test_what_is_no_overclaim(world: World, reporter: Sender) -> None:
    """An honest or later claim, another payer's receipt, a missing row or a forged message is no evidence."""
    receipt = world.receipt(PROVIDER, PAYER, 5, DOLLAR)
    foreign = world.receipt(PROVIDER, REPORTER.address, 5, 1)
    for evidence in (
        (_claim(world, 5, DOLLAR), 0, receipt),
        (_claim(world, 6, 9 * DOLLAR), 0, receipt),
        (_claim(world, 5, 9 * DOLLAR), 1, receipt),
        (_claim(world, 5, 9 * DOLLAR), 0, foreign),
        (_claim(world, 5, 9 * DOLLAR), 0, world.receipt(REPORTER, PAYER, 5, DOLLAR)),
    ):
        with refused("NotEvidence"):
            await world.escrow.slash_overclaim(reporter, *evidence)
    high = _claim(world, 5, 9 * DOLLAR)
    framed = Signed(high.message, REPORTER.sign_digest(high.message.digest(world.domain)))
    with refused("BadSignature"):
        await world.escrow.slash_overclaim(reporter, framed, 0, receipt)
    forged = Signed(receipt.message, REPORTER.sign_digest(receipt.message.digest(world.domain)))
    with refused("BadSignature"):
        await world.escrow.slash_overclaim(reporter, high, 0, forged)


async def test_a_penalty_takes_what_is_there(world: World, reporter: Sender) -> None:
    """The penalty takes the active stake first, then the leaving one; an empty stake is refused by name."""
    provider = await world.sender(PROVIDER)
    await world.escrow.unstake(provider, Amount(20 * DOLLAR))
    taken = []
    for seq in range(1, 4):
        (slashed,) = (await world.escrow.slash_equivocation(reporter, *_equivocation(world, seq))).of(Slashed)
        taken.append(slashed.amount)
        if seq == 1:
            assert await _stake(world) == (0, 15 * DOLLAR)
    assert taken == [10 * DOLLAR, 10 * DOLLAR, 5 * DOLLAR]
    assert (await world.escrow.provider(PROVIDER.address)).unstake_at == 0
    with refused("NothingAtStake", provider=PROVIDER.address):
        await world.escrow.slash_equivocation(reporter, *_equivocation(world, 4))
    await world.advance(RULES.unstake)
    with refused("NotUnstaking"):
        await world.escrow.withdraw_stake(provider)


async def test_evidence_does_not_wear_out(world: World, reporter: Sender) -> None:
    """A penalty beyond the stake stays due, so reporting oneself with little or no stake gives no immunity."""
    cheat = person("cheat")
    pair = [world.receipt(cheat, PAYER, 1, total) for total in (DOLLAR, 2 * DOLLAR)]
    with refused("NothingAtStake", provider=cheat.address):
        await world.escrow.slash_equivocation(await world.sender(cheat), pair[0], pair[1])
    await world.stake(cheat, 3 * DOLLAR)
    (first,) = (await world.escrow.slash_equivocation(await world.sender(cheat), pair[0], pair[1])).of(Slashed)
    assert (first.amount, await world.escrow.evidence_used(first.evidence)) == (3 * DOLLAR, False)
    await world.stake(cheat, 25 * DOLLAR)
    (rest,) = (await world.escrow.slash_equivocation(reporter, pair[1], pair[0])).of(Slashed)
    assert (rest.amount, rest.evidence, await world.escrow.evidence_used(rest.evidence)) == (7 * DOLLAR, first.evidence, True)
    with refused("EvidenceUsed", evidence=first.evidence):
        await world.escrow.slash_equivocation(reporter, pair[0], pair[1])
    assert (await world.escrow.provider(cheat.address)).stake == 18 * DOLLAR


async def test_reporting_oneself_is_no_early_way_out(world: World) -> None:
    """A provider that slashes itself to skip the wait loses four fifths."""
    provider = await world.stake(PROVIDER, 10 * DOLLAR)
    pair = world.receipt(PROVIDER, PAYER, 1, DOLLAR), world.receipt(PROVIDER, PAYER, 1, 2 * DOLLAR)
    await world.escrow.slash_equivocation(provider, *pair)
    assert (await world.escrow.provider(PROVIDER.address)).credit == 2 * DOLLAR
    assert await _stake(world) == (0, 0)


async def test_rules_must_make_sense(world: World) -> None:
    """Unstaking waits longer than every other wait and at most a year; a penalty, a treasury and a token are required."""
    sender, token = world.deployer, world.deployment.token
    for rules in (replace(RULES, unstake=RULES.release), replace(RULES, thaw=RULES.unstake)):
        with refused("UnstakeTooShort"):
            await deploy(world.rpc, sender, rules=rules, token=token)
    year = 365 * 86_400
    with refused("WaitTooLong", wait=year + 1, longest=year):
        await deploy(world.rpc, sender, rules=replace(RULES, unstake=year + 1), token=token)
    await deploy(world.rpc, sender, rules=replace(RULES, unstake=year), token=token)
    with refused("BadPayee", payee=token):
        await deploy(world.rpc, sender, rules=replace(RULES, treasury=token), token=token)
    with refused("ZeroAmount"):
        await deploy(world.rpc, sender, rules=replace(RULES, penalty=Amount(0)), token=token)
    with refused("ZeroAddress"):
        await deploy(world.rpc, sender, rules=replace(RULES, treasury=ZERO_ADDRESS), token=token)
    assert await world.escrow.rules() == RULES
