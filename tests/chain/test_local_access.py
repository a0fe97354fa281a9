"""Access to a local chain over real HTTP: programs on this machine, and only web pages that the operator named."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from tallystick.chain.devnet import build_app
from tests.chain.harness import serving

WALLET = "https://wallet.example"
TRAVEL = {"jsonrpc": "2.0", "id": 1, "method": "evm_increaseTime", "params": [1_000]}
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}


@pytest.fixture(scope="module")
def named() -> Iterator[str]:
    """A chain that serves the pages of one wallet, and under one name of its own."""
    with serving(build_app(origins=[WALLET], hosts=["Chain.Internal"])) as url:
        yield url


async def _send(url: str, headers: dict[str, str], method: str = "POST", path: str = "/") -> httpx.Response:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120) as http:
        body = TRAVEL if method == "POST" else None
        return await http.request(method, path, json=body, headers=headers)


def _clock(answer: httpx.Response) -> bool:
    """Returns whether the request reached the chain."""
    return answer.status_code == 200 and "result" in answer.json()


PAGES = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": ""},
    {"origin": "http://localhost:3000"},
    {"origin": "https://wallet.example.evil.example"},
    {"origin": "http://wallet.example"},
    {"origin": "https://evil.example", "content-type": "text/plain", "sec-fetch-mode": "no-cors"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "Cross-Site", "sec-fetch-mode": "no-cors"},
]


@pytest.mark.parametrize("headers", PAGES, ids=str)
async def test_a_foreign_web_page_does_not_move_the_clock(chain_url: str, named: str, headers: dict[str, str]) -> None:
    """A browser's request for a page that was not named is refused, whether the chain names no page or another one."""
    for url in (chain_url, named):
        for answer in (await _send(url, headers), await _send(url, headers, "GET", "/health")):
            assert answer.status_code == 403
            assert "allow-origin" in answer.json()["error"]["message"]
            assert not [name for name in answer.headers if name.startswith("access-control")]
        asked = await _send(url, headers | PREFLIGHT, "OPTIONS")
        assert asked.status_code == 403
        assert "access-control-allow-origin" not in asked.headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8545", "127.0.0.1.evil.example", "localhost.evil.example", "127.1", "[", "a b", ""]
)
async def test_a_name_that_was_pointed_here_is_not_served(chain_url: str, host: str) -> None:
    """DNS rebinding is refused: a page whose own name resolves to this machine sends its name as Host, without a foreign
    Origin.
    """
    answer = await _send(chain_url, {"host": host})
    assert answer.status_code in {400, 403}  # the server itself refuses an invalid host name


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}", "10.1.2.3", "chain.localhost"]
)
async def test_local_programs_move_the_clock(chain_url: str, host: str) -> None:
    """Programs that send no Origin (web3 libraries, forge, cast and curl) are served."""
    port = str(urlsplit(chain_url).port)
    for headers in ({}, {"user-agent": "foundry"}, {"sec-fetch-mode": "cors"}, {"sec-fetch-site": "none"}):
        answer = await _send(chain_url, {"host": host.format(port=port)} | headers)
        assert _clock(answer)
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_named_wallet_page_is_served(named: str) -> None:
    """A named page's preflight and requests are answered with CORS headers for its origin alone."""
    asked = await _send(named, {"origin": WALLET, "sec-fetch-site": "cross-site"} | PREFLIGHT, "OPTIONS")
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, WALLET)
    answer = await _send(named, {"origin": WALLET, "sec-fetch-site": "cross-site"})
    assert _clock(answer)
    assert answer.headers["access-control-allow-origin"] == WALLET
    assert "origin" in answer.headers["vary"].lower()
    assert (await _send(named, {"origin": WALLET, "host": "evil.example"})).status_code == 403


async def test_a_named_host_is_served(chain_url: str, named: str) -> None:
    """A container network's host name is served only if the operator named it."""
    assert _clock(await _send(named, {"host": "chain.internal:8545"}))
    assert (await _send(chain_url, {"host": "chain.internal:8545"})).status_code == 403


async def test_all_pages_only_where_the_operator_says_so() -> None:
    """With "*" any page is served, as on other test chains; a foreign Host is still refused."""
    with serving(build_app(origins=["*"])) as url:
        assert _clock(await _send(url, {"origin": "https://any.example"}))
        assert (await _send(url, {"origin": "https://any.example", "host": "any.example"})).status_code == 403
