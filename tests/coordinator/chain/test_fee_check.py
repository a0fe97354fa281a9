"""A coordinator whose configured fee differs from the registered one does not start, and logs a later difference."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from coordinator import app as module
from coordinator.app import running
from coordinator.chain import fee_check
from coordinator.chain.fee_check import FeeCheck
from coordinator.config import CoordinatorConfig
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.logs import configure
from tests.coordinator.fake_escrow import DEPLOYMENT, FakeEscrow
from tests.coordinator.harness import COORDINATOR
from tests.coordinator.live_server import TIMEOUT_SECONDS


@pytest.fixture
def escrow() -> FakeEscrow:
    """A chain on which nothing is registered."""
    return FakeEscrow()


@pytest.mark.parametrize(("configured", "registered"), [(0, 1), (0, 500), (100, 101), (100, 99), (10_000, 0)])
async def test_no_coordinator_starts_with_an_unregistered_fee(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, escrow: FakeEscrow, configured: int, registered: int
) -> None:
    """Higher or lower, the error names both rates, the setting and the command."""
    DEPLOYMENT.save(tmp_path / "deployment.json")
    monkeypatch.setattr(module, "Escrow", lambda *_: escrow)
    escrow.fees[COORDINATOR.address] = registered
    config = CoordinatorConfig(
        deployment=tmp_path / "deployment.json", port=0, db=f"sqlite:///{tmp_path}/c.db", fee_bps=configured
    )
    with pytest.raises(BadMessage) as caught:
        async with running(config, COORDINATOR):
            pytest.fail("it started")
    for part in (
        f"told {configured} ",
        f"{registered} are registered",
        f"tally coordinator fee {configured}`",
        f"fee_bps = {registered}",
    ):
        assert part in str(caught.value)
    async with running(replace(config, fee_bps=registered), COORDINATOR) as port:
        assert port


async def test_a_chain_that_is_away_stops_no_start(escrow: FakeEscrow, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreachable or silent chain costs a warning and a few seconds."""
    escrow.down = True
    check = FeeCheck(escrow, COORDINATOR.address, 7)
    with capture_logs() as logs:
        await check.check_at_start()
        monkeypatch.setattr(fee_check, "START_SECONDS", 0.01)
        monkeypatch.setattr(escrow, "fee_bps", lambda _account: asyncio.sleep(TIMEOUT_SECONDS))
        await check.check_at_start()
    assert [(entry["log_level"], entry["fee_bps"], bool(entry["reason"])) for entry in logs] == [("warning", 7, True)] * 2


async def test_a_fee_that_is_raised_later_does_not_go_unnoticed(escrow: FakeEscrow) -> None:
    """Each new rate is one error in the log, not one per check; a return to the old rate is logged; a dead chain ends nothing."""
    configure(json=True)  # another test may have changed the level
    escrow.fees[COORDINATOR.address] = 100
    check = FeeCheck(escrow, COORDINATOR.address, 100, interval=0.001)
    await check.check_at_start()
    with capture_logs() as logs:
        watching = asyncio.create_task(check.run())
        for number, rate in enumerate((400, 300, 100), 1):
            escrow.fees[COORDINATOR.address] = rate
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while len(logs) < number:  # noqa: ASYNC110 - a log is no event
                    await asyncio.sleep(0.001)
        escrow.down = True
        await asyncio.sleep(0.01)
        assert not watching.done()
        watching.cancel()
    levels = [entry["log_level"] for entry in logs if "reason" not in entry]
    assert levels == ["error", "error", "info"]
    assert "but 400 are registered" in logs[0]["do"]
    assert "but 300 are registered" in logs[1]["do"]
