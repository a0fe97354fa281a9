"""The market's pages in a real browser: accessible, readable at two widths, usable by keyboard; proofs checked there."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Literal

import pytest
from playwright.async_api import Route

from tallystick.protocol import merkle
from tallystick.protocol.types import Amount
from tallystick.web.static_files import STATIC_PATH, versioned
from tests.coordinator.harness import PAYER, World
from tests.coordinator.live_server import Served, served
from tests.coordinator.pages.test_market_pages import HOSTILE, _job, _signed
from tests.web.browser import NARROW, WIDE, browsing, look_at, needs_browser

pytestmark = needs_browser


@pytest.fixture
async def at() -> AsyncIterator[Served]:
    """A market with hostile names, a history and a log."""
    world = World()
    async with served(world) as market:
        await world.market.start()
        world.node("ann", model="llama-3.3-70b-instruct", output_price=400_000)
        for number, name in enumerate(HOSTILE):
            world.node(f"node {number}", model=name)
        world.funds.free[PAYER.address] = Amount(10**9)
        for _ in range(4):
            await _job(world)
            market.app.pages.history._due = 0.0
            market.app.pages.sample()
        await _signed(world)
        yield market


@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "dark"), (WIDE, "light")])
async def test_every_page(at: Served, width: int, scheme: Literal["light", "dark"]) -> None:
    """No complaint of the browser, no violation by axe-core, nothing wider than the window, in both schemes."""
    node = at.world.nodes[0]
    paths = {
        "models": "/market",
        "none-fits": "/market?q=nothing&price=abc",
        "model": "/market/models/llama-3.3-70b-instruct",
        "provider": f"/market/providers/{node.address}",
        "log": "/market/log",
        "receipt": "/market/receipt",
        "status": "/market/status",
    }
    async with browsing(at.url, width=width, scheme=scheme) as page:
        for name, path in paths.items():
            answer = await page.goto(path)
            assert answer is not None
            assert answer.ok
            assert len(await answer.body()) < 200_000
            await look_at(page, f"market-{name}")


async def test_by_keyboard(at: Served) -> None:
    """From the address bar: skip to the content, filter, open a model, without a mouse."""
    async with browsing(at.url) as page:
        await page.goto("/market")
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.textContent") == "Skip to the content"
        await page.keyboard.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "content"
        await page.keyboard.press("Tab")
        await page.keyboard.type("LLAMA")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/market?q=LLAMA*")
        assert await page.locator("tbody tr").count() == 1
        await page.locator("tbody a").focus()
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/market/models/**")
        assert await page.inner_text("h1") == "llama-3.3-70b-instruct"


async def _forge(member: str, route: Route) -> None:
    """Answers with a proof one digit of which is changed."""
    answer = await route.fetch()
    proof = json.loads(await answer.text())
    if member == "root":
        proof["head"]["message"]["root"] = _changed(proof["head"]["message"]["root"])
    elif member == "path":
        proof["path"][0] = _changed(proof["path"][0])
    else:
        proof["leaf"] = _changed(proof["leaf"])
    await route.fulfill(response=answer, body=json.dumps(proof))


def _changed(text: str) -> str:
    return text[:-1] + ("0" if text[-1] != "0" else "1")


async def test_proofs_are_checked_in_the_browser(at: Served) -> None:
    """A leaf verifies; one whose contents, path or head were changed on the way does not, and the page says so."""
    async with browsing(at.url) as page:
        await page.goto("/market/log")
        await page.locator("button[data-leaf='1']").focus()
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#result.good")
        assert "Verified: leaf 1" in await page.inner_text("#result")
        for member in ("leaf", "path", "root"):
            await page.route("**/v1/log/inclusion*", partial(_forge, member))
            await page.click("button[data-leaf='2']")
            await page.wait_for_selector("#result.error")
            assert "NOT verified, leaf 2" in await page.inner_text("#result")
            await page.unroute("**/v1/log/inclusion*")
            await page.click("button[data-leaf='0']")
            await page.wait_for_selector("#result.good")


async def test_the_browser_computes_the_roots_of_the_protocol(at: Served) -> None:
    """For every leaf of logs of up to 20 leaves, and never for another leaf, size or path."""
    leaves = [merkle.leaf_hash(bytes([number])) for number in range(20)]
    cases = list[tuple[int, int, str, list[str]]]()
    roots = list[str]()
    for size in range(1, len(leaves) + 1):

        def hashed(part: merkle.Range) -> str:
            edge = merkle.Edge()
            for leaf in leaves[part[0] : part[1]]:
                edge.append(leaf)
            return edge.root().hex()

        for index in range(size):
            path = [hashed(part) for part in merkle.inclusion_ranges(index, size)]
            cases.append((index, size, leaves[index].hex(), path))
            roots.append(hashed((0, size)))
    script = """async ([address, cases]) => {
        const {rootOf} = await import(address);
        const bytes = (hex) => Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16));
        const hex = (data) => Array.from(data, (byte) => byte.toString(16).padStart(2, "0")).join("");
        const answers = [];
        for (const [index, size, leaf, path] of cases)
            answers.push(await rootOf(index, size, bytes(leaf), path.map(bytes)).then(hex, (error) => `error: ${error.message}`));
        return answers;
    }"""
    async with browsing(at.url) as page:
        await page.goto("/market/log")
        address = f"{STATIC_PATH}/{versioned('log_proof.js')}"
        assert await page.evaluate(script, [address, cases]) == roots
        wrong = [(index, size, leaf, path[:-1]) for index, size, leaf, path in cases if path]
        wrong += [(index, size, leaf, [*path, leaf]) for index, size, leaf, path in cases]
        wrong += [(size, size, leaf, path) for _, size, leaf, path in cases]
        assert all(answer.startswith("error: ") for answer in await page.evaluate(script, [address, wrong]))
