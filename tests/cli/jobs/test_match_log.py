"""`tally log`: evidence files are judged offline, and a log is read and replayed from a real coordinator's routes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.storage.memory import MemoryLogStore
from tallystick.cli.jobs.match_log import _proven_leaf, _replay
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.log_evidence import Fraud, LogEvidence
from tallystick.protocol.log_leaves import RestartLeaf
from tallystick.protocol.match_log import MatchLeaf, draw_of
from tests.cli.conftest import Tally
from tests.coordinator.jobs.test_audit_reports import paid_job, request
from tests.coordinator.live_server import Served, served
from tests.protocol.test_log_monitor import COORDINATOR, DOMAIN, LATE, Coordinator, ask, matched, monitor


def test_evidence_is_judged_offline(tally: Tally, tmp_path: Path) -> None:
    """Two roots for one size are proven; a missing match is said to rest on the reporter's word, with exit code 1."""
    one, other = Coordinator(), Coordinator()
    one.leaves.append(matched(1)[0].leaf)
    other.leaves.append(matched(2)[0].leaf)
    split, missing = tmp_path / "split.json", tmp_path / "missing.json"
    split.write_bytes(LogEvidence(Fraud.SPLIT, DOMAIN, COORDINATOR.address, (one.head(), other.head())).dumps())
    assert tally("log", "verify", str(split)) == {"proven": True, "finding": Fraud.SPLIT.value}
    assert "proven: two heads of the same size" in tally.says("log", "verify", str(split))
    watch = monitor()
    watch.add_match(*matched(1), LATE - 100)
    other.signed_at = LATE
    (evidence,) = ask(watch, other, LATE)
    missing.write_bytes(evidence.dumps())
    assert "not proven to others: another leaf is number 1" in tally.says("log", "verify", str(missing), code=1)
    assert tally("log", "verify", __file__, fails=True)["code"] == "bad_message"
    forged = replace(evidence, fraud=Fraud.SPLIT, heads=(one.head(), one.head()))
    split.write_bytes(forged.dumps())
    assert "one log" in tally("log", "verify", str(split), fails=True)["message"]


async def _logged(at: Served) -> None:
    """A served market with some matches."""
    at.world.market.matchmaker.draw = draw_of
    await at.world.market.start()
    node = at.world.node("ann", slots=64)
    for _ in range(3):
        await at.world.started(node)
    await at.world.market.match_log.sign_head()


async def test_a_coordinators_log_is_replayed() -> None:
    """An honest log has no fault; a leaf is shown only if the signed head contains it."""
    async with served() as at:
        await _logged(at)
        async with CoordinatorClient(at.url, ClientConfig(coordinator=at.url)) as client:
            replay, faults, size = await _replay(client)
            assert (faults, size, replay.matches, replay.restarts) == ([], 4, 3, 1)
            assert isinstance((await _proven_leaf(client, 0))["leaf"], RestartLeaf)
            leaf = (await _proven_leaf(client, 2))["leaf"]
            assert isinstance(leaf, MatchLeaf)
            with pytest.raises(BadMessage, match="expected a leaf below 4"):
                await _proven_leaf(client, 4)


async def test_a_changed_log_is_named() -> None:
    """A coordinator that changed a leaf after it had signed the head is found out by the replay and by the proof of the leaf."""
    async with served() as at:
        await _logged(at)
        store = at.world.log_store
        assert isinstance(store, MemoryLogStore)
        store.rows[2] = replace(store.rows[1], number=2)
        async with CoordinatorClient(at.url, ClientConfig(coordinator=at.url)) as client:
            _, faults, _ = await _replay(client)
            assert any("do not have the root" in fault.text for fault in faults)
            with pytest.raises(BadMessage, match="does not contain it"):
                await _proven_leaf(client, 2)


async def test_a_dropped_report_is_named() -> None:
    """A report that the coordinator promised to log is in its log; another leaf there, and a log that ends before, are faults."""
    async with served() as at:
        at.world.market.matchmaker.draw = draw_of
        await at.world.market.start()
        node = at.world.node("ann")
        ack = await at.world.market.audit_reports.accept(request(await paid_job(at.world, node), seals=True))
        promise = Signed(ack.message, ack.signature)
        await at.world.market.match_log.sign_head()
        other = Signed(replace(ack.message, leaf_hash=ack.message.report_hash), ack.signature)
        late = Signed(replace(ack.message, index=99), ack.signature)
        stranger = Signed(replace(other.message, coordinator=COORDINATOR.address), ack.signature)
        async with CoordinatorClient(at.url, ClientConfig(coordinator=at.url)) as client:
            replay, faults, _ = await _replay(client, [promise, stranger])
            assert (faults, replay.reports, len(replay.promises)) == ([], 1, 1)
            _, faults, _ = await _replay(client, [other])
            assert [(fault.index, "and dropped it" in fault.text) for fault in faults] == [(ack.message.index, True)]
            assert (await _replay(client, [late]))[1] == []
            at.world.clock.seconds += 61
            await paid_job(at.world, node)
            await at.world.market.match_log.flush()
            await at.world.market.match_log.sign_head()
            _, (fault,), _ = await _replay(client, [late])
            assert "its log ends before" in fault.text
