"""The routes of signing in: cookies, forms of other sites, session fixation, and what the page says."""

from __future__ import annotations

import pytest

from tallystick.protocol.signatures import checksum
from tallystick.web.rendering import HEADERS
from tests.web.sign_in_site import ALICE, MALLORY, ORIGIN, Site, account_of, challenge, enter, signed


async def test_the_cookie() -> None:
    """Scripts cannot read it, other sites' requests do not carry it, and with https it goes over https alone."""
    async with Site().client() as client:
        cookie = (await enter(client)).headers["set-cookie"]
        assert cookie.startswith("tally_wallet_8420=")
        assert {"HttpOnly", "SameSite=strict", "Path=/", "Max-Age=3600"} <= set(cookie.split("; "))
        assert "Secure" not in cookie
    async with Site(settings={"origins": ("https://market.example",)}).client("https://market.example") as client:
        cookie = (await enter(client)).headers["set-cookie"]
        assert cookie.startswith("__Host-tally_wallet=")
        assert {"Secure", "HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
        assert "Domain" not in cookie


async def test_session_fixation() -> None:
    """A value that was in the browser before opens nothing: sign-in gives a new one, and ends the session of the old one."""
    site = Site()
    async with site.client() as mallory, site.client() as alice:
        await enter(mallory, MALLORY)
        planted = next(iter(mallory.cookies.values()))
        body = signed(await challenge(alice))
        answer = await alice.post("/sign-in", json=body, headers={"cookie": f"tally_wallet_8420={planted}"})
        assert planted not in answer.headers["set-cookie"]
        assert await account_of(alice) == ALICE.address
        assert await account_of(mallory) is None, "the planted session ended"


async def test_two_cookies_of_one_name() -> None:
    """Who could add a cookie beside the session's cannot choose which counts: none does."""
    site = Site()
    async with site.client() as client:
        await enter(client)
        value = next(iter(client.cookies.values()))
        client.cookies.clear()
        both = f"tally_wallet_8420=planted; tally_wallet_8420={value}"
        assert await account_of(client, cookie=both) is None
        assert await account_of(client, cookie=f"tally_wallet_8420={value}; other=1") == ALICE.address
        assert await account_of(client, cookie=f"tally_wallet_8420={value}; filler={'x' * 5_000}") is None


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://localhost:8421"},
        {"origin": "null"},
        {"origin": "null", "sec-fetch-site": "cross-site"},
        {"origin": "null", "sec-fetch-site": "none"},
        {"origin": "https://evil.example", "sec-fetch-site": "same-origin"},
        {"origin": "https://localhost:8420"},
        {"origin": "http://[localhost"},
        {"origin": "localhost:8420"},
        {"origin": "http://"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
async def test_pages_of_other_sites(headers: dict[str, str]) -> None:
    """No page of another site or port signs a browser in, as its own account or another, or out."""
    site = Site()
    async with site.client() as client:
        await enter(client)
        body = signed(await challenge(client, MALLORY.address), MALLORY)
        for path in ("/sign-in", "/sign-in/challenge", "/sign-out"):
            answer = await client.post(path, json=body if path == "/sign-in" else {}, headers=headers)
            assert answer.status_code == 401, path
            assert "set-cookie" not in answer.headers
        assert await account_of(client) == ALICE.address


async def test_forms_of_other_sites() -> None:
    """A form cannot send the media type that sign-in wants."""
    async with Site().client() as client:
        body = signed(await challenge(client))
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = await client.post("/sign-in", json=body, headers={"content-type": kind})
            assert (answer.status_code, "content-type" in answer.text) == (400, True)


async def test_reads_by_other_sites() -> None:
    """The cookie counts for the site's own requests and for a person who follows a link, not for what other pages load."""
    async with Site().client() as client:
        await enter(client)
        for site in ("cross-site", "same-site"):
            assert await account_of(client, **{"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}) is None
            assert await account_of(client, **{"sec-fetch-site": site, "sec-fetch-mode": "navigate"}) == ALICE.address
        assert await account_of(client, **{"sec-fetch-site": "same-origin"}) == ALICE.address


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"null", b'{"account": 5}', b'{"account": "0x12"}', b"x" * 50_000, b'{"a": 1}']
)
async def test_bodies_that_are_none(body: bytes) -> None:
    """A body that is no request, or too long, is refused by name."""
    async with Site().client() as client:
        for path in ("/sign-in", "/sign-in/challenge"):
            answer = await client.post(path, content=body, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_message")


async def test_the_page() -> None:
    """It is strict, names the command for those without a wallet, and where a sign-in leads is one of its own pages."""
    async with Site().client() as client:
        page = await client.get("/sign-in", params={"to": "/other"})
        assert page.status_code == 200
        assert {name: page.headers[name] for name in HEADERS} == dict(HEADERS)
        assert f"tally sign-in {ORIGIN}" in page.text
        assert 'data-target="/other"' in page.text
        for target in ("https://evil.example", "//evil.example", "javascript:alert(1)", '"><script>'):
            assert 'data-target="/mine"' in (await client.get("/sign-in", params={"to": target})).text
        await enter(client)
        page = await client.get("/sign-in")
        assert (checksum(ALICE.address) in page.text, "Sign out" in page.text) == (True, True)
        out = await client.post("/sign-out", data={})
        assert (await account_of(client), out.status_code) == (None, 200)


async def test_signing_out_by_the_form() -> None:
    """The form's answer leads back to the page, so a reload sends nothing again."""
    async with Site().client() as client:
        await enter(client)
        kind = {"content-type": "application/x-www-form-urlencoded"}
        own = {"origin": "null", "sec-fetch-site": "same-origin"}  # as browsers with extensions that cut referrers send it
        answer = await client.post("/sign-out", content=b"", headers=kind | own)
        assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
        assert await account_of(client) is None


async def test_a_page_of_another_name() -> None:
    """Under a name that the server does not know, the page says so, and shows nothing of a session."""
    async with Site(settings={"origins": ("https://market.example",)}).client("https://evil.example") as client:
        page = await client.get("/sign-in")
        assert (page.status_code, "expected one of https://market.example" in page.text) == (401, True)
