from __future__ import annotations

from dataclasses import astuple

import pytest

from tallystick.chain.codec import load_abi
from tallystick.chain.deploy import deploy
from tallystick.chain.escrow import Escrow
from tallystick.chain.token import SignedAuthorization, authorization_nonce, split_signature
from tallystick.protocol.errors import Refusal
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount, Hash, Seconds
from tests.chain.harness import DOLLAR, FAR, RULES, World, person, refused
from tests.contracts.artifacts import load
from tests.contracts.market_harness import Market

KEY, OWNER, STRANGER, PROVIDER = person("key"), person("owner"), person("stranger"), person("provider")
HOSTILE = load("HostileToken")


@pytest.fixture
async def hostile(world: World) -> World:
    """A market whose token can be told to misbehave, and a purse with ten units in it."""
    mined = await world.deployer.send(None, HOSTILE.create())
    assert mined.created is not None
    deployment = await deploy(world.rpc, world.deployer, rules=RULES, token=mined.created)
    made = World(world.rpc, deployment, Escrow(world.rpc, deployment), world.deployer)
    await made.purse(KEY, OWNER, 10 * DOLLAR)
    return made


async def _tell(world: World, function: str, *arguments: object) -> None:
    await world.deployer.send(world.deployment.token, HOSTILE.call(function, *arguments))


async def test_a_token_that_keeps_a_fee_is_refused(hostile: World) -> None:
    """A purse is credited with exactly the received amount, or not at all."""
    await _tell(hostile, "setFee", 5)
    with refused("ShortDelivery", expected=DOLLAR, received=DOLLAR - 5):
        await hostile.top_up(KEY, OWNER, DOLLAR)
    with refused("ShortDelivery"):
        await hostile.stake(PROVIDER, DOLLAR)
    assert (await hostile.escrow.purse(KEY.address)).free == 10 * DOLLAR


async def test_the_escrow_holds_at_most_96_bits(hostile: World) -> None:
    """A token with a supply above 96 bits cannot make sums overflow."""
    most = (1 << 96) - 1
    with refused("AmountTooLarge", amount=most + 10 * DOLLAR):
        await hostile.top_up(KEY, OWNER, most)
    await hostile.top_up(KEY, OWNER, most - 10 * DOLLAR)
    assert (await hostile.escrow.purse(KEY.address)).free == most


async def test_a_blocked_account_blocks_only_itself(hostile: World) -> None:
    """A payee that the token refuses cannot block a batch; its credit grows, and it cashes out to another address."""
    other = person("other")
    await _tell(hostile, "setBlocked", PROVIDER.address, True)
    relay = await hostile.sender(STRANGER)
    rows = [hostile.claim(p, hostile.row(KEY, p.address, DOLLAR)) for p in (PROVIDER, other)]
    await hostile.escrow.settle(relay, rows)
    with pytest.raises(Refusal):
        await hostile.escrow.cash_out(relay, PROVIDER.address)
    await hostile.escrow.cash_out(relay, other.address)
    await hostile.escrow.set_payout(await hostile.sender(PROVIDER), STRANGER.address)
    await hostile.escrow.cash_out(relay, PROVIDER.address)
    assert await hostile.escrow.token.balance_of(STRANGER.address) == DOLLAR


async def test_a_token_that_calls_back_gets_nowhere(hostile: World) -> None:
    """A transfer that re-enters the escrow fails as a whole."""
    await hostile.settle(await hostile.sender(PROVIDER), hostile.row(KEY, PROVIDER.address, DOLLAR))
    again = hostile.escrow.calldata("cashOut", PROVIDER.address)
    await _tell(hostile, "setCallback", hostile.deployment.escrow, again, False)
    with pytest.raises(Refusal):
        await hostile.escrow.cash_out(await hostile.sender(STRANGER), PROVIDER.address)
    await _tell(hostile, "setCallback", ZERO_ADDRESS, b"", False)
    await hostile.escrow.cash_out(await hostile.sender(STRANGER), PROVIDER.address)
    assert await hostile.escrow.token.balance_of(PROVIDER.address) == DOLLAR


def _authorized(world: World, amount: int) -> SignedAuthorization:
    """A signature that is valid to a token that accepts any signature."""
    return SignedAuthorization(Amount(amount), Seconds(0), Seconds(FAR), Hash(bytes(32)), bytes(64) + b"\x1b")


async def test_an_authorization_is_no_way_around(hostile: World) -> None:
    """A deposit by authorization also credits exactly the received amount and cannot be re-entered."""
    stranger = await hostile.sender(STRANGER)
    await _tell(hostile, "mint", OWNER.address, 10 * DOLLAR)
    await hostile.escrow.deposit_with_authorization(stranger, KEY.address, _authorized(hostile, DOLLAR))
    assert (await hostile.escrow.purse(KEY.address)).free == 11 * DOLLAR
    await _tell(hostile, "setFee", 5)
    with refused("ShortDelivery", expected=DOLLAR, received=DOLLAR - 5):
        await hostile.escrow.deposit_with_authorization(stranger, KEY.address, _authorized(hostile, DOLLAR))
    await _tell(hostile, "setFee", 0)
    await hostile.settle(await hostile.sender(PROVIDER), hostile.row(KEY, PROVIDER.address, DOLLAR))
    again = hostile.escrow.calldata("cashOut", PROVIDER.address)
    await _tell(hostile, "setCallback", hostile.deployment.escrow, again, False)
    with refused("ReentrancyGuardReentrantCall"):
        await hostile.escrow.deposit_with_authorization(stranger, KEY.address, _authorized(hostile, DOLLAR))
    # The token ignores the refusal: the deposit stands, and no money left meanwhile.
    await _tell(hostile, "setCallback", hostile.deployment.escrow, again, True)
    await hostile.escrow.deposit_with_authorization(stranger, KEY.address, _authorized(hostile, DOLLAR))
    assert (await hostile.escrow.provider(PROVIDER.address)).credit == DOLLAR


def test_no_escrow_without_a_token() -> None:
    """The zero address is not accepted as a token."""
    market = Market()
    code = market.escrow_abi.create(ZERO_ADDRESS, astuple(market.rules))
    with refused("ZeroAddress"):
        market.chain.create(STRANGER.address, code)


async def test_the_faucet_is_bounded(world: World) -> None:
    """Anyone can mint test dollars, up to a billion at a time."""
    token, sender = world.escrow.token, await world.sender(STRANGER)
    await token.mint(sender, OWNER.address, Amount(10**15))
    with refused("MintTooLarge", limit=10**15):
        await token.mint(sender, OWNER.address, Amount(10**15 + 1))
    assert await token.balance_of(OWNER.address) == 10**15
    assert await token.decimals() == world.deployment.token_decimals == 6


async def test_only_the_payee_executes_an_authorization(world: World) -> None:
    """An authorization for the escrow is useless to anyone who calls the token directly."""
    token, stranger = world.escrow.token, await world.sender(STRANGER)
    signed = await token.authorize(
        OWNER, world.deployment.escrow, KEY.address, Amount(1), Hash(bytes(32)), valid_before=Seconds(FAR)
    )
    with refused("NotPayee", payee=world.deployment.escrow, caller=STRANGER.address):
        await stranger.send(token.address, load_abi("TestUSD").call("receiveWithAuthorization", *_fetch(world, signed)))


def _fetch(world: World, signed: SignedAuthorization) -> tuple[object, ...]:
    nonce = authorization_nonce(KEY.address, signed.salt)
    times = (signed.valid_after, signed.valid_before, nonce)
    return OWNER.address, world.deployment.escrow, signed.amount, *times, *split_signature(signed.signature)


async def test_a_market_needs_a_token(world: World) -> None:
    """An escrow cannot be deployed without a token."""
    with pytest.raises(Refusal):
        await deploy(world.rpc, world.deployer, rules=RULES, token=Address("0x" + "12" * 20))
