"""The node's watch of match logs: an order that was shown without a logged match leaves evidence; the head goes to the client."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from node.coordinator.coordinator_http import CoordinatorHttp, base_url
from node.coordinator.match_watch import MatchWatch
from node.testing.memory import MemoryLink
from tallystick.protocol.errors import Refusal, Unavailable
from tallystick.protocol.log_evidence import Fraud, LogEvidence, judge
from tallystick.protocol.log_monitor import LogQuestion
from tallystick.protocol.match_log import pack_head
from tallystick.protocol.replicas import Reach
from tests.protocol.test_log_monitor import COORDINATOR, DOMAIN, Coordinator, matched

HTTP = CoordinatorHttp(lambda _url: Reach.MACHINE)


@pytest.mark.parametrize(
    ("link", "base"),
    [
        ("ws://127.0.0.1:8420/v1/node", "http://127.0.0.1:8420"),
        ("wss://c.example/v1/node", "https://c.example"),
        ("wss://c.example/market/v1/node", "https://c.example/market"),
    ],
)
def test_the_log_is_at_the_links_address(link: str, base: str) -> None:
    """Proofs are asked for where the link was dialled."""
    assert base_url(link) == base


async def _serve(coordinator: Coordinator, status: int = 200) -> tuple[web.AppRunner, str]:
    """Serves a coordinator's proofs."""

    async def proof(request: web.Request) -> web.Response:
        question = LogQuestion(
            tuple(map(int, request.query.getall("since", []))), tuple(map(int, request.query.getall("index", [])))
        )
        return web.json_response(coordinator.answer(question) if status == 200 else {"error": {"code": "x"}}, status=status)

    app = web.Application()
    app.router.add_get("/v1/log/proof", proof)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def _evidence(folder: Path) -> list[LogEvidence]:
    return [LogEvidence.loads(path.read_bytes()) for path in folder.glob("evidence-*.json")]


async def test_an_order_that_was_not_logged_leaves_evidence(tmp_path: Path) -> None:
    """A dispatch whose match is in the log is checked off, and its head goes with the link; one that is not becomes a file with
    the signed order.
    """
    coordinator = Coordinator(signed_at=1 << 33)
    (match, order), (hidden, hidden_order) = matched(1), matched(2)
    coordinator.leaves += [match.leaf, matched(9)[0].leaf]
    runner, url = await _serve(coordinator)
    link = MemoryLink(COORDINATOR.address)
    watch = MatchWatch(DOMAIN, tmp_path, lambda _link: f"ws{url.removeprefix('http')}/v1/node", HTTP)
    try:
        watch.on_match(link, match, order)
        watch.on_match(link, hidden, hidden_order)
        inner = watch._watches[COORDINATOR.address]
        for pending in inner.monitor.pending:
            pending.received_at = 0
        await inner.check()
        assert (inner.monitor.checked, inner.monitor.pending) == (1, [])
        (evidence,) = _evidence(tmp_path)
        assert (evidence.fraud, evidence.match, evidence.order) == (Fraud.MISSING, hidden, hidden_order)
        assert link.log_head == b""
        watch.on_match(link, match, order)
        assert link.log_head == pack_head(coordinator.head())
    finally:
        await watch.close()
        await runner.cleanup()


async def test_a_client_that_was_shown_another_log_leaves_evidence(tmp_path: Path) -> None:
    """The head that came with a request, sealed, is compared with what the node was shown; a made-up one does no harm."""
    coordinator, shown_to_client = Coordinator(signed_at=1 << 33), Coordinator()
    (match, order), (other, _) = matched(1), matched(9)
    coordinator.leaves.append(match.leaf)
    shown_to_client.leaves.append(other.leaf)
    runner, url = await _serve(coordinator)
    link = MemoryLink(COORDINATOR.address)
    watch = MatchWatch(DOMAIN, tmp_path, lambda _link: url, HTTP)
    try:
        watch.on_match(link, match, order)
        inner = watch._watches[COORDINATOR.address]
        inner.monitor.pending[0].received_at = 0
        await inner.check()
        assert watch.head_of(COORDINATOR.address) == pack_head(coordinator.head())
        for made_up in (b"x", bytes(113), pack_head(coordinator.head())):
            watch.on_client_head(link, made_up)
        await inner.check()
        assert _evidence(tmp_path) == []
        watch.on_client_head(link, pack_head(shown_to_client.head()))
        await inner.check()
        (evidence,) = _evidence(tmp_path)
        assert evidence.fraud is Fraud.SPLIT
        assert judge(evidence).proven
    finally:
        await watch.close()
        await runner.cleanup()


async def test_a_head_is_kept_over_a_restart_of_the_node(tmp_path: Path) -> None:
    """A node that connects again passes on what an earlier process saw, before any job: an older log is noticed at once."""
    coordinator = Coordinator(signed_at=1 << 33)
    match, order = matched(1)
    coordinator.leaves.append(match.leaf)
    runner, url = await _serve(coordinator)
    link = MemoryLink(COORDINATOR.address)
    first, second = (MatchWatch(DOMAIN, tmp_path, lambda _link: url, HTTP) for _ in range(2))
    try:
        first.on_match(link, match, order)
        first._watches[COORDINATOR.address].monitor.pending[0].received_at = 0
        await first._watches[COORDINATOR.address].check()
        await first.close()
        assert second.head_of(COORDINATOR.address) == b""
        second.on_connected(link)
        async with asyncio.timeout(60):
            while not second.head_of(COORDINATOR.address):  # noqa: ASYNC110 - its file is read in the background
                await asyncio.sleep(0.01)
        assert second.head_of(COORDINATOR.address) == first.head_of(COORDINATOR.address)
    finally:
        await second.close()
        await runner.cleanup()


async def test_an_ended_link_does_not_change_the_logs_address(tmp_path: Path) -> None:
    """A job may end after its link; proofs are still asked for where the link was dialled."""
    urls = ["http://c.example", ""]
    watch, link = MatchWatch(DOMAIN, tmp_path, lambda _link: urls.pop(0), HTTP), MemoryLink(COORDINATOR.address)
    watch.on_match(link, *matched(1))
    watch.on_client_head(link, b"x")
    assert watch._urls == {COORDINATOR.address: "http://c.example"}
    await watch.close()


async def test_a_coordinator_without_a_log_is_no_evidence() -> None:
    """An error, an absent server and text that is no JSON raise errors that say so."""
    runner, url = await _serve(Coordinator(), 404)
    try:
        with pytest.raises(Refusal):
            await HTTP.ask_proof(url, LogQuestion((), (1,)))
    finally:
        await runner.cleanup()
    with pytest.raises(Unavailable, match="no proof from its match log"):
        await HTTP.ask_proof(url, LogQuestion((), (1,)))
