from __future__ import annotations

from tallystick.chain.claims import ClaimBatch
from tallystick.chain.events import Settled
from tests.chain.world import DOLLAR, World, person


async def test_life(world: World) -> None:
    """A payer deposits, a provider collects and cashes out."""
    key, owner, provider = person("key"), person("owner"), person("provider")
    await world.purse(key, owner, 100 * DOLLAR)
    sender = await world.sender(provider)
    result = await world.escrow.settle(sender, [ClaimBatch(provider.address, (world.row(key, provider.address, 30 * DOLLAR),))])
    (paid,) = result.of(Settled)
    assert (paid.paid, paid.settled, paid.fee) == (30 * DOLLAR, 30 * DOLLAR, 0)
    await world.escrow.cash_out(sender, provider.address)
    assert await world.escrow.token.balance_of(provider.address) == 30 * DOLLAR
    assert (await world.escrow.purse(key.address)).free == 70 * DOLLAR
