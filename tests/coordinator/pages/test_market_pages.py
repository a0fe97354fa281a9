"""The market's pages over HTTP: what they show, and that no name of a model does anything but stand there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest

from coordinator.domain.model_history import SAMPLE_SECONDS
from coordinator.pages.market_pages import LOG_ROWS
from coordinator.pages.market_view import PAGE_ROWS
from tallystick.protocol.types import Amount
from tests.coordinator.harness import PAYER, World, quiet
from tests.coordinator.live_server import Served, served

HOSTILE = [
    '<script>alert("1")</script>',
    "\"><img src=x onerror='document.title=1'>",
    "{{ 7 * 7 }}{% raw %}",
    "org/model:7b with space",
    "../../status?x=1#y",
    "模型\N{RIGHT-TO-LEFT OVERRIDE}abc",
    "javascript:alert(1)",
]


@pytest.fixture
async def at() -> AsyncIterator[Served]:
    """A market with matches in its log."""
    world = World()
    async with served(world) as market:
        await world.market.start()
        yield market


async def _job(world: World) -> None:
    node = world.nodes[0]
    client = await world.started(node)
    node.accept(client.job.id)
    node.chunk(client.job.id)
    node.complete(client.job.id)
    await quiet()


async def _signed(world: World) -> None:
    await world.market.match_log.flush()
    world.clock.seconds += 2
    await world.market.match_log.sign_head()


async def test_an_empty_market(at: Served) -> None:
    """It says what to do; nothing is missing."""
    page = await at.http.get("/market")
    assert (page.status_code, "tally node run" in page.text) == (200, True)
    assert "<table>" not in page.text


@pytest.mark.parametrize("name", HOSTILE)
async def test_names_are_text(at: Served, name: str) -> None:
    """A model's name, whatever is in it, is escaped on every page and leads to its own page."""
    node = at.world.node("ann", model=name)
    for path in ("/market", f"/market/models/{quote(name, safe='')}", f"/market/providers/{node.address}"):
        page = await at.http.get(path)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        for raw in ("<script>", "<img", 'javascript:alert(1)"'):
            assert raw not in page.text
        assert "&lt;" in page.text or "<" not in name
        assert "style=" not in page.text
        assert "onclick" not in page.text
    assert f"/market/models/{quote(name, safe='')}" in (await at.http.get("/market")).text


async def test_strict_headers(at: Served) -> None:
    """Pages run and load nothing but this server's own files, in no foreign frame; a HEAD has them too."""
    for path in ("/market", "/market/log", "/market/status", "/market/models/none", "/market/providers/x"):
        page = await at.http.get(path)
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["x-content-type-options"] == "nosniff"
    assert (await at.http.head("/market")).status_code == 200


async def test_what_a_model_and_its_provider_show(at: Served) -> None:
    """Prices in dollars, slots, speeds; the provider's decisions, none of which names the payer."""
    node = at.world.node("ann", model="m", output_price=1_250_000, input_price=250_000, cached_input_price=25_000)
    at.world.funds.free[PAYER.address] = Amount(10**9)
    await _job(at.world)
    model = await at.http.get("/market/models/m")
    for shown in ("1.25", "0.25", "0.025", node.address, "8,192"):
        assert shown in model.text
    provider = await at.http.get(f"/market/providers/{node.address}")
    assert "got the job" in provider.text
    assert PAYER.address not in provider.text + model.text


async def test_what_is_not_there(at: Served) -> None:
    """An unknown model and a bad address are pages that say so, with status 404; a provider without a connection is none."""
    for path in ("/market/models/none", "/market/providers/0x12", "/market/providers/<b>"):
        page = await at.http.get(path)
        assert (page.status_code, "All models" in page.text) == (404, True)
    page = await at.http.get(f"/market/providers/{PAYER.address}")
    assert (page.status_code, "nobody asked" in page.text) == (200, True)


async def test_many_models_are_paged(at: Served) -> None:
    """The links of the pages keep the filter."""
    for number in range(PAGE_ROWS + 1):
        at.world.node(f"node {number}", model=f"model {number:03}")
    first = (await at.http.get("/market?q=model&sort=name")).text
    assert ("model 000" in first, f"model {PAGE_ROWS:03}" in first) == (True, False)
    assert "/market?q=model&amp;sort=name&amp;page=2" in first
    second = (await at.http.get("/market?q=model&sort=name&page=2")).text
    assert ("model 000" in second, f"model {PAGE_ROWS:03}" in second) == (False, True)
    assert (await at.http.get("/market?page=9999")).status_code == 200


async def test_the_history_of_a_model(at: Served) -> None:
    """Two samples are a line; a model that is not offered any more keeps its page for a day."""
    node = at.world.node("ann", model="m")
    for _ in range(2):
        at.app.pages.sample()
        at.app.pages.sample()
        at.world.clock.seconds += SAMPLE_SECONDS
        at.app.pages.history._due = 0.0
    assert len(at.app.pages.history.of("m")) == 2
    assert (await at.http.get("/market/models/m")).text.count("<polyline") == 2
    node.leave()
    gone = await at.http.get("/market/models/m")
    assert (gone.status_code, "No provider offers this model now" in gone.text) == (200, True)


async def test_the_log(at: Served) -> None:
    """The newest leaves, with links to older ones; any number in the address is bounded."""
    at.world.node("ann", model="m", slots=1)
    at.world.funds.free[PAYER.address] = Amount(10**9)
    for _ in range(LOG_ROWS + 2):
        await _job(at.world)
    await _signed(at.world)
    newest = (await at.http.get("/market/log")).text
    assert newest.count("data-leaf=") == LOG_ROWS
    assert "/market/log?before=3" in newest
    older = (await at.http.get("/market/log?before=3")).text
    assert older.count("data-leaf=") == 3
    assert "a process of this coordinator began" in older
    for before in ("0", "-1", "x", "9" * 40, "999999", ""):
        assert (await at.http.get("/market/log", params={"before": before})).status_code == 200


async def test_status(at: Served) -> None:
    """Each dependency by name."""
    page = await at.http.get("/market/status")
    assert ("always" in page.text, "works" in page.text) == (True, True)
    home = await at.http.get("/", headers={"accept": "text/html"})
    assert 'href="market"' in home.text
