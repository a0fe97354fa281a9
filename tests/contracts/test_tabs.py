from __future__ import annotations

from tallystick.chain.escrow import TabState
from tallystick.chain.events import Released, ReleaseStarted, Reserved
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.messages import Release
from tallystick.protocol.types import ZERO_ADDRESS, Amount, Seconds
from tests.chain.harness import DOLLAR, FAR, RULES, World, person, refused

KEY, OWNER, STRANGER, PROVIDER = person("key"), person("owner"), person("stranger"), person("provider")


async def _reserved(world: World) -> int:
    return (await world.escrow.tab(KEY.address, PROVIDER.address)).reserved


async def _free(world: World) -> int:
    return (await world.escrow.purse(KEY.address)).free


async def test_the_owner_reserves(world: World) -> None:
    """A reservation moves money from free to one provider's tab."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    result = await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(4 * DOLLAR))
    (event,) = result.of(Reserved)
    assert (event.payer, event.provider, event.amount, event.reserved) == (
        KEY.address,
        PROVIDER.address,
        4 * DOLLAR,
        4 * DOLLAR,
    )
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(DOLLAR))
    assert await world.escrow.tab(KEY.address, PROVIDER.address) == TabState(Amount(0), Amount(5 * DOLLAR), Seconds(0))
    assert await _free(world) == 5 * DOLLAR


async def test_a_reservation_needs_sense(world: World) -> None:
    """Zero, too large an amount, thawing money, no provider, oneself, an unknown purse and another's purse each have their
    error.
    """
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    reserve = world.escrow.reserve
    with refused("ZeroAmount"):
        await reserve(owner, KEY.address, PROVIDER.address, Amount(0))
    with refused("AmountTooLarge"):
        await reserve(owner, KEY.address, PROVIDER.address, Amount(1 << 96))
    with refused("ZeroAddress"):
        await reserve(owner, KEY.address, ZERO_ADDRESS, Amount(1))
    for oneself in (KEY.address, OWNER.address):
        with refused("SelfDealing", account=oneself):
            await reserve(owner, KEY.address, oneself, Amount(1))
    with refused("UnknownPurse"):
        await reserve(owner, STRANGER.address, PROVIDER.address, Amount(1))
    with refused("NotOwner"):
        await reserve(await world.sender(KEY), KEY.address, PROVIDER.address, Amount(1))
    await world.escrow.thaw(owner, KEY.address, Amount(7 * DOLLAR))
    with refused("InsufficientFree", available=3 * DOLLAR, wanted=3 * DOLLAR + 1):
        await reserve(owner, KEY.address, PROVIDER.address, Amount(3 * DOLLAR + 1))
    await reserve(owner, KEY.address, PROVIDER.address, Amount(3 * DOLLAR))


async def test_anyone_secures_an_order(world: World) -> None:
    """The order alone raises the reservation towards its target with the available free money, and pays nothing."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    stranger = await world.sender(STRANGER)
    order = world.order(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(4 * DOLLAR))
    await world.escrow.secure(stranger, order)
    assert (await _reserved(world), await _free(world)) == (4 * DOLLAR, 6 * DOLLAR)
    with refused("NothingToReserve"):
        await world.escrow.secure(stranger, order)
    await world.escrow.secure(stranger, world.order(KEY, PROVIDER.address, DOLLAR, reserve_target=Amount(90 * DOLLAR)))
    assert (await _reserved(world), await _free(world)) == (10 * DOLLAR, 0)
    assert (await world.escrow.tab(KEY.address, PROVIDER.address)).settled == 0


async def test_securing_needs_a_good_order(world: World) -> None:
    """Forged, malleable, late, self-dealing and unknown orders are refused by name."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    stranger, target = await world.sender(STRANGER), {"reserve_target": Amount(DOLLAR)}
    secure = world.escrow.secure
    good = world.order(KEY, PROVIDER.address, DOLLAR, **target)
    forged = Signed(good.message, STRANGER.sign_digest(good.message.digest(world.domain)))
    r, s, v = good.signature[:32], int.from_bytes(good.signature[32:64], "big"), good.signature[64]
    n = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    malleable = Signed(good.message, r + (n - s).to_bytes(32, "big") + bytes((55 - v,)))
    for bad in (forged, malleable, Signed(good.message, b""), Signed(good.message, bytes(65))):
        with refused("BadSignature", signer=KEY.address):
            await secure(stranger, bad)
    now = await world.rpc.timestamp()
    with refused("Expired", deadline=now - 1):
        await secure(stranger, world.order(KEY, PROVIDER.address, DOLLAR, deadline=now - 1, **target))
    with refused("SelfDealing"):
        await secure(stranger, world.order(KEY, KEY.address, DOLLAR, **target))
    with refused("UnknownPurse"):
        await secure(stranger, world.order(STRANGER, PROVIDER.address, DOLLAR, **target))


async def test_no_refill_during_a_thaw(world: World) -> None:
    """During a thaw, neither an order nor a settlement moves more of the thawing money into a reservation."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(2 * DOLLAR))
    await world.escrow.thaw(owner, KEY.address, Amount(1))
    target = {"reserve_target": Amount(5 * DOLLAR)}
    with refused("Thawing", key=KEY.address):
        await world.escrow.secure(await world.sender(STRANGER), world.order(KEY, PROVIDER.address, DOLLAR, **target))
    await world.settle(await world.sender(PROVIDER), world.row(KEY, PROVIDER.address, DOLLAR, **target))
    assert (await _reserved(world), await _free(world)) == (DOLLAR, 8 * DOLLAR)
    await world.escrow.cancel_thaw(owner, KEY.address)
    await world.settle(await world.sender(PROVIDER), world.row(KEY, PROVIDER.address, 2 * DOLLAR, **target))
    assert (await _reserved(world), await _free(world)) == (5 * DOLLAR, 3 * DOLLAR)


async def test_release_after_the_wait(world: World) -> None:
    """The owner announces, waits, and takes back what the provider has not collected."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(4 * DOLLAR))
    (started,) = (await world.escrow.release(owner, KEY.address, PROVIDER.address)).of(ReleaseStarted)
    assert (await world.escrow.tab(KEY.address, PROVIDER.address)).release_at == started.release_at
    with refused("TooEarly", readyAt=started.release_at):
        await world.escrow.finish_release(owner, KEY.address, PROVIDER.address)
    await world.settle(await world.sender(PROVIDER), world.row(KEY, PROVIDER.address, DOLLAR))
    await world.advance(RULES.release)
    (released,) = (await world.escrow.finish_release(owner, KEY.address, PROVIDER.address)).of(Released)
    assert (released.amount, released.reserved) == (3 * DOLLAR, 0)
    assert await world.escrow.tab(KEY.address, PROVIDER.address) == TabState(Amount(DOLLAR), Amount(0), Seconds(0))
    assert await _free(world) == 9 * DOLLAR


async def test_no_refill_during_a_release(world: World) -> None:
    """An earlier order cannot move money back into the reservation; the owner's own reserve ends the release."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(2 * DOLLAR))
    await world.escrow.release(owner, KEY.address, PROVIDER.address)
    target = {"reserve_target": Amount(5 * DOLLAR)}
    with refused("Releasing"):
        await world.escrow.secure(await world.sender(STRANGER), world.order(KEY, PROVIDER.address, DOLLAR, **target))
    await world.settle(await world.sender(PROVIDER), world.row(KEY, PROVIDER.address, DOLLAR, **target))
    assert (await _reserved(world), await _free(world)) == (DOLLAR, 8 * DOLLAR)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(DOLLAR))
    with refused("NotReleasing"):
        await world.escrow.finish_release(owner, KEY.address, PROVIDER.address)


async def test_a_release_needs_a_reservation_and_its_owner(world: World) -> None:
    """An empty reservation, a running release and another's purse are refused by name."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    with refused("NothingReserved"):
        await world.escrow.release(owner, KEY.address, PROVIDER.address)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(DOLLAR))
    with refused("NotReleasing"):
        await world.escrow.finish_release(owner, KEY.address, PROVIDER.address)
    await world.escrow.release(owner, KEY.address, PROVIDER.address)
    with refused("Releasing"):
        await world.escrow.release(owner, KEY.address, PROVIDER.address)
    stranger = await world.sender(STRANGER)
    with refused("NotOwner"):
        await world.escrow.release(stranger, KEY.address, PROVIDER.address)
    with refused("NotOwner"):
        await world.escrow.finish_release(stranger, KEY.address, PROVIDER.address)


async def test_the_provider_gives_back(world: World) -> None:
    """A provider can release its reservation at once, in part or whole, with its own transaction."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(4 * DOLLAR))
    provider = await world.sender(PROVIDER)
    await world.escrow.release(owner, KEY.address, PROVIDER.address)
    await world.escrow.give_back(provider, KEY.address, Amount(DOLLAR))
    tab = await world.escrow.tab(KEY.address, PROVIDER.address)
    assert (tab.reserved, tab.release_at > 0, await _free(world)) == (DOLLAR, True, 9 * DOLLAR)
    await world.escrow.give_back(provider, KEY.address, Amount(0))
    assert await world.escrow.tab(KEY.address, PROVIDER.address) == TabState(Amount(0), Amount(0), Seconds(0))
    with refused("NothingReserved"):
        await world.escrow.give_back(provider, KEY.address, Amount(0))
    with refused("NothingReserved"):
        await world.escrow.give_back(await world.sender(STRANGER), KEY.address, Amount(0))


async def test_a_signed_release(world: World) -> None:
    """With the provider's signature anyone can lower the reservation to the stated floor, until the deadline."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(4 * DOLLAR))
    stranger, now = await world.sender(STRANGER), await world.rpc.timestamp()

    def consent(deadline: int, floor: int = DOLLAR) -> Signed[Release]:
        text = Release(payer=KEY.address, provider=PROVIDER.address, floor=Amount(floor), deadline=deadline)
        return PROVIDER.sign(text, world.domain)

    with refused("Expired", deadline=now - 1):
        await world.escrow.give_back_signed(stranger, consent(now - 1))
    forged = Signed(consent(FAR).message, KEY.sign_digest(consent(FAR).message.digest(world.domain)))
    with refused("BadSignature", signer=PROVIDER.address):
        await world.escrow.give_back_signed(stranger, forged)
    await world.escrow.give_back_signed(stranger, consent(FAR))
    assert (await _reserved(world), await _free(world)) == (DOLLAR, 9 * DOLLAR)
    with refused("NothingReserved"):
        await world.escrow.give_back_signed(stranger, consent(FAR, 4 * DOLLAR))


async def test_a_cooperative_release_is_no_way_around_the_thaw(world: World) -> None:
    """Money that goes through a sybil's reservation back to the free balance still needs a thaw of its own."""
    owner = await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.escrow.thaw(owner, KEY.address, Amount(1))
    await world.advance(RULES.thaw)
    await world.escrow.reserve(owner, KEY.address, PROVIDER.address, Amount(9 * DOLLAR))
    await world.escrow.give_back(await world.sender(PROVIDER), KEY.address, Amount(0))
    await world.escrow.withdraw(owner, KEY.address)
    assert await world.escrow.token.balance_of(OWNER.address) == 1
