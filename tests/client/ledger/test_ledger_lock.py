from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tallystick.client.ledger.ledger import Ledger
from tallystick.protocol.errors import Unavailable
from tallystick.runtime import storage
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
    monkeypatch.setattr(storage, "BUSY_SECONDS", 0.2)
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
