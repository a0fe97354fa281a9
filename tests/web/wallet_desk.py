"""A served wallet page for one purse, and a browser with an injected wallet before it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from playwright.async_api import Page, expect
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address
from tallystick.runtime.serving import serving
from tallystick.web.rendering import Pages
from tallystick.web.static_files import STATIC_PATH, serve_static
from tallystick.web.wallet_page import MEANING, Parties, WalletPage
from tests.chain.harness import DOLLAR, World, person
from tests.web.browser import TIMEOUT_MS, WIDE, browsing
from tests.web.injected_wallet import InjectedWallet

PATH = "/wallet"


@dataclass
class Desk:
    """A page with an owner's wallet, and what tests do with it."""

    world: World
    page: Page
    wallet: InjectedWallet
    owner: Signer
    key: Signer
    path: str = PATH

    async def open(self) -> None:
        """Loads the page."""
        answer = await self.page.goto(self.path)
        assert answer is not None
        assert answer.ok

    async def connect(self) -> None:
        """Loads the page and chooses the wallet."""
        await self.open()
        await self.page.click(f"#wallets button:has-text('{self.wallet.name}')")
        await self.page.wait_for_selector("#state:not([hidden])")

    async def start(self, call: str, amount: str = "", **fields: str) -> None:
        """Fills a form and submits it."""
        form = f"form[data-call='{call}']:not([hidden])"
        await self.page.wait_for_selector(f"{form} button:enabled")
        for name, value in (({"amount": amount} if amount else {}) | fields).items():
            await self.page.fill(f"{form} [name='{name}']", value)
        await self.page.click(f"{form} button")

    async def agree(self) -> str:
        """Agrees in the review. Returns what it showed."""
        await self.page.wait_for_selector("#review[open]")
        shown = await self.page.inner_text("#review")
        await self.page.click("#review button[value='agreed']")
        return shown

    async def says(self, text: str, place: str = "#progress") -> str:
        """Waits until the page says something. Returns all of it."""
        await expect(self.page.locator(place)).to_contain_text(text, timeout=TIMEOUT_MS)
        return await self.page.inner_text(place)

    async def settled(self) -> str:
        """Waits until an operation has ended. Returns how."""
        await self.page.wait_for_selector("body[data-busy='false']")
        return await self.page.inner_text("#progress")

    async def idle(self) -> None:
        """Waits until nothing is under way."""
        await self.page.wait_for_selector("body:not([data-busy='true'])")

    async def do(self, call: str, amount: str = "") -> str:
        """Does an operation to its end. Returns what the review showed."""
        await self.start(call, amount)
        shown = await self.agree()
        await self.says("Done.")
        await self.idle()
        return shown


@asynccontextmanager
async def desk(
    world: World,
    *,
    key: Signer | None = None,
    width: int = WIDE,
    scheme: Literal["light", "dark"] = "light",
    money: int = 100,
    installed: bool = True,
) -> AsyncIterator[Desk]:
    """A served page for the purse of a key, with a wallet whose owner has money."""
    owner = person(f"owner {id(world)}")
    purse_key = key or owner
    await world.sender(owner)
    await world.give(owner.address, money * DOLLAR)

    async def bind(request: Request) -> Response:
        signed = purse_key.sign(Bind(key=purse_key.address, owner=Address((await request.json())["owner"].lower())), world.domain)
        return JSONResponse({"signature": "0x" + signed.signature.hex()})

    parties = Parties() if key is None else Parties(key=key.address, bind=f"{PATH}/bind")
    served = WalletPage(world.escrow, PATH, parties)
    pages = Pages(Path(__file__).parent, product="Test", sections={PATH: "Wallet"})

    routes = [
        Route(PATH, served.shown(pages)),
        Route(f"{PATH}/{MEANING}", served.meaning),
        Route(f"{PATH}/bind", bind, methods=["POST"]),
        Route(f"{STATIC_PATH}/{{name}}", serve_static),
    ]
    wallet = InjectedWallet(world.rpc, [owner])
    async with (
        serving(Starlette(routes=routes), "127.0.0.1", 0) as port,
        browsing(f"http://127.0.0.1:{port}", width=width, scheme=scheme) as page,
    ):
        if installed:
            await wallet.install(page)
        yield Desk(world, page, wallet, owner, purse_key)
