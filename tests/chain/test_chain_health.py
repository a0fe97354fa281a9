"""The health of a chain's endpoint: another chain, an old block, a missing contract, and coins for gas."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tallystick.chain.chain_health import (
    FUTURE_BLOCK_SECONDS,
    OLD_BLOCK_SECONDS,
    RESERVE_SETTLEMENTS,
    SETTLEMENT_GAS,
    STALE_BLOCK_SECONDS,
    ChainHealth,
)
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.rpc import Rpc, Sender
from tallystick.protocol.errors import TallyError
from tallystick.protocol.health import Health
from tests.chain.faulty_proxy import Fault, Proxy
from tests.chain.harness import World, person

NOBODY = person("health: a wallet without coins").address
RICH = dev_accounts()[0]


@pytest.fixture
async def own(world: World) -> AsyncIterator[Rpc]:
    """An endpoint of the check alone."""
    rpc = Rpc(world.rpc.url, attempts=1)
    yield rpc
    await rpc.close()


async def test_all_is_well(world: World, own: Rpc) -> None:
    """A chain with the contract and a funded account passes in each part, and shows what was measured."""
    results = await ChainHealth(own, world.deployment, RICH.address).check()
    assert {name: result.status for name, result in results.items()} == dict.fromkeys(
        ("chain", "block_age", "contract", "gas"), Health.PASS
    )
    assert results["chain"].value == 31337
    assert str(results["contract"].value).startswith("0x")


async def test_gas(world: World, own: Rpc) -> None:
    """Without coins for one settlement the check fails; with few it warns; both name the command that mends it."""
    account, funder = person(f"health {world.deployment.escrow}").address, Sender(world.rpc, RICH, poll=0.001)
    price = await own.quantity("eth_gasPrice")
    health = ChainHealth(own, world.deployment, account)
    gas = (await health.check())["gas"]
    assert (gas.status, gas.value, gas.remedy) == (Health.FAIL, "0", f"tally chain fund {account}")
    await funder.send(account, b"", value=6 * SETTLEMENT_GAS * price)
    gas = (await health.check())["gas"]
    assert (gas.status, gas.remedy) == (Health.WARN, f"tally chain fund {account}")
    assert "settlements" in gas.output
    await funder.send(account, b"", value=4 * RESERVE_SETTLEMENTS * SETTLEMENT_GAS * price)
    assert (await health.check())["gas"].status is Health.PASS
    elsewhere = ChainHealth(own, replace(world.deployment, chain_id=8453), NOBODY)._gas(0, price)
    assert elsewhere.remedy.startswith(f"send coins of chain 8453 to {NOBODY}")


@pytest.mark.parametrize(("payable", "status"), [(0, Health.FAIL), (1, Health.WARN), (99, Health.WARN), (100, Health.PASS)])
async def test_limits_of_gas(world: World, own: Rpc, payable: int, status: Health) -> None:
    """The number of settlements that the coins pay for decides."""
    coins = (payable + 1) * SETTLEMENT_GAS * 7 - 1
    assert ChainHealth(own, world.deployment, NOBODY)._gas(coins, 7).status is status


async def test_another_contract_or_none(world: World, own: Rpc) -> None:
    """An address without code fails; code that changes while the daemon runs fails too."""
    absent = ChainHealth(own, replace(world.deployment, escrow=NOBODY), NOBODY)
    contract = (await absent.check())["contract"]
    assert (contract.status, contract.output) == (Health.FAIL, f"there is no contract at {NOBODY}")
    health = ChainHealth(own, world.deployment, NOBODY)
    assert (await health.check())["contract"].status is Health.PASS
    health._deployment = replace(world.deployment, escrow=world.deployment.token)
    changed = (await health.check())["contract"]
    assert (changed.status, "changed" in changed.output) == (Health.FAIL, True)


@pytest.mark.parametrize(
    ("age", "status"),
    [
        (0, Health.PASS),
        (-20, Health.PASS),
        (OLD_BLOCK_SECONDS, Health.PASS),
        (OLD_BLOCK_SECONDS + 1, Health.WARN),
        (STALE_BLOCK_SECONDS, Health.WARN),
        (STALE_BLOCK_SECONDS + 1, Health.FAIL),
    ],
)
async def test_the_age_of_the_last_block(world: World, own: Rpc, age: int, status: Health) -> None:
    """An endpoint whose last block is old does not follow its chain. A local chain has no blocks without transactions."""
    block = await own.request("eth_getBlockByNumber", "latest", False)
    time = int(block["timestamp"], 16) + age
    result = ChainHealth(own, replace(world.deployment, chain_id=8453), NOBODY, lambda: time)._block_age(block)["block_age"]
    assert (result.status, result.value) == (status, max(0, age))
    assert ChainHealth(own, world.deployment, NOBODY, lambda: time)._block_age(block)["block_age"].status is Health.PASS


@pytest.mark.parametrize(("behind", "warns"), [(FUTURE_BLOCK_SECONDS, False), (FUTURE_BLOCK_SECONDS + 1, True)])
async def test_a_clock_behind_the_chain(world: World, own: Rpc, behind: int, warns: bool) -> None:
    """A last block of the future shows that this machine's clock is behind; a local chain may be moved ahead on purpose."""
    block = await own.request("eth_getBlockByNumber", "latest", False)
    time = int(block["timestamp"], 16) - behind
    results = ChainHealth(own, replace(world.deployment, chain_id=8453), NOBODY, lambda: time)._block_age(block)
    assert results["block_age"].status is Health.PASS
    assert ("clock" in results) is warns
    if warns:
        assert (results["clock"].status, results["clock"].value) == (Health.WARN, behind)
        assert "timedatectl" in results["clock"].remedy
    assert "clock" not in ChainHealth(own, world.deployment, NOBODY, lambda: time)._block_age(block)


async def test_another_chain(world: World, own: Rpc) -> None:
    """An endpoint of another chain fails by both ids, and nothing else is said about it."""
    results = await ChainHealth(own, replace(world.deployment, chain_id=1), NOBODY).check()
    assert list(results) == ["chain"]
    assert results["chain"].status is Health.FAIL
    assert "chain 31337" in results["chain"].output
    assert "chain 1" in results["chain"].output


@pytest.mark.parametrize("method", ["eth_chainId", "eth_getBlockByNumber", "eth_getBalance", "eth_gasPrice", "eth_getCode"])
async def test_an_endpoint_that_fails(world: World, proxy: Proxy, method: str) -> None:
    """If one of the methods fails, the check raises, and the monitor reports the chain as failed."""
    rpc = Rpc(proxy.url, attempts=1)
    proxy.plan(method, *[Fault.NO_METHOD] * 5)
    with pytest.raises(TallyError):
        await ChainHealth(rpc, world.deployment, NOBODY).check()
    await rpc.close()
