"""A coordinator that hides a match from its log, or shows two logs: client and node find it over its real routes, as evidence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.jobs.match_log import MatchLog
from node.coordinator.coordinator_http import CoordinatorHttp
from node.coordinator.match_watch import MatchWatch
from node.testing.memory import MemoryLink
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.log_evidence import Fraud, LogEvidence, judge
from tallystick.protocol.match_log import MERGE_SECONDS, Match, draw_of
from tallystick.protocol.messages import Order
from tallystick.protocol.plaintext_heads import ResponseHead, dump_response_head, load_response_head, split_request
from tallystick.protocol.replicas import Reach
from tallystick.protocol.wire import Dispatch, Kind
from tallystick.runtime.log_watch import LogWatch
from tests.coordinator.harness import COORDINATOR, DOMAIN, START, FakeNode, World
from tests.coordinator.live_server import Served, served

BODY = b'{"model":"m","messages":[]}'


class HidingLog(MatchLog):
    """A log that shows matches to their parties, and does not have them."""

    __slots__ = ()

    def _append(self, data: bytes) -> int:
        del data
        return self._edge.size


@asynccontextmanager
async def _market() -> AsyncIterator[tuple[Served, FakeNode]]:
    """A served coordinator and one node."""
    async with served() as at:
        at.world.market.matchmaker.draw = draw_of
        await at.world.market.start()
        yield at, at.world.node("ann", slots=64)


async def _matched(world: World, node: FakeNode) -> tuple[Match, Signed[Order]]:
    """A job's match, as its client and its node have it, and its order."""
    client = await world.started(node)
    dispatch = Dispatch.loads(node.got(Kind.DISPATCH)[-1])
    match = Match.loads(client.frames[0][1])
    assert dispatch.match == match
    return match, dispatch.candidate.order


@asynccontextmanager
async def _parties(at: Served, node_at: Served, folder: Path) -> AsyncIterator[tuple[LogWatch, MatchWatch]]:
    """The watches of a client and of a node, each of which asks the coordinator at its own address."""
    async with CoordinatorClient(at.url, ClientConfig(coordinator=at.url)) as api:
        client = LogWatch(DOMAIN, COORDINATOR.address, folder / "client", api.log_proof, now=lambda: START + 100)
        node = MatchWatch(DOMAIN, folder / "node", lambda _link: node_at.url, CoordinatorHttp(lambda _url: Reach.MACHINE))
        try:
            yield client, node
        finally:
            await client.close()
            await node.close()


async def _check(watch: LogWatch) -> None:
    """Lets a watch ask for all that it waits for, as if it had waited for long."""
    for pending in watch.monitor.pending:
        pending.received_at = 0
    await watch.check()


def _evidence(folder: Path) -> list[LogEvidence]:
    return [LogEvidence.loads(path.read_bytes()) for path in folder.glob("evidence-*.json")]


@pytest.mark.parametrize("goes_on", [False, True], ids=["the log ends before it", "another match has its number"])
async def test_a_hidden_match_is_evidence_for_its_client_and_its_node(tmp_path: Path, *, goes_on: bool) -> None:
    """Whether the log stops there or another match took the number, both parties keep a file that says so, and why."""
    async with _market() as (at, ann), _parties(at, at, tmp_path) as (client, node):
        log, link = at.world.market.match_log, MemoryLink(COORDINATOR.address)
        honest = await _matched(at.world, ann)
        log.__class__ = HidingLog
        hidden = await _matched(at.world, ann)
        log.__class__ = MatchLog
        at.world.clock.seconds += MERGE_SECONDS + 1
        if goes_on:
            await _matched(at.world, ann)
        await log.sign_head()
        for match, order in (honest, hidden):
            client.add_match(match, order)
            node.on_match(link, match, order)
        for watch, folder in ((client, "client"), (node._watches[COORDINATOR.address], "node")):
            await _check(watch)
            (evidence,) = _evidence(tmp_path / folder)
            assert (evidence.fraud, evidence.match, evidence.order) == (Fraud.MISSING, *hidden)
            assert watch.monitor.checked == 1
            if goes_on:
                assert "another leaf is number 2 in the log" in judge(evidence).text


async def test_two_logs_are_found_by_whoever_meets_the_others_head(tmp_path: Path) -> None:
    """The client's head reaches the node in a sealed request, the node's the client in a sealed response. Both files convince
    everybody.
    """
    async with _market() as (at, ann), _market() as (other, bob), _parties(at, other, tmp_path) as (client, node):
        link = MemoryLink(COORDINATOR.address)
        client.add_match(*await _matched(at.world, ann))
        node.on_match(link, *await _matched(other.world, bob))
        inner = node._watches[COORDINATOR.address]
        for served_market, watch in ((at, client), (other, inner)):
            await served_market.world.market.match_log.sign_head()
            await _check(watch)
        assert client.packed_head
        assert inner.packed_head not in (b"", client.packed_head)
        assert _evidence(tmp_path / "client") + _evidence(tmp_path / "node") == []
        request = ApiRequest.of("/v1/chat/completions", BODY).with_log_head(client.packed_head)
        head, body = split_request(request.plaintext)
        assert body == BODY
        node.on_client_head(link, head.log_head)
        response = load_response_head(dump_response_head(ResponseHead(200, "application/json", inner.packed_head)))
        client.add_head(response.log_head)
        for watch, folder in ((client, "client"), (inner, "node")):
            await watch.check()
            (evidence,) = _evidence(tmp_path / folder)
            assert (evidence.fraud, judge(evidence).proven) == (Fraud.SPLIT, True)
