"""A node's pages, over a real store: its state, its income, its money; for browsers on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from starlette.applications import Starlette

from node.pages.provider_pages import SECTIONS, ProviderPages
from node.storage.store import SqlStore
from tallystick.protocol.types import Address
from tallystick.runtime.serving import serving
from tests.node.harness import DOMAIN, PAYER, PROVIDER
from tests.web.browser import NARROW, WIDE, browsing, look_at, needs_browser

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


@asynccontextmanager
async def _served(folder: Path, **changes: Any) -> AsyncIterator[str]:
    store = SqlStore(f"sqlite:///{folder}/node.db", PROVIDER.address, DOMAIN)
    await store.start()
    try:
        pages = ProviderPages(lambda: REPORT | changes, store, least=lambda: 1)
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
