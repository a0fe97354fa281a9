"""A client's automatic actions on a real chain: it reads stakes, tops up reservations on demand, and finds idle ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from tallystick.chain.rpc import Rpc
from tallystick.client.config import ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.ledger.accounts import Account
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.orders.tab import Tab
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Refusal, Unavailable
from tallystick.protocol.types import Address, Amount
from tallystick.runtime.serving import serving
from tests.builders import build_terms
from tests.chain.conftest import chain_url
from tests.chain.harness import DOLLAR, World, person
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session

__all__ = ["chain_url"]
KEY, OWNER, PROVIDER, OTHER = person("key"), person("owner"), person("provider"), person("other")


@dataclass
class Harness:
    """A client of a real chain, whose purse another wallet owns."""

    world: World
    onchain: PayerEscrow
    config: ClientConfig

    def refused(self, cap: int, provider: Signer = PROVIDER) -> PlacedOrder:
        """An order whose provider wants a larger reservation."""
        order = self.world.order(KEY, provider.address, 5 * DOLLAR).verify(self.world.domain)
        return PlacedOrder(order, build_terms(max_cost=Amount(cap)))

    async def top_up(self, cap: int, tab: Tab = Tab(), *others: Account) -> bool:  # noqa: B008 - frozen
        """Requests a larger reservation, some time later."""
        self.onchain._clock = lambda: float(self.world.seq * 10)
        return await self.onchain.top_up(self.refused(cap), tab, others, 10**18 + self.world.seq)

    async def reserved(self, provider: Signer = PROVIDER) -> int:
        """Returns the reservation on chain."""
        return (await self.world.escrow.tab(KEY.address, provider.address)).reserved


@pytest.fixture
async def harness(chain_url: str, tmp_path: Path) -> AsyncIterator[Harness]:
    """A purse with ten dollars, of which at most four may be reserved."""
    rpc = Rpc(chain_url)
    world = await World.make(rpc)
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    world.deployment.save(tmp_path / "deployment.json")
    config = ClientConfig(
        deployment=tmp_path / "deployment.json",
        ledger_file=tmp_path / "client.db",
        reserve_target=Amount(DOLLAR),
        top_up_total=Amount(4 * DOLLAR),
        idle_reserve_days=7,
    )
    onchain = PayerEscrow.of(config, KEY)
    assert onchain is not None
    yield Harness(world, onchain, config)
    await onchain.close()
    await rpc.close()


def _account(provider: Signer, used_at: int = 0, in_flight: int = 0) -> Account:
    return Account(provider.address, Amount(0), Amount(in_flight), used_at, "")


async def test_top_up_with_the_key_alone(harness: Harness) -> None:
    """A top-up covers the tab's debt, the job's possible cost and the receipts' earnings; no ceiling is raised."""
    assert not await harness.top_up(DOLLAR), "the key has no coins for gas yet"
    await harness.world.sender(KEY)
    assert await harness.top_up(DOLLAR // 8)
    assert await harness.reserved() == DOLLAR // 2, "four times what the job may cost, before any receipt"
    used = Tab(accepted=Amount(DOLLAR // 4), total=Amount(DOLLAR // 4), ceiling=Amount(DOLLAR // 4))
    assert await harness.top_up(DOLLAR // 8, used)
    assert await harness.reserved() == DOLLAR, "as far as reserve_target goes"
    owing = Tab(accepted=Amount(DOLLAR), total=Amount(DOLLAR), open_caps=Amount(DOLLAR), ceiling=Amount(2 * DOLLAR))
    assert await harness.top_up(DOLLAR, owing)
    assert await harness.reserved() == 2 * DOLLAR
    assert not await harness.top_up(DOLLAR, owing), "it is reserved already: the provider wants something else"
    assert (await harness.world.escrow.purse(KEY.address)).free == 8 * DOLLAR


async def test_never_beyond_the_limits(harness: Harness) -> None:
    """Top-ups stay within top_up_total and the free balance; the log says what to do by hand."""
    await harness.world.sender(KEY)
    owner = await harness.world.sender(OWNER)
    await harness.world.escrow.reserve(owner, KEY.address, OTHER.address, Amount(2 * DOLLAR))
    with capture_logs() as logs:
        assert not await harness.top_up(3 * DOLLAR, Tab(), _account(OTHER))
    assert "top_up_total allows 2 more" in logs[0]["reason"]
    assert logs[0]["hint"] == f"tally reserve {PROVIDER.address} 3"
    assert await harness.top_up(2 * DOLLAR, Tab(), _account(OTHER))
    await harness.world.escrow.thaw(owner, KEY.address, Amount(6 * DOLLAR))
    assert not await harness.top_up(3 * DOLLAR)
    assert await harness.reserved() == 2 * DOLLAR


async def test_concurrent_top_ups(harness: Harness) -> None:
    """Requests that are refused together share one top-up; concurrent processes together keep to the limit."""
    await harness.world.sender(KEY)
    assert await asyncio.gather(*(harness.top_up(DOLLAR) for _ in range(3))) == [True, True, True]
    assert await harness.reserved() == DOLLAR
    other = PayerEscrow.of(harness.config, KEY)
    assert other is not None
    accounts = [_account(PROVIDER), _account(OTHER)]
    for_other = harness.refused(2 * DOLLAR, OTHER)
    more = Tab(accepted=Amount(2 * DOLLAR), total=Amount(2 * DOLLAR))
    harness.onchain._top_ups.clear()
    done = await asyncio.gather(
        harness.onchain.top_up(harness.refused(DOLLAR), more, accounts, 10**18),
        other.top_up(for_other, Tab(), accounts, 10**18),
    )
    assert sorted(done) == [False, True]
    assert await harness.reserved() + await harness.reserved(OTHER) <= 4 * DOLLAR
    await other.close()


async def test_consecutive_requests(harness: Harness) -> None:
    """A reservation that covers the next request is not raised again; one that does not is raised at once."""
    await harness.world.sender(KEY)
    refused = harness.refused(DOLLAR // 2)
    assert await harness.onchain.top_up(refused, Tab(), [], 10**18)
    assert await harness.reserved() == DOLLAR
    owing = Tab(accepted=Amount(DOLLAR // 2), total=Amount(DOLLAR // 2), ceiling=Amount(DOLLAR))
    assert await harness.onchain.top_up(refused, owing, [], 10**18 + 1)
    assert await harness.reserved() == DOLLAR
    owing = Tab(accepted=Amount(DOLLAR), total=Amount(DOLLAR), ceiling=Amount(DOLLAR))
    assert await harness.onchain.top_up(refused, owing, [], 10**18 + 2)
    assert await harness.reserved() == DOLLAR + DOLLAR // 2
    assert not await harness.onchain.top_up(harness.refused(4 * DOLLAR), owing, [], 10**18 + 3)


async def test_stakes(harness: Harness) -> None:
    """Stakes are read from the chain."""
    await harness.world.stake(PROVIDER, 3 * DOLLAR)
    assert [await harness.onchain.stake(signer.address) for signer in (PROVIDER, OTHER, PROVIDER)] == [3 * DOLLAR, 0, 3 * DOLLAR]


async def test_idle_reservations(harness: Harness) -> None:
    """Reservations of providers unused for a while are listed with the command that releases them, except those with running
    jobs.
    """
    owner, now = await harness.world.sender(OWNER), 100 * 86_400
    for provider in (PROVIDER, OTHER):
        await harness.world.escrow.reserve(owner, KEY.address, provider.address, Amount(DOLLAR))
    old, fresh = 92 * 86_400, 94 * 86_400
    accounts = [_account(PROVIDER, old), _account(OTHER, fresh), _account(person("third"), old)]
    assert await harness.onchain.idle(accounts, now) == [(accounts[0], DOLLAR)]
    assert await harness.onchain.idle([_account(PROVIDER, old, 5)], now) == []
    with capture_logs() as logs:
        await harness.onchain.warn_idle(accounts, now)
    assert [event["hint"] for event in logs] == [f"tally release {PROVIDER.address}"]


async def test_no_chain_is_no_obstacle(tmp_path: Path, harness: Harness) -> None:
    """Without a deployment file nothing is done; if the chain does not answer, nothing is topped up."""
    assert PayerEscrow.of(ClientConfig(), KEY) is None
    with pytest.raises(BadMessage, match="deployment file"):
        PayerEscrow.of(ClientConfig(deployment=tmp_path / "none.json"), KEY)
    away = PayerEscrow.of(replace(harness.config, rpc="http://127.0.0.1:9"), KEY)
    assert away is not None
    assert not await away.top_up(harness.refused(1), Tab(), [], 10**18)
    with pytest.raises(Unavailable):
        await away.warn_idle([_account(PROVIDER)], 10**9)
    await away.close()


async def test_a_refused_request_is_placed_again(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's caller does not notice a top-up; if nothing more may be reserved, it is told at once."""
    asked: list[Any] = []

    async def unsecured(session: Session) -> None:
        await session.match()
        if len(asked) < 1 or fake.script is never:
            await session.void()
            await session.fail(Refusal(Code.UNSECURED, "too little is reserved"))
        else:
            await honest(session)

    async def never(session: Session) -> None:
        await unsecured(session)

    async def honest(session: Session) -> None:
        await session.answer()
        await session.chunk(b'{"choices": []}', last=True)
        await session.finish()

    async def top_up(_upkeep: Maintenance, job: Any) -> bool:
        asked.append(job.candidates[0].provider)
        return fake.script is not never

    monkeypatch.setattr(Maintenance, "top_up", top_up)
    fake.script = unsecured
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http,
    ):
        assert (await http.post(CHAT, json=BODY)).status_code == 200
        assert asked == [fake.providers[0].address]
        fake.script = never
        answer = await http.post(CHAT, json=BODY)
        assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == (402, "unsecured")
        assert len(fake.sessions) == 3


async def test_a_client_looks_for_money_that_leaves(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A running client compares its debts with the purse by itself, whenever it checks payments."""
    looked = asyncio.Event()

    class Watching(PayerEscrow):
        async def settled(self, provider: Address) -> Amount:
            """See PayerEscrow."""
            return Amount(0)

        async def warn_leaving(self, accounts: Sequence[Account]) -> None:
            """See PayerEscrow."""
            if accounts:
                looked.set()

    async with Market(fake.url, wallet, config) as market:
        async with await market.submit(CHAT, BODY) as job:
            await job.result()
        market._reconciler.recovery = replace(market._reconciler.recovery, escrow=Watching.__new__(Watching))
        market._reconciler._payments_checked_at = float("-inf")
        market._reconciler.start()
        market._reconciler.wake()
        async with asyncio.timeout(60):
            await looked.wait()
