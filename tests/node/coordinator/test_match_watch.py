"""The node's watch of match logs: an order that was shown without a logged match leaves evidence; the head goes to the client."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web

from node.coordinator.match_watch import MatchWatch, ask_proof, base_url
from node.testing.memory import MemoryLink
from tallystick.protocol.errors import Refusal, Unavailable
from tallystick.protocol.log_evidence import Fraud, LogEvidence
from tallystick.protocol.log_monitor import LogQuestion
from tallystick.protocol.match_log import pack_head
from tests.protocol.test_log_monitor import COORDINATOR, DOMAIN, Coordinator, matched


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
    watch = MatchWatch(DOMAIN, tmp_path, lambda _link: f"ws{url.removeprefix('http')}/v1/node")
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


async def test_a_coordinator_without_a_log_is_no_evidence() -> None:
    """An error, an absent server and text that is no JSON raise errors that say so."""
    runner, url = await _serve(Coordinator(), 404)
    try:
        with pytest.raises(Refusal):
            await ask_proof(url, LogQuestion((), (1,)))
    finally:
        await runner.cleanup()
    with pytest.raises(Unavailable, match="no proof from its match log"):
        await ask_proof(url, LogQuestion((), (1,)))
