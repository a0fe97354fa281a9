"""The wallet page in a real browser, with an injected wallet on a real chain: every operation, in each state."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from tallystick.protocol.types import Amount
from tallystick.web import static_files
from tests.chain.harness import DOLLAR, RULES, World, person
from tests.web.browser import NARROW, WIDE, look_at, needs_browser
from tests.web.wallet_desk import PATH, desk

pytestmark = needs_browser
_LOADED = sum((Path(static_files.__file__).parent / "static" / name).stat().st_size for name in ("site.css", "wallet_page.js"))
"""Bytes of the files that the page loads."""


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


async def test_stake_and_earnings(either: World) -> None:
    """Stake by an exact approval, let it leave, withdraw it; set the payout address and cash out what a payer paid."""
    payer = person("payer of the desk")
    async with desk(either) as at:
        await either.purse(payer, payer, 10 * DOLLAR)
        await at.connect()
        shown = await at.do("stake", "20")
        assert "Allow exactly 20 dollars" in shown
        assert await either.escrow.token.allowance(at.owner.address, either.deployment.escrow) == 0
        assert (await either.escrow.provider(at.owner.address)).stake == 20 * DOLLAR
        await at.do("unstake", "5")
        await at.says("5 dollars more is leaving", "#account-says")
        await at.do("cancelUnstake")
        await at.do("unstake", "20")
        await either.advance(RULES.unstake + 1)
        await at.page.click("#subject-form button")
        await at.do("withdrawStake")
        assert await either.escrow.token.balance_of(at.owner.address) == 100 * DOLLAR
        row = either.row(payer, at.owner.address, 3 * DOLLAR)
        await either.settle(either.senders[at.owner.address], row)
        cold = person("cold wallet").address
        await at.page.fill("#setPayout-payout", cold)
        await at.do("setPayout")
        await at.do("cashOut")
        assert await either.escrow.token.balance_of(cold) == 3 * DOLLAR


async def test_reservations(world: World) -> None:
    """Reserve for a provider, release, and take it back after the wait."""
    provider = person("provider of the desk").address
    async with desk(world) as at:
        await world.purse(at.owner, at.owner, 0)
        await at.connect()
        await at.do("deposit", "10")
        await at.page.fill("#provider", provider)
        await at.page.click("#provider-form button")
        await at.do("reserve", "4")
        await at.says("4 dollars is reserved", "#tab-says")
        await at.do("release")
        await world.advance(RULES.release + 1)
        await at.page.click("#provider-form button")
        await at.do("finishRelease")
        assert (await world.escrow.purse(at.owner.address)).free == 10 * DOLLAR
        await world.escrow.token.approve(world.senders[at.owner.address], world.deployment.escrow, Amount(2 * DOLLAR))
        await at.do("deposit", "2")
        assert at.wallet.asked.count("eth_signTypedData_v4") == 1, "an allowance that is there is used"


async def test_by_keyboard(world: World) -> None:
    """From the address bar to a mined transaction without a mouse."""
    async with desk(world) as at:
        await at.open()
        await at.page.wait_for_selector("#wallets button")

        async def tab_to(selector: str) -> None:
            for _ in range(60):
                await at.page.keyboard.press("Tab")
                if await at.page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                    return
            raise AssertionError(selector)

        await tab_to("#wallets button")
        await at.page.keyboard.press("Enter")
        await at.page.wait_for_selector("#state:not([hidden])")
        await at.page.wait_for_selector("form[data-call='open'] button:enabled")
        await tab_to("form[data-call='open'] button")
        await at.page.keyboard.press("Enter")
        await at.page.wait_for_selector("#review[open]")
        assert await at.page.evaluate("document.activeElement.id") == "review-title"
        await tab_to("#review button[value='agreed']")
        await at.page.keyboard.press("Enter")
        await at.says("Done.")
        assert (await world.escrow.purse(at.owner.address)).owner == at.owner.address
