"""The gateway's wallet page over a real chain: its key signs for one owner, whose wallet opens and fills the purse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tallystick.chain.rpc import Rpc
from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.pages.payer_pages import BIND_PATH, MAX_FORM, WALLET_PATH
from tallystick.protocol.eip712 import Signed, Signer
from tallystick.protocol.messages import Bind
from tests.chain.conftest import chain_url
from tests.chain.harness import DOLLAR, World, person
from tests.client.fake_coordinator import FakeMarket
from tests.client.gateway.test_app import gateway
from tests.web.browser import browsing, needs_browser
from tests.web.injected_wallet import InjectedWallet
from tests.web.wallet_desk import Desk

__all__ = ["chain_url"]
OWNER = person("owner at the gateway")


@dataclass
class Site:
    """A gateway on a real chain."""

    world: World
    config: ClientConfig


@pytest.fixture
async def site(chain_url: str, tmp_path: Path, config: ClientConfig, fake: FakeMarket) -> AsyncIterator[Site]:
    """A gateway whose coordinator settles on the contract of its deployment file."""
    rpc = Rpc(chain_url)
    world = await World.make(rpc)
    world.deployment.save(tmp_path / "deployment.json")
    fake.info |= {"chainId": world.deployment.chain_id, "contract": world.deployment.escrow, "token": world.deployment.token}
    yield Site(world, replace(config, deployment=tmp_path / "deployment.json"))
    await rpc.close()


async def test_the_key_signs_for_an_owner(site: Site, fake: FakeMarket, wallet: Signer) -> None:
    """The signature binds this key to that owner in this contract alone, and the contract takes it."""
    async with gateway(fake, wallet, site.config) as url, httpx.AsyncClient(base_url=url) as http:
        answer = (await http.post(BIND_PATH, json={"owner": OWNER.address})).json()
        assert (answer["key"], answer["owner"]) == (wallet.address, OWNER.address)
        signature = bytes.fromhex(answer["signature"].removeprefix("0x"))
        bind = Bind(key=wallet.address, owner=OWNER.address)
        assert Signed(bind, signature).verify(site.world.domain).message == bind
        await site.world.escrow.open_purse(await site.world.sender(OWNER), wallet.address, OWNER.address, Signed(bind, signature))
        assert (await site.world.escrow.purse(wallet.address)).owner == OWNER.address


BAD_BODIES: list[Any] = [1, [], {}, {"owner": None}, {"owner": "0x12"}, {"owner": 5}, {"owner": ["0x" + "11" * 20]}]


async def test_what_is_not_signed(site: Site, fake: FakeMarket, wallet: Signer) -> None:
    """No signature for a body that is none, for other content types, for pages of other sites, or without a session."""
    good = {"owner": OWNER.address}
    config = replace(site.config, allow_origins=("https://chat.example",))
    async with gateway(fake, wallet, config) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        for body in BAD_BODIES:
            assert (await http.post(BIND_PATH, json=body)).status_code == 400
        for raw in (b"", b"null", b"{", b"\xff", b" " * (MAX_FORM + 1) + b"{}"):
            answer = await http.post(BIND_PATH, content=raw, headers={"content-type": "application/json"})
            assert answer.status_code == 400
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = await http.post(BIND_PATH, content=b"{}", headers={"content-type": kind})
            assert answer.status_code == 415
        for headers, status in (
            ({"origin": "https://chat.example"}, 403),  # it may spend, but not take the purse
            ({"origin": "https://evil.example"}, 401),
            ({"sec-fetch-site": "cross-site"}, 401),
            ({"host": "evil.example"}, 401),
            ({"origin": url}, 200),
        ):
            assert (await http.post(BIND_PATH, json=good, headers=headers)).status_code == status, headers
    keyed = replace(site.config, api_key="k" * 20, api_keys=(ApiKey(label="team", secret="t" * 20),))
    async with gateway(fake, wallet, keyed) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        assert (await http.post(BIND_PATH, json=good)).status_code == 401
        for key, status in (("t" * 20, 401), ("k" * 20, 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await http.post(BIND_PATH, json=good, headers=headers)).status_code == status
            assert (await http.get(WALLET_PATH, headers=headers)).status_code == status
        assert "Log in" in (await http.get(WALLET_PATH)).text


async def test_without_a_chain_and_with_another_contract(
    site: Site, fake: FakeMarket, wallet: Signer, config: ClientConfig
) -> None:
    """The page says why no money can be moved there."""
    async with gateway(fake, wallet, config) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        page = await http.get(WALLET_PATH)
        assert (page.status_code, "names no deployment file" in page.text) == (503, True)
        assert (await http.post(BIND_PATH, json={"owner": OWNER.address})).status_code == 503
        assert (await http.get(f"{WALLET_PATH}/meaning")).status_code == 503
    fake.info |= {"contract": "0x" + "ab" * 20}
    async with gateway(fake, wallet, site.config) as url, httpx.AsyncClient(base_url=url, timeout=60) as http:
        page = await http.get(WALLET_PATH)
        assert (page.status_code, "announces contract 0xabab" in page.text) == (503, True)


@needs_browser
async def test_a_purse_of_the_gateway(site: Site, fake: FakeMarket, wallet: Signer) -> None:
    """A browser wallet opens the purse of the gateway's key, which signs for that, and fills it."""
    world = site.world
    await world.sender(OWNER)
    await world.give(OWNER.address, 5 * DOLLAR)
    async with gateway(fake, wallet, site.config) as url, browsing(url) as page:
        injected = InjectedWallet(world.rpc, [OWNER])
        await injected.install(page)
        at = Desk(world, page, injected, OWNER, wallet, path=WALLET_PATH)
        await at.connect()
        await at.do("open")
        await at.do("deposit", "5")
        purse = await world.escrow.purse(wallet.address)
        assert (purse.owner, purse.free) == (OWNER.address, 5 * DOLLAR)
