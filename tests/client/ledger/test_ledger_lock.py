from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tallystick.client.ledger.ledger import Ledger
from tallystick.protocol.errors import Unavailable
from tallystick.runtime import sqlite_backend, storage
from tests.client.parties import PAYER, take
from tests.runtime.processes import line, script

HOLDER = """
import os, signal, sqlite3, sys
file = sqlite3.connect(sys.argv[1], isolation_level=None)
file.execute("BEGIN IMMEDIATE")
print("held", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
file.execute("COMMIT")
print("let go", flush=True)
"""


async def test_a_stopped_process_that_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a stopped process holds the ledger file, orders and new processes get an error after a bounded wait. It names
    the file and what to do. When that process continues, all others do.
    """
    monkeypatch.setattr(sqlite_backend, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(storage, "START_SECONDS", 0.5)
    path = tmp_path / "state.db"
    ledger = await Ledger.open(path, PAYER.address)
    with script(HOLDER, str(path)) as holder:
        assert line(holder) == "held"
        for _ in range(2):
            with pytest.raises(Unavailable, match=rf"lock of {path} .* nothing was written.* `fuser -v {path}`") as caught:
                await take(ledger)
            assert caught.value.retry
        with pytest.raises(Unavailable, match=r"`fuser -v"):
            await Ledger.open(path, PAYER.address)
        holder.send_signal(signal.SIGCONT)
        assert line(holder) == "let go"
        await take(ledger)
    await ledger.close()


async def test_a_start_waits_for_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start waits for longer than a transaction, since another process may be migrating the file."""
    monkeypatch.setattr(sqlite_backend, "BUSY_SECONDS", 0.01)
    path = tmp_path / "state.db"
    with script(HOLDER, str(path)) as holder:
        assert line(holder) == "held"
        with capture_logs() as logs:
            opening = asyncio.create_task(Ledger.open(path, PAYER.address))
            async with asyncio.timeout(60):
                while not any("waiting for another process" in entry["event"] for entry in logs):  # noqa: ASYNC110 - a log line is no event
                    await asyncio.sleep(0.01)
        holder.send_signal(signal.SIGCONT)
        assert line(holder) == "let go"
        async with asyncio.timeout(60):
            ledger = await opening
    await take(ledger)
    await ledger.close()
