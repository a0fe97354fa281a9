"""A node's pages, over a real store: its state, its income, its money; for browsers on this machine."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from starlette.applications import Starlette

from node.pages.page_login import PageLogin
from node.pages.provider_pages import SECTIONS, Ask, ProviderPages
from node.storage.store import SqlStore
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.types import Address
from tallystick.runtime.serving import serving
from tallystick.web.wallet_sign_in import WalletSignIn
from tests.node.harness import DOMAIN, PAYER, PROVIDER
from tests.web.browser import NARROW, WIDE, browsing, look_at, needs_browser
from tests.web.sign_in_site import enter

HOSTILE = "<script>alert(1)</script>"
REPORT: dict[str, Any] = {
    "ok": True,
    "provider": PROVIDER.address,
    "trouble": "",
    "upSeconds": 7_300,
    "revenue": "1500000",
    "revenueLastHour": "20000",
    "running": 1,
    "free_slots": 3,
    "checks": {
        "disk": {"status": "pass", "output": "", "remedy": ""},
        "chain": {"status": "warn", "output": "it does not answer", "remedy": "check `rpc`"},
    },
    "alarms": [{"what": "thawing", "payer": PAYER.address, "due": "0.5", "claim_by": "9", "remedy": "tally node collect"}],
    "engines": {"vllm": "up", HOSTILE: "down"},
    "slots": {name: {"taken": 1, "of": 4, "queue": 2, "free": 3} for name in ("vllm", HOSTILE)},
    "asks": [
        {
            "model": HOSTILE,
            "engine": "vllm",
            "inputPrice": "1",
            "outputPrice": "2000000",
            "contextTokens": 8_192,
            "evidence": True,
            "audience": "batch jobs",
        }
    ],
    "last": [
        {
            "job": "ab" * 16,
            "model": HOSTILE,
            "outcome": "client_cancelled",
            "cost": "10",
            "tokens": [1, 2],
            "firstMs": None,
            "seconds": 0.5,
        }
    ],
    "coordinators": {"ws://127.0.0.1:8420/v1/node": Address("0x" + "ab" * 20), "ws://other": None},
    "chain_reachable": False,
    "unsecured": "0",
}


async def _decisions(query: str) -> object:
    """A coordinator that would have offered the node twice as often at other prices."""
    told = ["offered to the client, place 1 of 2", f"dear {HOSTILE}"]
    then = ["would have been offered to the client at this price"] * 2
    decisions = [{"at": 9, "model": HOSTILE, "stage": "shortlist", "why": why} for why in (then if "Price" in query else told)]
    before = {"at": 8, "model": HOSTILE, "stage": "shortlist", "why": told[0]}
    another = {"at": 9, "model": "another", "stage": "shortlist", "why": told[0]}
    return {"decisions": [*decisions, another, *([] if "Price" in query else [before])]}


@asynccontextmanager
async def _served(folder: Path, login: PageLogin | None = None, ask: Ask | None = None, **changes: Any) -> AsyncIterator[str]:
    store = SqlStore(f"sqlite:///{folder}/node.db", PROVIDER.address, DOMAIN)
    await store.start()
    try:
        pages = ProviderPages(lambda: REPORT | changes, store, least=lambda: 1, ask=ask or _decisions, login=login)
        async with serving(Starlette(routes=pages.routes()), "127.0.0.1", 0) as port:
            yield f"http://127.0.0.1:{port}"
    finally:
        await store.close()


async def test_what_it_does_now(tmp_path: Path) -> None:
    """State, engines, asks, alarms and what needs attention; names are text."""
    async with _served(tmp_path) as url, httpx.AsyncClient(base_url=url) as http:
        page = (await http.get("/")).text
        for text in (
            "Ready to earn",
            "1.5",
            "vllm",
            "price for batch jobs",
            "it does not answer",
            "tally node collect",
            "client cancelled",
            "disconnected",
        ):
            assert text in page
        assert HOSTILE not in page
        assert "&lt;script&gt;" in page
    async with _served(tmp_path, ok=False, trouble="refused") as url, httpx.AsyncClient(base_url=url) as http:
        page = (await http.get("/")).text
        assert ("Not earning" in page, "refused" in page) == (True, True)


@pytest.mark.parametrize("path", [*SECTIONS, "/income?days=365&by=payer", "/income?days=x&by=y"])
async def test_an_empty_store(tmp_path: Path, path: str) -> None:
    """A node that earned nothing yet has all pages, with strict headers; other sites see none of them."""
    async with _served(tmp_path) as url, httpx.AsyncClient(base_url=url) as http:
        page = await http.get(path)
        assert page.status_code == 200
        assert "unsafe" not in page.headers["content-security-policy"]
        for headers in ({"host": "evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}):
            assert (await http.get(path, headers=headers)).status_code == 403


async def test_what_other_prices_would_have_brought(tmp_path: Path) -> None:
    """The last day's receipts at the form's prices, and how often a coordinator would have offered the node; names are text."""
    async with _served(tmp_path) as url, httpx.AsyncClient(base_url=url) as http:
        page = (await http.get("/prices", params={"model": HOSTILE, "input": "0.5", "output": "1"})).text
        assert 'value="0.5"' in page
        rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall(r"<tr>.*?</tr>", page) if 'scope="row"' in row]
        assert rows == [["2", "1", "50"], ["2", "2", "100"]]
        assert HOSTILE not in page
        assert "1 earlier requests are not counted" in page
        wrong = (await http.get("/prices", params={"input": HOSTILE})).text
        assert ("Input: expected" in wrong, HOSTILE in wrong) == (True, False)
    async with _served(tmp_path, asks=[]) as url, httpx.AsyncClient(base_url=url) as http:
        assert "Nothing is offered now" in (await http.get("/prices")).text

    async def away(_query: str) -> object:
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "no coordinator is connected")

    async with _served(tmp_path, ask=away) as url, httpx.AsyncClient(base_url=url) as http:
        page = (await http.get("/prices")).text
        assert "Not known: no coordinator is connected" in page
        assert "dollars, as their receipts say" in page


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "dark"), (WIDE, "light")])
async def test_in_a_browser(tmp_path: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    """No complaint of the browser, no violation by axe-core, nothing wider than the window."""
    async with _served(tmp_path) as url, browsing(url, width=width, scheme=scheme) as page:
        for path, name in SECTIONS.items():
            answer = await page.goto(path)
            assert answer is not None
            assert answer.ok
            await look_at(page, f"node-{name.lower()}")


KEY = "a key of sixteen or more"


def _login(*origins: str, key: str | None = None) -> PageLogin:
    """A login for PROVIDER, and for the key."""
    sign_in = WalletSignIn(
        origins=origins,
        chain_id=1,
        key=b"secret",
        statement="Sign in.",
        may_enter=frozenset({PROVIDER.address}).__contains__,
    )
    return PageLogin(sign_in, PROVIDER.address, key)


async def test_a_login_is_needed_elsewhere(tmp_path: Path) -> None:
    """Where other machines reach the pages, nobody sees any without a login, whatever name of a host it claims to use."""
    async with _served(tmp_path, login=_login()) as url, httpx.AsyncClient(base_url=url) as http:
        for path in SECTIONS:
            for headers in ({}, {"host": "localhost"}, {"host": "node.example"}, {"host": "evil.example"}):
                page = await http.get(path, headers=headers)
                assert (page.status_code, page.headers["location"].startswith("/sign-in?to=")) == (303, True)
        assert (await http.post("/sign-in/key", data={"key": KEY})).status_code == 404
        assert (await enter(http, PAYER)).status_code == 401
        assert (await enter(http, PROVIDER)).status_code == 200
        for path in SECTIONS:
            assert (await http.get(path)).status_code == 200
        assert (await http.post("/sign-out")).status_code == 200
        assert (await http.get("/")).status_code == 303


async def test_a_login_by_key(tmp_path: Path) -> None:
    """The key of the config signs in by the form of this site's own page, and leads to the page that was asked for."""
    async with _served(tmp_path, login=_login(key=KEY)) as url, httpx.AsyncClient(base_url=url) as http:
        assert 'action="/sign-in/key?to=%2Fmoney"' in (await http.get("/sign-in?to=/money")).text
        for key in ("", "wrong", KEY + "x", "\udcff"):
            answer = await http.post("/sign-in/key", data={"key": key.encode(errors="replace")})
            assert (answer.status_code, "page_key" in answer.text) == (401, True)
        foreign = await http.post("/sign-in/key", data={"key": KEY}, headers={"origin": "https://evil.example"})
        assert (foreign.status_code, "set-cookie" in foreign.headers) == (401, False)
        answer = await http.post("/sign-in/key?to=/money", data={"key": KEY})
        assert (answer.status_code, answer.headers["location"]) == (303, "/money")
        assert (await http.get("/money")).status_code == 200


@needs_browser
async def test_the_login_in_a_browser(tmp_path: Path) -> None:
    """The form of the key is usable and accessible, in dark colours at a phone's width."""
    async with _served(tmp_path, login=_login(key=KEY)) as url, browsing(url, width=NARROW, scheme="dark") as page:
        await page.goto("/income")
        await page.get_by_label("Key (page_key)").fill(KEY)
        await look_at(page, "node-sign-in")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/income")


@needs_browser
async def test_the_forms_over_plain_http(tmp_path: Path) -> None:
    """At another machine's name without https, browsers send no Sec-Fetch-Site; the key still signs in, and the button out."""
    site = "http://node.test"
    async with (
        _served(tmp_path, login=_login(site, key=KEY)) as url,
        browsing(site, at=url.partition("://")[2]) as page,
    ):
        await page.goto("/income")
        assert await page.evaluate("isSecureContext") is False
        await page.get_by_label("Key (page_key)").fill(KEY)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/income")
        await page.goto("/sign-in")
        async with page.expect_response("**/sign-out") as answer:
            await page.get_by_role("button", name="Sign out").click()
        assert (await answer.value).status == 303
        await page.get_by_label("Key (page_key)").wait_for()
        await page.goto("/income")
        await page.wait_for_url("**/sign-in?**")
