"""The gateway's pages over HTTP: what a wallet did, for those who may see it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from tallystick.chain.escrow import Purse, TabState
from tallystick.client.config import ApiKey, Budget, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.pages.payer_pages import SECTIONS
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.types import Address, Amount, Seconds
from tallystick.runtime.serving import serving
from tallystick.web import request_body
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket
from tests.client.gateway.test_app import gateway, http, url
from tests.client.parties import DOMAIN
from tests.web.sign_in_site import challenge, enter, signed

__all__ = ["http", "url"]
PAGES = [*SECTIONS, "/tally/pages/jobs/" + "00" * 16]
KEY = "secret of sixteen or more"


async def test_what_was_spent(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Tiles, rows by each group, budgets; the prompt is on no page."""
    budgets = (Budget(label="<b>team</b>", per_day=Amount(1_000_000)),)
    async with gateway(fake, wallet, replace(config, budgets=budgets)) as base, httpx.AsyncClient(base_url=base) as http:
        empty = await http.get("/tally/spending")
        assert (empty.status_code, "Nothing was spent" in empty.text) == (200, True)
        answers = [await http.post(CHAT, json=BODY) for _ in range(3)]
        cost = answers[0].headers["x-tally-cost"]
        for by in ("day", "model", "label", "provider"):
            for days in ("1", "7", "30", "365"):
                page = await http.get("/tally/spending", params={"by": by, "days": days})
                assert page.status_code == 200
                assert "<rect" in page.text
                assert wallet.address in page.text
        models = (await http.get("/tally/spending?by=model")).text
        assert BODY["model"] in models
        assert "&lt;b&gt;team&lt;/b&gt;" in models
        jobs = (await http.get("/tally/jobs")).text
        job = answers[0].headers["x-tally-job"]
        assert f"/tally/pages/jobs/{job}" in jobs
        assert cost in jobs
        shown = (await http.get(f"/tally/pages/jobs/{job}")).text
        for text in (job, cost, BODY["model"], answers[0].headers["x-tally-provider"], "recorded"):
            assert text in shown
        assert str(BODY["messages"][0]["content"]) not in models + jobs + shown


class FakeChain:
    """The escrow as the page of money reads it; `fails` instead, if it is set."""

    def __init__(self, tab: TabState, fails: TallyError | None = None) -> None:
        self.escrow, self._tab, self.fails = SimpleNamespace(deployment=SimpleNamespace(domain=DOMAIN)), tab, fails
        self.read: list[Address] = []

    async def purse(self) -> Purse:
        if self.fails is not None:
            raise self.fails
        return Purse(None, Amount(7_000_000), Amount(1_000_000), Seconds(9))

    async def tabs(self, providers: Sequence[Address]) -> list[TabState]:
        self.read += providers
        return [self._tab for _ in providers]


async def test_where_the_money_is(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The chain's amounts, divided by what the ledger knows; a chain that does not answer says so."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        assert "does not use the chain" in (await http.get("/tally/money")).text
        provider = (await http.post(CHAT, json=BODY)).headers["x-tally-provider"]
        chain = FakeChain(TabState(Amount(0), Amount(3_000_000), Seconds(0)))
        market._onchain = cast("Any", chain)
        page = await http.get("/tally/money")
        assert page.status_code == 200
        rows = dict(re.findall(r'<th scope="row">([^<]*)</th><td class="number">([^<]*)</td>', page.text))
        assert provider in chain.read
        assert provider in page.text
        assert (rows["total"], rows["thawing"], rows["free"]) == (str(7 + 3 * len(chain.read)), "1", "6")
        assert Decimal(rows["owed"]) > 0
        assert sum(Decimal(rows.pop(name)) for name in list(rows) if name != "total") == Decimal(rows["total"])
        chain.fails = Unavailable(Code.CHAIN_UNAVAILABLE, "the chain does not answer")
        away = await http.get("/tally/money")
        assert (away.status_code, "the chain does not answer" in away.text) == (503, True)


async def test_what_is_not_there(http: httpx.AsyncClient) -> None:
    """A job that the ledger does not have, and what is no job's id."""
    for job in ("00" * 16, "x", "%3Cb%3E"):
        page = await http.get(f"/tally/pages/jobs/{job}")
        assert (page.status_code, "That did not work" in page.text, "<b>" in page.text) == (404, True, False)


async def test_the_chat_names_models_and_aliases(http: httpx.AsyncClient) -> None:
    """A model is chosen from what is on offer."""
    page = await http.get("/tally/chat")
    assert (page.status_code, f"<option>{BODY['model']}</option>" in page.text) == (200, True)


@pytest.mark.parametrize("path", PAGES)
async def test_other_sites_see_nothing(http: httpx.AsyncClient, path: str) -> None:
    """Without a key, pages are for this machine: not for other sites, their frames, or other names of this machine."""
    for headers in (
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
    ):
        assert (await http.get(path, headers=headers)).status_code == 401
    page = await http.get(path, headers={"sec-fetch-site": "none"})
    assert page.status_code in {200, 404, 503}  # 503: this gateway uses no chain, so it has no wallet page
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


async def test_the_pages_own_requests_are_served(url: str, http: httpx.AsyncClient) -> None:
    """The chat's requests have the gateway's own origin. That of another port or scheme is foreign."""
    own = {"origin": url, "sec-fetch-site": "same-origin"}
    assert (await http.post(CHAT, json=BODY, headers=own)).status_code == 200
    for origin in (url + "0", url.replace("127.0.0.1", "localhost"), "https://evil.example", url + ".evil.example"):
        assert (await http.post(CHAT, json=BODY, headers=own | {"origin": origin})).status_code == 401
    assert (await http.post(CHAT, json=BODY, headers=own | {"sec-fetch-site": "cross-site"})).status_code == 401


async def test_logging_in(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With keys, a stranger gets the form on every page; the gateway's own key opens a session, no other key does."""
    keys = (ApiKey(label="team", secret="another secret of a team"),)
    config = replace(config, api_key=KEY, api_keys=keys)
    async with gateway(fake, wallet, config) as base, httpx.AsyncClient(base_url=base) as http:
        for path in PAGES:
            page = await http.get(path)
            assert (page.status_code, 'name="key"' in page.text, wallet.address in page.text) == (401, True, False)
            page = await http.get(path, headers={"authorization": f"Bearer {keys[0].value}"})
            assert page.status_code == 401, "a team's key opens no page of the whole wallet"
        for wrong in ("", "x", keys[0].value, "\N{SNOWMAN}", KEY + "x"):
            answer = await http.post("/tally/login", data={"key": wrong, "target": "/tally/jobs"})
            assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
        for target, place in (
            ("/tally/jobs", "/tally/jobs"),
            ("https://evil.example", "/tally/spending"),
            ("//x", "/tally/spending"),
        ):
            answer = await http.post("/tally/login", data={"key": KEY, "target": target})
            assert (answer.status_code, answer.headers["location"]) == (303, place)
            cookie = answer.headers["set-cookie"].lower()
            assert "httponly" in cookie
            assert "samesite=strict" in cookie
        assert (await http.get("/tally/spending")).status_code == 200
        assert (await http.post(CHAT, json=BODY, headers={"origin": base})).status_code == 200
        for foreign in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert (await http.post(CHAT, json=BODY, headers=foreign)).status_code == 401
        http.cookies.clear()
        assert (await http.get("/tally/spending")).status_code == 401


@pytest.mark.parametrize("body", [b"", b"key=" + b"x" * 100_000, b"\xff=&;" * 50, b"a=1&" * 500, b"key=%zz"])
async def test_forms_of_strangers(fake: FakeMarket, wallet: Signer, config: ClientConfig, body: bytes) -> None:
    """Whatever is sent to log in is answered with the form."""
    async with gateway(fake, wallet, replace(config, api_key=KEY)) as base, httpx.AsyncClient(base_url=base) as http:
        answer = await http.post("/tally/login", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
        assert (answer.status_code, 'name="key"' in answer.text) == (401, True)


async def test_a_form_that_never_comes(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger cannot hold the route open."""
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.05)
    async with gateway(fake, wallet, replace(config, api_key=KEY)) as base:
        host, port = base.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST /tally/login HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 100\r\n\r\nkey=".encode())
        await writer.drain()
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
        assert b"401" in answer
        writer.close()


async def test_static_files_are_for_everybody(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The form to log in has its style."""
    async with gateway(fake, wallet, replace(config, api_key=KEY)) as base, httpx.AsyncClient(base_url=base) as http:
        page = (await http.get("/tally/login")).text
        style = page.split('rel="stylesheet" href="')[1].split('"')[0]
        assert (await http.get(style)).headers["content-type"].startswith("text/css")
        assert (await http.get("/static/../v1/models")).status_code in {401, 404}
        assert (await http.get("/v1/models")).status_code == 401


async def test_logging_in_with_a_wallet(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With a key set, the gateway's own wallet and those that the config lists sign in too; their session is the owner's."""
    friend, stranger = Signer(b"\x05" * 32), Signer(b"\x06" * 32)
    locked = replace(config, api_key=KEY, page_wallets=(friend.address,))
    async with gateway(fake, wallet, locked) as base:
        for key, status in ((wallet, 200), (friend, 200), (stranger, 401)):
            async with httpx.AsyncClient(base_url=base) as http:
                assert 'href="/sign-in?to=/tally/spending"' in (await http.get("/tally/spending")).text
                answer = await enter(http, key)
                assert answer.status_code == status, answer.text
                assert (await http.get("/tally/spending")).status_code == status
                assert (await http.post(CHAT, json=BODY)).status_code == status
                assert (await http.post(CHAT, json=BODY, headers={"sec-fetch-site": "same-site"})).status_code == 401
                assert (await http.post("/sign-out")).status_code == 200
                assert (await http.get("/tally/spending")).status_code == 401
        async with httpx.AsyncClient(base_url=base) as script:
            answer = await script.post(
                "/sign-in", json=signed(await challenge(script, wallet.address), wallet) | {"bearer": True}
            )
            bearer = {"authorization": f"Bearer {answer.json()['token']}"}
            assert (await script.post(CHAT, json=BODY, headers=bearer)).status_code == 200
            assert (await script.post(CHAT, json=BODY)).status_code == 401


async def test_a_gateway_at_another_name(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A message for a name that the config does not list is not even offered for signing."""
    locked = replace(config, api_key=KEY, page_urls=("https://gateway.example",))
    async with gateway(fake, wallet, locked) as base, httpx.AsyncClient(base_url=base) as http:
        answer = await http.post("/sign-in/challenge", json={"account": wallet.address}, headers={"host": "gateway.example"})
        assert answer.json()["message"].startswith("gateway.example wants you to sign in")
        answer = await http.post("/sign-in/challenge", json={"account": wallet.address}, headers={"host": "evil.example"})
        assert (answer.status_code, "page_urls" in answer.text) == (401, True)
