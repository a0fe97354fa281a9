"""The wallet page in a real browser, with an injected wallet on a real chain: every operation, and each way it can fail."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from playwright.async_api import Page, expect
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.protocol.eip712 import Signer
from tallystick.protocol.messages import Bind
from tallystick.protocol.types import Address
from tallystick.runtime.serving import serving
from tallystick.web import static_files
from tallystick.web.rendering import Pages
from tallystick.web.static_files import STATIC_PATH, serve_static
from tallystick.web.wallet_page import MEANING, Parties, WalletPage
from tests.chain.harness import DOLLAR, RULES, World, person
from tests.web.browser import NARROW, TIMEOUT_MS, WIDE, browsing, look_at, needs_browser
from tests.web.injected_wallet import REJECTED, InjectedWallet, answers

pytestmark = needs_browser
PATH = "/wallet"
_LOADED = sum((Path(static_files.__file__).parent / "static" / name).stat().st_size for name in ("site.css", "wallet_page.js"))
"""Bytes of the files that the page loads."""


@dataclass
class Desk:
    """A page with an owner's wallet, and what tests do with it."""

    world: World
    page: Page
    wallet: InjectedWallet
    owner: Signer
    key: Signer

    async def open(self) -> None:
        """Loads the page."""
        answer = await self.page.goto(PATH)
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
        for name, value in ({"amount": amount} if amount else {} | fields).items():
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


async def test_a_purse_from_its_opening_to_its_end(either: World) -> None:
    """Open for another key, deposit by permit, thaw, withdraw after the wait: the contract holds what the page says."""
    key = person("hot key")
    async with desk(either, key=key) as at:
        await at.connect()
        await at.says("No purse was ever opened", "#purse-says")
        shown = await at.do("open")
        assert key.address.lower() in shown.lower()
        assert (await either.escrow.purse(key.address)).owner == at.owner.address
        shown = await at.do("deposit", "12.50")
        for text in ("EIP-2612", "12.5 dollars (12500000 base units)", either.deployment.escrow, "deadline", "nonce"):
            assert text.lower() in shown.lower()
        assert (await either.escrow.purse(key.address)).free == 12_500_000
        assert await either.escrow.token.allowance(at.owner.address, either.deployment.escrow) == 0
        assert at.wallet.asked.count("eth_signTypedData_v4") == 1
        await at.says("12.5 dollars is free", "#purse-says")
        await at.do("thaw", "2")
        await at.says("2 dollars is under thaw", "#purse-says")
        button = at.page.locator("form[data-call='withdraw'] button")
        assert await button.is_disabled()
        assert "Possible in" in await at.page.inner_text("form[data-call='withdraw'] .when")
        await either.advance(RULES.thaw + 1)
        await at.page.click("#key-form button")
        await at.do("withdraw")
        assert await either.escrow.token.balance_of(at.owner.address) == 89_500_000
        assert len(at.wallet.sent) == 4


async def test_declined(world: World) -> None:
    """Declining in the review, in the wallet's connection, at the permit and at the transaction moves nothing, and says so."""
    async with desk(world) as at:
        at.wallet.behaviours["eth_requestAccounts"] = answers(**REJECTED)
        await at.open()
        await at.page.click("#wallets button")
        await at.says("You declined in the wallet", "#connection")
        at.wallet.behaviours.clear()
        await at.connect()
        await at.start("open")
        await at.page.wait_for_selector("#review[open]")
        await at.page.keyboard.press("Escape")
        await at.says("Nothing was signed or sent")
        await at.idle()
        at.wallet.behaviours["eth_sendTransaction"] = answers(**REJECTED)
        await at.start("open")
        await at.agree()
        await at.says("You declined in the wallet")
        assert not at.wallet.sent


@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "dark"), (WIDE, "light")])
async def test_every_state(world: World, width: int, scheme: Literal["light", "dark"]) -> None:
    """No complaint of the browser, no violation by axe-core, nothing wider than the window: in each state, and in the review."""
    async with desk(world, key=person(f"hot {width}"), width=width, scheme=scheme) as at:
        answer = await at.page.goto(PATH)
        assert answer is not None
        assert len(await answer.body()) + _LOADED < 200_000
        await look_at(at.page, "wallet-choose")
        await at.connect()
        await look_at(at.page, "wallet-unopened")
        await at.do("open")
        await at.start("deposit", "12.50")
        await at.page.wait_for_selector("#review[open]")
        await look_at(at.page, "wallet-review")
        await at.agree()
        await at.says("Done.")
        await at.idle()
        await at.do("thaw", "2")
        await at.do("stake", "20")
        await at.do("unstake", "5")
        await at.page.fill("#provider", person("some provider").address)
        await at.page.click("#provider-form button")
        await at.do("reserve", "3")
        await look_at(at.page, "wallet-all")
        at.wallet.chain_id = 1
        await at.wallet.emit(at.page, "chainChanged", "0x1")
        await at.says("is on chain 1, but this market is on", "#connection")
        await look_at(at.page, "wallet-wrong-chain")


async def test_without_a_wallet(world: World) -> None:
    """A browser without a wallet is told what one is, and what to do without one."""
    async with desk(world, installed=False) as at:
        await at.open()
        await at.says("This browser has no wallet", "#connection")
        assert "tally deposit" in await at.page.inner_text("#no-wallet")
        await look_at(at.page, "wallet-none")
