"""The node's wallet page: for its own account, for browsers on this machine alone."""

from __future__ import annotations

from pathlib import Path

import httpx
from starlette.applications import Starlette

from node.pages.provider_pages import WALLET_PATH, ProviderPages
from node.storage.store import SqlStore
from tallystick.chain.rpc import Rpc
from tallystick.runtime.serving import serving
from tallystick.web.wallet_page import MEANING, Parties, WalletPage
from tests.chain.conftest import chain_url
from tests.chain.harness import World
from tests.node.harness import DOMAIN, PROVIDER

__all__ = ["chain_url"]


async def _ask(_query: str) -> object:
    return {}


async def test_for_the_nodes_account(chain_url: str, tmp_path: Path) -> None:
    """It is in the navigation, names the node's account, and answers no other site."""
    rpc = Rpc(chain_url)
    world = await World.make(rpc)
    store = SqlStore(f"sqlite:///{tmp_path}/node.db", PROVIDER.address, DOMAIN)
    await store.start()
    wallet = WalletPage(world.escrow, WALLET_PATH, Parties(account=PROVIDER.address))
    routes = ProviderPages(dict, store, least=lambda: 1, ask=_ask, wallet=wallet).routes()
    try:
        async with (
            serving(Starlette(routes=routes), "127.0.0.1", 0) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
        ):
            page = await http.get(WALLET_PATH)
            assert page.status_code == 200
            assert PROVIDER.address in page.text
            assert f'href="{WALLET_PATH}" aria-current="page"' in page.text
            assert f'href="{WALLET_PATH}"' in (await http.get("/money")).text
            meaning = f"{WALLET_PATH}/{MEANING}"
            assert (await http.get(meaning, params={"now": "1"})).json() == {}
            for path in (WALLET_PATH, meaning):
                assert (await http.get(path, headers={"origin": "https://evil.example"})).status_code == 403
    finally:
        await store.close()
        await rpc.close()
