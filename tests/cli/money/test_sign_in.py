"""`tally sign-in`: a link that signs in once, a token for scripts, and servers that want a signature for another site."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.protocol.signatures import checksum
from tests.chain.harness import person, serving
from tests.cli.conftest import Tally
from tests.web.sign_in_site import Site

ACCOUNT = checksum(person("wallet default").address)


@pytest.fixture
def site() -> Iterator[str]:
    """A site with sign-in, on a port."""
    with serving(Site().app) as url:
        yield url


def test_a_link(payer: Tally, site: str) -> None:
    """The part after # is what signs in, once; the server never sees it in an address."""
    answer = payer("sign-in", site)
    assert answer["account"] == ACCOUNT
    start, _, code = answer["link"].partition("#")
    assert start == f"{site}/sign-in"
    body = json.loads(base64.urlsafe_b64decode(code + "=" * (-len(code) % 4)))
    with httpx.Client(base_url=site, trust_env=False) as browser:
        assert browser.post("/sign-in", json=body).status_code == 200
        assert browser.get("/mine").json()["account"] == ACCOUNT.lower()
        assert browser.post("/sign-in", json=body).status_code == 401
    assert f"{site}/sign-in#" in payer.says("sign-in", f"{site}/anything")


def test_a_token(payer: Tally, site: str) -> None:
    """Scripts get a bearer token, which is all that goes to standard output."""
    token = payer.says("sign-in", site.removeprefix("http://"), "--bearer")
    headers = {"authorization": f"Bearer {token}"}
    assert httpx.get(f"{site}/mine", headers=headers, trust_env=False).json()["account"] == ACCOUNT.lower()
    assert payer("sign-in", site, "--bearer").keys() == {"account", "token", "expiresAt"}


def test_another_wallet(payer: Tally, site: str) -> None:
    """--wallet chooses whose account it is."""
    address = payer.wallet("node")
    assert payer("sign-in", site, "--wallet", "node")["account"] == checksum(address)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"domain": "bank.example"}, "another site"),
        ({"uri": "https://bank.example/sign-in"}, "another site"),
        ({"statement": "Pay\nURI: https://bank.example"}, "line 5"),
        ({"nonce": "short"}, "Nonce"),
        ({"chainId": "1"}, "chainId"),
        ({"issuedAt": 1 << 60}, "Unix time"),
    ],
)
def test_servers_that_want_another_signature(payer: Tally, change: dict[str, Any], named: str) -> None:
    """A server that asks for a signature for another site, or sends what is no challenge, gets none."""

    async def challenge(request: Request) -> Response:
        origin = f"http://{request.headers['host']}"
        return JSONResponse(Site().sign_in.challenge(origin, None) | change)

    with serving(Starlette(routes=[Route("/sign-in/challenge", challenge, methods=["POST"])])) as url:
        assert named in payer("sign-in", url, fails=True)["message"]


def test_what_is_no_site(payer: Tally) -> None:
    """An address without sign-in, without a server, or that is none, is said to be that."""
    with serving(Starlette()) as url:
        assert "has no sign-in" in payer("sign-in", url, fails=True)["message"]
    assert "does not answer" in payer("sign-in", "http://127.0.0.1:9", fails=True)["message"]
    for wrong in ("ftp://a", "http://", "http://user@host", "http://host:99999999", "http://[::1"):
        assert "URL: expected" in payer("sign-in", wrong, fails=True)["message"], wrong
    assert "got both" in payer("sign-in", "http://a", "--open", "--bearer", fails=True)["message"]
