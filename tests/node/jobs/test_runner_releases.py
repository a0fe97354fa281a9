"""Orders that a coordinator sends again without their request, because the node may never have got them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import ScriptedEngine
from tallystick.protocol.messages import Outcome
from tallystick.protocol.wire import CancelReason, Failure, Kind
from tests.node.harness import NOW, PlacedJob, RunnerHarness

ANSWER = (ResponseStart(200, "text/event-stream"), ResponsePart(b"one.", has_output=True, text_bytes=4), ResponseEnd(b"done"))


def _send_again(node: RunnerHarness, placed: PlacedJob) -> None:
    node.runner.dispatch(node.link, placed.job, replace(placed.dispatch, sealed=b"").dumps())
    node.runner.cancel(node.link, placed.job, CancelReason.COORDINATOR)


async def test_an_order_that_never_came_is_released() -> None:
    """The node refuses the job with a receipt at no cost, and asks no engine. A second time it has nothing to add."""
    node = RunnerHarness(ScriptedEngine(*ANSWER))
    placed = node.client.order(node.asks.current[0])
    _send_again(node, placed)
    assert (await node.refusal_receipt(placed)).outcome == Outcome.REFUSED
    await node.ended()
    _send_again(node, placed)
    second = Failure.loads(await node.link.until(Kind.FAIL, placed.job, 2))
    assert second.receipt is None
    assert node.observer.reports == []


async def test_an_order_that_had_a_receipt_gets_no_second_one() -> None:
    """The payer would take two receipts for one order as a fraud."""
    node = RunnerHarness(ScriptedEngine(*ANSWER))
    placed = node.dispatch()
    await node.receipt(placed)
    await node.ended()
    _send_again(node, placed)
    failure = Failure.loads(await node.link.until(Kind.FAIL, placed.job))
    assert failure.receipt is None
    assert len(node.store.receipt_records) == 1


@pytest.mark.parametrize(("late", "released"), [(-61, True), (0, False), (3_600, False)])
async def test_an_order_from_before_the_start_gets_no_receipt(late: int, released: bool) -> None:
    """The node remembers no orders whose deadline passed before it started, so it may have had this one."""
    node = RunnerHarness(ScriptedEngine(*ANSWER))
    placed = node.client.order(node.asks.current[0], order_with={"deadline": NOW - late})
    node.now = NOW + 120
    _send_again(node, placed)
    failure = Failure.loads(await node.link.until(Kind.FAIL, placed.job))
    assert (failure.receipt is not None) is released


async def test_orders_that_were_forgotten_get_no_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once many are remembered, those whose deadline has passed are forgotten."""
    monkeypatch.setattr("node.jobs.runner._PRUNE_SIZE", 0)
    node = RunnerHarness(ScriptedEngine(*ANSWER))
    old = node.dispatch()
    await node.receipt(old)
    await node.ended()
    node.now = NOW + 61
    new = node.client.order(node.asks.current[0], now=node.now)
    node.runner._prune_at = 0
    node.dispatch_again(new)
    await node.receipt(new)
    await node.ended()
    _send_again(node, old)
    assert Failure.loads(await node.link.until(Kind.FAIL, old.job)).receipt is None
