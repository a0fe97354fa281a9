from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from node.chain.payouts import Payouts, check_policy
from node.domain.payout_policy import PayoutPolicy
from node.ports import PayoutRecord
from tallystick.chain.rpc import Rpc, Sender
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Amount
from tests.chain.conftest import chain_url
from tests.chain.harness import DOLLAR, World, person

__all__ = ["chain_url"]
NODE, KEY = person("paid node"), person("paying key")
COLD = person("cold wallet").address
POLICY = PayoutPolicy(min_amount=Amount(2 * DOLLAR))


class MemoryPayoutStore:
    """A store that keeps payouts and gas."""

    def __init__(self) -> None:
        self.payouts: list[PayoutRecord] = []
        self.gas: list[str] = []

    async def record_payout(self, payout: PayoutRecord) -> None:
        """See PayoutStore."""
        self.payouts.append(payout)

    async def record_gas(self, tx: str, at: int, gas_used: int, fee: int) -> None:
        """See PayoutStore."""
        self.gas.append(tx)


class Bench:
    """A provider with credit on chain, and its automatic payout."""

    def __init__(self, world: World) -> None:
        self.world, self.store, self.collected = world, MemoryPayoutStore(), 0
        self.sender = Sender(world.rpc, NODE, poll=0.001)
        self.payouts = Payouts(world.escrow, self.sender, self.store, POLICY, now=lambda: 7)

    async def earn(self, dollars: int) -> None:
        """Settles more of a payer's tab."""
        self.collected += dollars * DOLLAR
        row = self.world.row(KEY, NODE.address, self.collected)
        await self.world.escrow.settle(self.world.deployer, [self.world.claim(NODE, row)])

    async def fund(self) -> None:
        """Gives the provider coins for gas."""
        await self.world.deployer.send(NODE.address, b"", value=10**18)

    async def nonce(self) -> int:
        """How many transactions the provider sent."""
        return await self.world.rpc.quantity("eth_getTransactionCount", NODE.address, "latest")

    async def held(self, address: str) -> int:
        """The dollars of an account, in base units."""
        return int(await self.world.escrow.token.balance_of(address))  # type: ignore[arg-type]  # an address


@pytest.fixture
async def bench(chain_url: str) -> AsyncIterator[Bench]:
    """A market with a payer that has money."""
    rpc = Rpc(chain_url)
    world = await World.make(rpc)
    await world.purse(KEY, KEY, 100 * DOLLAR)
    yield Bench(world)
    await rpc.close()


async def test_credit_is_paid_to_the_cold_wallet(bench: Bench) -> None:
    """From the set amount on, the credit goes to the address of the config, which is registered once; then it waits for more."""
    await bench.fund()
    bench.payouts.policy = replace(POLICY, address=COLD)
    before, sent = await bench.held(COLD), await bench.nonce()
    await bench.earn(1)
    await bench.payouts.check()
    assert bench.payouts.waiting_for == "1 of 2 dollars are credited"
    assert await bench.nonce() == sent, "nothing is sent for nothing"
    await bench.earn(1)
    await bench.payouts.check()
    assert await bench.held(COLD) == before + 2 * DOLLAR
    (paid,) = bench.store.payouts
    assert (paid.amount, paid.address, paid.at) == (2 * DOLLAR, COLD, 7)
    assert len(bench.store.gas) == 2, "one to register the address, one to pay"
    assert bench.payouts.status() == {
        "minAmount": str(2 * DOLLAR),
        "address": COLD,
        "waitingFor": "",
        "last": {"tx": paid.tx, "at": 7, "amount": str(2 * DOLLAR), "address": COLD},
    }
    await bench.earn(3)
    await bench.payouts.check()
    assert (await bench.held(COLD), len(bench.store.gas)) == (before + 5 * DOLLAR, 3)
    await bench.payouts.check()
    assert (bench.payouts.waiting_for, len(bench.store.gas)) == ("0 of 2 dollars are credited", 3)


async def test_no_payout_costs_more_than_its_share(bench: Bench) -> None:
    """If coins are dear, the payout waits and says what gas would cost; if they get cheaper, it is paid to the wallet itself."""
    await bench.fund()
    await bench.earn(2)
    sent = await bench.nonce()
    bench.payouts.policy = replace(POLICY, coin_price=Amount(10**15))
    await bench.payouts.check()
    assert "gas would cost" in bench.payouts.waiting_for
    assert await bench.nonce() == sent
    bench.payouts.policy = replace(POLICY, coin_price=Amount(1))
    before = await bench.held(NODE.address)
    await bench.payouts.check()
    assert await bench.held(NODE.address) == before + 2 * DOLLAR


async def test_a_wallet_without_coins_says_what_it_needs(bench: Bench) -> None:
    """Without coins nothing is sent, and the status says how many are missing; another's payout in between does no harm."""
    poor = person("a provider without coins")
    bench.payouts = Payouts(bench.world.escrow, Sender(bench.world.rpc, poor, poll=0.001), bench.store, POLICY)
    row = bench.world.row(KEY, poor.address, 2 * DOLLAR)
    await bench.world.escrow.settle(bench.world.deployer, [bench.world.claim(poor, row)])
    await bench.payouts.check()
    assert "too few coins" in bench.payouts.waiting_for
    await bench.world.escrow.cash_out(bench.world.deployer, poor.address)
    await bench.payouts.check()
    assert bench.payouts.waiting_for == "0 of 2 dollars are credited"


async def test_trouble_with_the_chain_delays_a_payout(bench: Bench) -> None:
    """An address that the contract refuses, or a chain that does not answer, is told and not fatal; off is off."""
    await bench.fund()
    await bench.earn(2)
    bench.payouts.policy = replace(POLICY, address=bench.world.deployment.escrow)
    await bench.payouts.check()
    assert "BadPayee" in bench.payouts.waiting_for
    bench.payouts.policy = PayoutPolicy()
    await bench.payouts.check()
    assert bench.payouts.status()["waitingFor"] == "not automatic"
    assert not bench.store.payouts


def test_coins_need_a_price() -> None:
    """Except on a local test chain, payouts need to know what gas costs."""
    check_policy(POLICY, 31_337)
    check_policy(PayoutPolicy(), 1)
    check_policy(replace(POLICY, coin_price=Amount(0)), 1)
    with pytest.raises(BadMessage, match=r"payout.coin_price: expected the price of one coin of chain 1"):
        check_policy(POLICY, 1)
