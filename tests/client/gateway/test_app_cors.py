"""Web pages as browsers treat them: preflights, headers on every answer, and settings that would let all pages spend."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tallystick.client.config import ApiKey, ClientConfig, load_config
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.auth import check_public_access
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, STREAM, FakeMarket

KEY = "a-secret-0123456789"
PAGE = "https://app.example"
SENT = {"origin": PAGE, "authorization": f"Bearer {KEY}", "sec-fetch-site": "cross-site"}
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os,x-tally-options",
}


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway with these settings."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        yield http


@pytest.mark.parametrize("origins", [("*",), ("http://localhost:3000", "*"), (PAGE,), ("HTTPS://App.Example",)])
@pytest.mark.parametrize("keys", [{"api_key": KEY}, {"api_keys": (ApiKey(label="ann", secret=KEY),)}])
async def test_a_page_with_a_key_is_served(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, origins: tuple[str, ...], keys: dict[str, object]
) -> None:
    """A page gets through its preflight without a key, and then with the key every answer, which it may read with its headers."""
    allowed = "*" if "*" in origins else PAGE
    async with gateway(fake, wallet, replace(config, allow_origins=origins, **keys)) as http:  # type: ignore[arg-type]
        for path in (CHAT, "/v1/models", "/chat/completions", "/v1/responses/x"):
            asked = await http.options(path, headers=PREFLIGHT)
            assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, allowed)
            assert asked.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
            assert "POST" in asked.headers["access-control-allow-methods"]
        answers = [
            (await http.post(CHAT, json=BODY, headers=SENT), 200),
            (await http.post(CHAT, json=STREAM, headers=SENT), 200),
            (await http.get("/v1/models", headers=SENT), 200),
            (await http.get("/health", headers={"origin": PAGE}), 200),
            (await http.post(CHAT, content=b"{", headers=SENT), 400),
            (await http.post(CHAT, json=BODY, headers=SENT | {"authorization": "Bearer wrong"}), 401),
            (await http.post(CHAT, json=BODY, headers={"origin": PAGE}), 401),
            (await http.get("/v1/files", headers=SENT), 404),
            (await http.post(CHAT, content=b"x", headers=SENT | {"content-encoding": "lz4"}), 415),
        ]
        for answer, status in answers:
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, allowed)
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert {"x-tally-job", "x-tally-cost", "retry-after", "x-should-retry"} <= set(exposed)
    assert len(fake.submissions) == 2


async def test_private_network_access(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A public page that is allowed may reach this machine, another may not."""
    private = {"access-control-request-private-network": "true"}
    async with gateway(fake, wallet, replace(config, allow_origins=(PAGE,))) as http:
        asked = await http.options(CHAT, headers=PREFLIGHT | private)
        assert (asked.status_code, asked.headers["access-control-allow-private-network"]) == (200, "true")
        other = await http.options(CHAT, headers=PREFLIGHT | private | {"origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


async def test_other_pages_stay_out(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A page that is not allowed gets no leave, with and without a key; without a setting no page does."""
    other = {"origin": "https://evil.example"}
    settings = [{"allow_origins": (PAGE,)}, {"allow_origins": (PAGE,), "api_key": KEY}, {}, {"api_key": KEY}]
    for setting in settings:
        async with gateway(fake, wallet, replace(config, **setting)) as http:  # type: ignore[arg-type]
            for answer in (
                await http.options(CHAT, headers=PREFLIGHT | other),
                await http.post(CHAT, json=BODY, headers=other),
                await http.post(CHAT, content=b"{", headers=SENT | other),
            ):
                assert answer.status_code in (400, 401)
                assert "access-control-allow-origin" not in answer.headers
    assert not fake.submissions


def test_all_pages_need_a_key(tmp_path: Path, wallet: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that all pages could use does not start without an API key, and says what to set."""
    path = tmp_path / "client.toml"
    path.write_text('allow_origins = ["http://localhost:3000", "*"]\n')
    loaded = load_config(path)  # other commands do not serve
    for check in (check_public_access, lambda config: build_app(Market("http://127.0.0.1:1", wallet, config))):
        with pytest.raises(BadMessage, match=r"would let every web page spend from this wallet.*TALLY_GATEWAY_API_KEY"):
            check(loaded)
    monkeypatch.setenv("TALLY_GATEWAY_API_KEY", KEY)
    check_public_access(load_config(path))


@pytest.mark.parametrize(
    "origin", ["http://localhost:3000/", "localhost:3000", "https://*.example.com", "**", "null", "", "http://a b"]
)
def test_origins_that_no_browser_sends(origin: str) -> None:
    """An origin that could never match is refused with its value."""
    with pytest.raises(BadMessage, match=r"allow_origins: expected origins such as .* got "):
        ClientConfig(allow_origins=(origin,))
