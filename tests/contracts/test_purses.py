from __future__ import annotations

from tallystick.chain.codec import load_abi
from tallystick.chain.escrow import Purse
from tallystick.chain.events import Deposited, PurseOpened, ThawStarted, Withdrawn
from tallystick.chain.token import split_signature
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount, Hash, Seconds
from tests.chain.harness import DOLLAR, FAR, RULES, World, person, refused

KEY, OWNER, STRANGER, PROVIDER = person("key"), person("owner"), person("stranger"), person("provider")
SALT = Hash(bytes(31) + b"\x01")


async def test_a_key_binds_itself_without_a_signature(world: World) -> None:
    """The key's own transaction proves possession of the key."""
    result = await world.escrow.open_purse(await world.sender(KEY), KEY.address, OWNER.address)
    (opened,) = result.of(PurseOpened)
    assert (opened.key, opened.owner) == (KEY.address, OWNER.address)
    assert (await world.escrow.purse(KEY.address)).owner == OWNER.address


async def test_anyone_may_send_a_keys_consent(world: World) -> None:
    """With the key's signature a stranger can open the purse, only for the owner that the key named."""
    stranger = await world.sender(STRANGER)
    bind = KEY.sign(Bind(key=KEY.address, owner=OWNER.address), world.domain)
    with refused("BadSignature", signer=KEY.address):
        await world.escrow.open_purse(stranger, KEY.address, STRANGER.address, bind)
    with refused("BadSignature", signer=KEY.address):
        await world.escrow.open_purse(stranger, KEY.address, STRANGER.address)
    with refused("BadSignature", signer=KEY.address):
        await world.escrow.open_purse(stranger, KEY.address, OWNER.address, Signed(bind.message, bind.signature[:64]))
    await world.escrow.open_purse(stranger, KEY.address, OWNER.address, bind)
    assert (await world.escrow.purse(KEY.address)).owner == OWNER.address


async def test_a_key_is_bound_once(world: World) -> None:
    """Not even the key itself can move its purse to another owner."""
    await world.purse(KEY, OWNER, 0)
    with refused("PurseExists", key=KEY.address):
        await world.escrow.open_purse(await world.sender(KEY), KEY.address, STRANGER.address)


async def test_nobody_owns_a_purse_or_is_its_key(world: World) -> None:
    """The zero address can be neither key nor owner."""
    sender = await world.sender(KEY)
    with refused("ZeroAddress"):
        await world.escrow.open_purse(sender, KEY.address, ZERO_ADDRESS)
    with refused("ZeroAddress"):
        await world.escrow.open_purse(sender, ZERO_ADDRESS, OWNER.address)


async def test_deposit_after_approval(world: World) -> None:
    """A deposit moves tokens from the owner into the free balance."""
    await world.purse(KEY, OWNER, 0)
    owner = await world.sender(OWNER)
    await world.give(OWNER.address, 5 * DOLLAR)
    with refused("ERC20InsufficientAllowance"):
        await world.escrow.deposit(owner, KEY.address, Amount(3 * DOLLAR))
    await world.escrow.token.approve(owner, world.deployment.escrow, Amount(9 * DOLLAR))
    with refused("ERC20InsufficientBalance"):
        await world.escrow.deposit(owner, KEY.address, Amount(6 * DOLLAR))
    result = await world.escrow.deposit(owner, KEY.address, Amount(3 * DOLLAR))
    assert [(e.key, e.amount) for e in result.of(Deposited)] == [(KEY.address, 3 * DOLLAR)]
    assert await world.escrow.purse(KEY.address) == Purse(OWNER.address, Amount(3 * DOLLAR), Amount(0), Seconds(0))
    assert await world.escrow.token.balance_of(OWNER.address) == 2 * DOLLAR
    assert await world.escrow.token.balance_of(world.deployment.escrow) == 3 * DOLLAR


async def test_deposits_have_an_owner_and_an_amount(world: World) -> None:
    """Zero, too large an amount, an unknown purse and somebody else's purse are refused by name."""
    owner = await world.purse(KEY, OWNER, 0)
    with refused("ZeroAmount"):
        await world.escrow.deposit(owner, KEY.address, Amount(0))
    with refused("AmountTooLarge", amount=1 << 96):
        await world.escrow.deposit(owner, KEY.address, Amount(1 << 96))
    with refused("UnknownPurse", key=STRANGER.address):
        await world.escrow.deposit(owner, STRANGER.address, Amount(1))
    with refused("NotOwner", key=KEY.address, caller=STRANGER.address):
        await world.escrow.deposit(await world.sender(STRANGER), KEY.address, Amount(1))


async def test_deposit_with_permit(world: World) -> None:
    """A permit replaces the approval."""
    owner = await world.purse(KEY, OWNER, 0)
    await world.give(OWNER.address, DOLLAR)
    permit = await world.escrow.token.permit(OWNER, world.deployment.escrow, Amount(DOLLAR), Seconds(FAR))
    await world.escrow.deposit_with_permit(owner, KEY.address, permit)
    assert (await world.escrow.purse(KEY.address)).free == DOLLAR


async def test_a_front_run_permit_does_no_harm(world: World) -> None:
    """Someone who sends the owner's permit first does not stop the deposit."""
    owner = await world.purse(KEY, OWNER, 0)
    await world.give(OWNER.address, DOLLAR)
    permit = await world.escrow.token.permit(OWNER, world.deployment.escrow, Amount(DOLLAR), Seconds(FAR))
    arguments = (permit.amount, permit.deadline, *split_signature(permit.signature))
    call = load_abi("TestUSD").call("permit", OWNER.address, world.deployment.escrow, *arguments)
    await (await world.sender(STRANGER)).send(world.deployment.token, call)
    await world.escrow.deposit_with_permit(owner, KEY.address, permit)
    assert (await world.escrow.purse(KEY.address)).free == DOLLAR


async def test_a_permit_fills_only_its_owners_purse(world: World) -> None:
    """A stranger with somebody's permit can fill neither that person's purse nor its own."""
    await world.purse(KEY, OWNER, 0)
    stranger = await world.purse(STRANGER, STRANGER, 0)
    await world.give(OWNER.address, DOLLAR)
    permit = await world.escrow.token.permit(OWNER, world.deployment.escrow, Amount(DOLLAR), Seconds(FAR))
    with refused("NotOwner"):
        await world.escrow.deposit_with_permit(stranger, KEY.address, permit)
    with refused("ERC20InsufficientAllowance"):
        await world.escrow.deposit_with_permit(stranger, STRANGER.address, permit)


async def test_deposit_with_authorization(world: World) -> None:
    """An owner without gas signs and a stranger sends, once; the money cannot go to another purse."""
    await world.purse(KEY, OWNER, 0)
    stranger = await world.purse(STRANGER, STRANGER, 0)
    await world.give(OWNER.address, 2 * DOLLAR)
    escrow, token = world.escrow, world.escrow.token
    signed = await token.authorize(OWNER, world.deployment.escrow, KEY.address, Amount(DOLLAR), SALT, valid_before=Seconds(FAR))
    with refused("BadAuthorization"):
        await escrow.deposit_with_authorization(stranger, STRANGER.address, signed)
    await escrow.deposit_with_authorization(stranger, KEY.address, signed)
    assert (await escrow.purse(KEY.address)).free == DOLLAR
    with refused("AuthorizationAlreadyUsed"):
        await escrow.deposit_with_authorization(stranger, KEY.address, signed)
    with refused("UnknownPurse"):
        await escrow.deposit_with_authorization(stranger, PROVIDER.address, signed)


async def test_an_authorization_does_not_leave_its_window(world: World) -> None:
    """After valid_before an authorization moves nothing, and a zero amount never moves."""
    await world.purse(KEY, OWNER, 0)
    await world.give(OWNER.address, DOLLAR)
    sender, to = await world.sender(STRANGER), world.deployment.escrow
    now = await world.rpc.timestamp()
    expired = await world.escrow.token.authorize(OWNER, to, KEY.address, Amount(1), SALT, valid_before=Seconds(now - 1))
    with refused("OutsideValidity"):
        await world.escrow.deposit_with_authorization(sender, KEY.address, expired)
    nothing = await world.escrow.token.authorize(OWNER, to, KEY.address, Amount(0), SALT, valid_before=Seconds(FAR))
    with refused("ZeroAmount"):
        await world.escrow.deposit_with_authorization(sender, KEY.address, nothing)


async def test_thaw_and_withdraw(world: World) -> None:
    """Only the announced free money leaves, after its wait."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    result = await world.escrow.thaw(owner, KEY.address, Amount(4 * DOLLAR))
    (started,) = result.of(ThawStarted)
    purse = await world.escrow.purse(KEY.address)
    assert (purse.free, purse.thawing, purse.thaw_at) == (10 * DOLLAR, 4 * DOLLAR, started.thaw_at)
    with refused("TooEarly", readyAt=started.thaw_at):
        await world.escrow.withdraw(owner, KEY.address)
    await world.advance(RULES.thaw)
    result = await world.escrow.withdraw(owner, KEY.address)
    assert [(e.owner, e.amount) for e in result.of(Withdrawn)] == [(OWNER.address, 4 * DOLLAR)]
    assert await world.escrow.purse(KEY.address) == Purse(OWNER.address, Amount(6 * DOLLAR), Amount(0), Seconds(0))
    assert await world.escrow.token.balance_of(OWNER.address) == 4 * DOLLAR
    with refused("NotThawing", key=KEY.address):
        await world.escrow.withdraw(owner, KEY.address)


async def test_a_new_thaw_starts_the_wait_again(world: World) -> None:
    """Announcing more starts a new wait and cannot use an older announcement."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.thaw(owner, KEY.address, Amount(DOLLAR))
    await world.advance(RULES.thaw)
    await world.escrow.thaw(owner, KEY.address, Amount(10 * DOLLAR))
    with refused("TooEarly"):
        await world.escrow.withdraw(owner, KEY.address)


async def test_a_deposit_during_a_thaw_needs_its_own_thaw(world: World) -> None:
    """A deposit made during a thaw needs a thaw of its own."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.thaw(owner, KEY.address, Amount(10 * DOLLAR))
    provider = await world.sender(PROVIDER)
    await world.settle(provider, world.row(KEY, PROVIDER.address, 8 * DOLLAR))
    await world.give(OWNER.address, 5 * DOLLAR)
    await world.escrow.token.approve(owner, world.deployment.escrow, Amount(5 * DOLLAR))
    await world.escrow.deposit(owner, KEY.address, Amount(5 * DOLLAR))
    await world.advance(RULES.thaw)
    (left,) = (await world.escrow.withdraw(owner, KEY.address)).of(Withdrawn)
    assert left.amount == 2 * DOLLAR
    assert (await world.escrow.purse(KEY.address)).free == 5 * DOLLAR


async def test_a_thaw_can_be_called_off(world: World) -> None:
    """After cancelling, nothing can be withdrawn or cancelled."""
    owner = await world.purse(KEY, OWNER, DOLLAR)
    await world.escrow.thaw(owner, KEY.address, Amount(DOLLAR))
    await world.escrow.cancel_thaw(owner, KEY.address)
    await world.advance(RULES.thaw)
    with refused("NotThawing"):
        await world.escrow.withdraw(owner, KEY.address)
    with refused("NotThawing"):
        await world.escrow.cancel_thaw(owner, KEY.address)


async def test_only_the_owner_takes_money_out(world: World) -> None:
    """Neither the hot key nor a stranger can thaw, cancel or withdraw, and nobody can thaw more than there is."""
    owner = await world.purse(KEY, OWNER, DOLLAR)
    for thief in (KEY, STRANGER):
        sender = await world.sender(thief)
        for attempt in (
            world.escrow.thaw(sender, KEY.address, Amount(1)),
            world.escrow.cancel_thaw(sender, KEY.address),
            world.escrow.withdraw(sender, KEY.address),
        ):
            with refused("NotOwner", caller=thief.address):
                await attempt
    with refused("InsufficientFree", available=DOLLAR, wanted=DOLLAR + 1):
        await world.escrow.thaw(owner, KEY.address, Amount(DOLLAR + 1))
    with refused("ZeroAmount"):
        await world.escrow.thaw(owner, KEY.address, Amount(0))
    with refused("UnknownPurse"):
        await world.escrow.thaw(owner, Address("0x" + "11" * 20), Amount(1))


async def test_the_nonce_of_an_authorization_names_the_purse(world: World) -> None:
    """Python and the contract derive the same nonce."""
    (nonce,) = await world.escrow.read("authorizationNonce", KEY.address, SALT)
    assert nonce == keccak(bytes(12) + bytes.fromhex(KEY.address[2:]) + SALT)
