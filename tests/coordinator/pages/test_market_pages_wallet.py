"""The coordinator's wallet page: public, for any purse and any account, since it has no secret."""

from __future__ import annotations

from coordinator.pages.market_pages import WALLET_PATH
from tallystick.chain.rpc import Rpc
from tallystick.web.wallet_page import MEANING, WalletPage
from tests.chain.conftest import chain_url
from tests.chain.harness import World
from tests.coordinator.live_server import served

__all__ = ["chain_url"]


async def test_for_everybody(chain_url: str) -> None:
    """It is in the navigation, names nobody, and has the contract of this market."""
    rpc = Rpc(chain_url)
    chain = await World.make(rpc)
    wallet = WalletPage(chain.escrow, WALLET_PATH)
    async with served(wallet=wallet) as market:
        http = market.http
        page = await http.get(WALLET_PATH)
        assert page.status_code == 200
        assert chain.deployment.escrow in page.text
        assert f'href="{WALLET_PATH}"' in (await http.get("/market")).text
        assert (await http.get(f"{WALLET_PATH}/{MEANING}", params={"now": "1"})).json() == {}
        assert (await http.get(f"{WALLET_PATH}/{MEANING}", params={"now": "x"})).status_code == 400
        assert WALLET_PATH not in (await http.get("/openapi.json")).text
    await rpc.close()
