"""Signing in and the account's page in a real browser: with a wallet there, by a link, by keyboard, at two widths."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from typing import Literal

import httpx
import pytest

from coordinator.ports import Settlement
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import Amount
from tests.coordinator.harness import PAYER, World, make_submission, person
from tests.coordinator.live_server import Served, served
from tests.coordinator.pages.test_market_pages import HOSTILE, _job
from tests.web.browser import NARROW, WIDE, browsing, look_at, needs_browser
from tests.web.browser_wallet import BrowserWallet, install
from tests.web.sign_in_site import signed

pytestmark = needs_browser


@pytest.fixture
async def at() -> AsyncIterator[Served]:
    """A market with jobs of PAYER, one of them live, one refused, and a settlement."""
    world = World()
    async with served(world) as market:
        await world.market.start()
        node = world.node("ann", model=HOSTILE[0])
        world.funds.free[PAYER.address] = Amount(10**9)
        await _job(world)
        market.store.settlements[PAYER.address, node.address] = Settlement(
            PAYER.address, node.address, Amount(15), "0x" + "12" * 32, 7
        )
        await world.started(node, terms={"max_output_tokens": 9})
        world.funds.free[PAYER.address] = Amount(0)
        assert (await market.post(make_submission(node.ask, terms={"max_output_tokens": 8}))).status_code == 402
        yield market


@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "dark"), (WIDE, "light")])
async def test_with_a_wallet(at: Served, width: int, scheme: Literal["light", "dark"]) -> None:
    """Of two wallets one is chosen; what it declines is said; what it signs names this site; then the account is shown."""
    mine, other = BrowserWallet(PAYER), BrowserWallet(person("other"), name="Another <wallet>")
    async with browsing(at.url, width=width, scheme=scheme) as page:
        await install(page, mine, other)
        await page.goto("/market/account")
        await page.wait_for_url("**/sign-in")
        await page.get_by_role("button", name="Another <wallet>").wait_for()
        await look_at(page, "sign-in")
        mine.refuses = 4001
        await page.get_by_role("button", name="Test wallet").click()
        await page.get_by_text("You declined in the wallet").wait_for()
        mine.refuses = 0
        await page.get_by_role("button", name="Test wallet").focus()
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/market/account")
        await page.get_by_text(checksum(PAYER.address), exact=True).wait_for()
        assert mine.texts[0].startswith(at.url.removeprefix("http://"))
        assert not other.asked
        text = await page.inner_text("main")
        assert ("has no purse" in text or "insufficient_funds" in text, "0.000015" in text) == (True, True)
        await look_at(page, "account")
        assert await page.evaluate("document.cookie") == "", "no script reads the session"
        await page.get_by_role("button", name="Sign out").click()
        await page.wait_for_url("**/sign-in")
        await page.goto("/market/account")
        await page.wait_for_url("**/sign-in")


async def test_by_a_link(at: Served) -> None:
    """The link of `tally sign-in` shows whose account it is, and signs in after a click, once."""
    async with httpx.AsyncClient(base_url=at.url, trust_env=False) as http:
        message = (await http.post("/sign-in/challenge", json={"account": PAYER.address})).json()["message"]
    code = base64.urlsafe_b64encode(json.dumps(signed(message, PAYER)).encode()).decode().rstrip("=")
    async with browsing(at.url) as page:
        await page.goto(f"/sign-in#{code}")
        button = page.get_by_role("button", name="Sign in as this account")
        await button.wait_for()
        assert checksum(PAYER.address) in await page.inner_text("#linked")
        assert "#" not in page.url, "the link does not stay in the history"
        await look_at(page, "sign-in-link")
        await button.click()
        await page.wait_for_url("**/market/account")


async def test_without_a_wallet(at: Served) -> None:
    """The page says that there is none, and which command signs instead."""
    async with browsing(at.url) as page:
        await page.goto("/sign-in#rubbish")
        await page.get_by_text("This browser has no wallet.").wait_for()
        assert f"tally sign-in {at.url}" in await page.inner_text("main")
        assert not await page.is_visible("#linked")
