"""The gateway's pages in a real browser: accessible at two widths; a chat by keyboard, whose answers stay text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal, cast

import httpx
import pytest

from tallystick.chain.escrow import TabState
from tallystick.client.config import Budget, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Amount, Seconds
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, EVENTS, FakeMarket, Session, event
from tests.client.gateway.test_app import gateway
from tests.client.pages.test_payer_pages import FakeChain
from tests.client.receipts.test_proof import _altered
from tests.web.browser import NARROW, WIDE, browsing, look_at, needs_browser

pytestmark = needs_browser
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>alert(1)</script> **bold** \N{RIGHT-TO-LEFT OVERRIDE}abc"


@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "light"), (WIDE, "dark")])
async def test_every_page(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, width: int, scheme: Literal["light", "dark"]
) -> None:
    """No complaint of the browser, no violation by axe-core, nothing wider than the window."""
    budgets = (Budget(label="team", per_day=Amount(10)), Budget(per_day=Amount(1_000_000)))
    async with (
        gateway(fake, wallet, replace(config, budgets=budgets[1:])) as url,
        httpx.AsyncClient(base_url=url) as http,
        browsing(url, width=width, scheme=scheme) as page,
    ):
        jobs = [(await http.post(CHAT, json=BODY)).headers["x-tally-job"] for _ in range(3)]
        paths = {
            "spending": "/tally/spending?days=30",
            "jobs": "/tally/jobs",
            "job": f"/tally/pages/jobs/{jobs[0]}",
            "chat": "/tally/chat",
            "login": "/tally/login",
        }
        for name, path in paths.items():
            answer = await page.goto(path)
            assert answer is not None
            assert answer.ok
            assert len(await answer.body()) < 200_000
            await look_at(page, f"gateway-{name}")


async def test_a_chat(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A message by keyboard, its streamed answer as text, what it cost, and the job's page."""

    async def answers(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        for place in range(0, len(HOSTILE), 7):
            await session.chunk(event(HOSTILE[place : place + 7]))
        await session.chunk(b"data: [DONE]\n\n", last=True)
        await session.finish()

    fake.script = answers
    async with gateway(fake, wallet, config) as url, browsing(url) as page:
        await page.goto("/tally/chat")
        await page.locator("#prompt").focus()
        await page.keyboard.type("hello")
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".message.assistant small a")
        assert await page.locator(".message.assistant .text").inner_text() == HOSTILE
        assert await page.locator(".message.assistant img").count() == 0
        assert "taken" not in await page.title()
        assert "dollars" in await page.locator(".message.assistant small").inner_text()
        await look_at(page, "gateway-chat-answer")
        await page.click(".message.assistant small a")
        await page.wait_for_url("**/tally/pages/jobs/*")
        assert "Job" in await page.inner_text("h1")


async def test_a_proof_is_checked_in_the_browser(market: Market, fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A true proof file is valid; with any signed value changed, whichever, it is not, and the page says why."""
    async with await market.submit(CHAT, BODY, keep=True) as job:
        result = await job.result()
    assert result.proof is not None
    text = result.proof.dumps().decode()
    plaintexts = ("proof.request", "proof.response", "proof.evidence", "proof.commitmentKey")
    altered = [(name, raw) for name, raw in _altered(json.loads(text)) if not name.startswith(plaintexts)]
    assert len(altered) > 30
    async with gateway(fake, wallet, config) as url, browsing(url, width=NARROW) as page:
        await page.goto("/tally/receipt")
        await page.fill("#text", text)
        await page.click("#proof button")
        await page.wait_for_selector("#findings[data-result='valid']")
        found = await page.inner_text("#findings")
        for shown in (wallet.address, result.provider, "at most", "as the terms allow"):
            assert shown in found
        await look_at(page, "gateway-receipt")
        for name, raw in (*altered, ("no JSON", "{"), ("other", {"tallystick": "x"}), ("null", None), ("list", [])):
            await page.evaluate("document.getElementById('findings').removeAttribute('data-result')")
            await page.fill("#text", raw if isinstance(raw, str) else json.dumps(raw))
            await page.click("#proof button")
            await page.wait_for_selector("#findings[data-result]")
            assert await page.get_attribute("#findings", "data-result") == "invalid", name
        await look_at(page, "gateway-receipt-wrong")


@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "dark"), (WIDE, "light")])
async def test_the_page_of_money(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, width: int, scheme: Literal["light", "dark"]
) -> None:
    """Accessible, and no wider than the window, with the wallet's money in every place."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        browsing(f"http://127.0.0.1:{port}", width=width, scheme=scheme) as page,
    ):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            await http.post(CHAT, json=BODY)
        market._onchain = cast("Any", FakeChain(TabState(Amount(0), Amount(3_000_000), Seconds(0))))
        answer = await page.goto("/tally/money")
        assert answer is not None
        assert answer.ok
        await look_at(page, "gateway-money")
