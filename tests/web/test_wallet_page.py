"""What the server of the wallet page tells: public facts that the chain confirms, and state in words; nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest
from eth_abi.abi import encode
from starlette.applications import Starlette
from starlette.routing import Route

from tallystick.chain.endpoint import Rpc
from tallystick.chain.escrow import Escrow
from tallystick.chain.state_explainer import StateExplainer
from tallystick.protocol.types import Amount, format_amount
from tallystick.web.rendering import Pages
from tallystick.web.wallet_page import FAILURE_SECONDS, LAST_SECOND, Parties, WalletPage
from tests.chain.harness import RULES, World, person

OWNER = person("owner").address
PURSE = encode(["address", "uint96", "uint96", "uint40"], [OWNER, 5_000_000, 2_000_000, 1_900_000_000])
ACCOUNT = encode(["uint96", "address", "uint16"], [7_000_000, OWNER, 0])
STAKE = encode(["uint96", "uint96", "uint40"], [3_000_000, 1_000_000, 1_900_000_000])
TAB = encode(["uint96", "uint96", "uint40"], [1, 4_000_000, 0])
WHOLE = {
    "now": "1800000000",
    "purse": "0x" + PURSE.hex(),
    "tab": "0x" + TAB.hex(),
    "account": "0x" + ACCOUNT.hex(),
    "stakeOf": "0x" + STAKE.hex(),
    "address": OWNER,
}


@asynccontextmanager
async def _served(escrow: Escrow, clock: list[float] | None = None, **parties: Any) -> AsyncIterator[httpx.AsyncClient]:
    ticks = clock or [0.0]
    page = WalletPage(escrow, "/wallet", Parties(**parties), clock=lambda: ticks[0])
    pages = Pages(Path(__file__).parent, product="Test", sections={"/wallet": "Wallet"})
    app = Starlette(routes=[Route("/wallet", page.shown(pages)), Route("/wallet/meaning", page.meaning)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        yield http


def _facts(page: str) -> dict[str, Any]:
    match = re.search(r'data-facts="([^"]*)"', page)
    assert match is not None
    facts: dict[str, Any] = json.loads(unescape(match[1]))
    return facts


async def test_facts(world: World) -> None:
    """Chain, contract, token, and the hash of the code that the chain has; the key and the account that the page is for."""
    async with _served(world.escrow, key=OWNER, bind="/bind") as http:
        page = await http.get("/wallet")
        facts = _facts(page.text)
        deployment = world.deployment
        assert (facts["chainId"], facts["escrow"], facts["token"], facts["decimals"]) == (
            *(deployment.chain_id, deployment.escrow, deployment.token, 6),
        )
        assert (facts["key"], facts["bind"], facts["account"], facts["rpc"]) == (OWNER, "/bind", None, world.rpc.url)
        assert len(facts["codeHash"]) == 66
        assert "unsafe" not in page.headers["content-security-policy"]


async def test_an_endpoint_elsewhere_is_not_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint's URL may have an API key in it."""
    monkeypatch.setattr(world.rpc, "url", "https://rpc.example/v2/secret-key")
    page = WalletPage(world.escrow, "/wallet")
    monkeypatch.undo()
    shown = await page.render(Pages(Path(__file__).parent, product="Test", sections={}))
    assert b"secret-key" not in bytes(shown.body)
    assert _facts(bytes(shown.body).decode())["rpc"] is None


async def test_in_words(world: World) -> None:
    """The words are those of the StateExplainer, with times that people read."""
    async with _served(world.escrow) as http:
        answer = (await http.get("/wallet/meaning", params=WHOLE)).json()
        explain = StateExplainer(RULES, 1_800_000_000, lambda amount: f"{format_amount(Amount(amount))} dollars")
        assert answer.keys() == {"purse", "tab", "account"}
        assert (answer["purse"]["state"], answer["tab"]["state"], answer["account"]["state"]) == (
            *("thawing", "reserved", "unstaking"),
        )
        assert "2 dollars is under thaw" in answer["purse"]["says"][1]
        assert [step["call"] for step in answer["purse"]["next"]] == ["withdraw", "cancelThaw", "deposit", "reserve"]
        assert answer["purse"]["next"][0]["when"].startswith("in 1157 days")
        assert answer["account"]["says"][0] == f"7 dollars can be cashed out; it goes to {OWNER}."
        assert explain.rules().sentences[0] in (await http.get("/wallet")).text
        only = {name: WHOLE[name] for name in ("now", "purse")}
        assert (await http.get("/wallet/meaning", params=only)).json().keys() == {"purse"}


BAD = {
    "now": ["", "x", "-1", "1.5", "9" * 13, str(LAST_SECOND + 1), "\N{ARABIC-INDIC DIGIT ONE}"],
    "purse": ["", "0x", "0x12", "zz", WHOLE["purse"][:-2], "0x" + "ff" * 128, "0x" + "00" * 10_000],
    "tab": ["0x" + encode(["uint256"] * 3, [1, 1, (1 << 40) - 1]).hex(), "0x" + "ff" * 96],
    "stakeOf": ["0x", "0x" + encode(["uint256"] * 3, [1, 1, LAST_SECOND + 1]).hex()],
    "account": ["0x01"],
    "address": ["", "0x12", "<script>"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
async def test_what_no_contract_returns(world: World, name: str, text: str) -> None:
    """Whatever a visitor sends, the answer is an error in words, status 400."""
    async with _served(world.escrow) as http:
        answer = await http.get("/wallet/meaning", params=WHOLE | {name: text})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]


async def test_no_chain(world: World) -> None:
    """Without the chain, or with another contract, the page says why; the chain is left alone for a while, however many ask."""
    asked, clock = list[str](), [0.0]
    rpc = Rpc("http://127.0.0.1:9", attempts=1)
    escrow = Escrow(rpc, world.deployment)
    original = escrow.check

    async def counted() -> None:
        asked.append("check")
        await original()

    escrow.check = counted  # type: ignore[method-assign]
    async with _served(escrow, clock) as http:
        for _ in range(5):
            page = await http.get("/wallet")
            assert page.status_code == 503
            assert "tally deposit" in page.text
            assert (await http.get("/wallet/meaning", params=WHOLE)).status_code == 503
        assert len(asked) == 1
        clock[0] += FAILURE_SECONDS
        await http.get("/wallet")
        assert len(asked) == 2
    await rpc.close()
    other = Escrow(world.rpc, replace(world.deployment, escrow=world.deployment.token))
    async with _served(other) as http:
        page = await http.get("/wallet")
        assert page.status_code == 503
        assert "is not the escrow of this version" in page.text
