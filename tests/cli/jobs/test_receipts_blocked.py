"""`tally receipt evidence` and `tally receipt unblock` for blocked providers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from typer.testing import CliRunner

from tallystick.cli.jobs.receipts import app
from tallystick.client.ledger.ledger import Ledger
from tallystick.protocol.types import Amount
from tests.client.parties import ALICE, DOMAIN, NOW_S, PAYER, take


def test_blocked_provider_is_listed_and_unblocked(tmp_path: Path) -> None:
    """A provider that was paid beyond its receipts is listed with the reason; `unblock` removes it from the list."""
    state, config = tmp_path / "a.db", tmp_path / "client.toml"
    config.write_text(f'ledger_file = "{state}"\n')

    async def block() -> None:
        ledger = await Ledger.open(state, PAYER.address)
        await take(ledger)
        await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(10**6), NOW_S, paid=[])
        await ledger.close()

    asyncio.run(block())
    runner, common = CliRunner(), ("--config", str(config), "--wallet", PAYER.address)
    shown = runner.invoke(app, ["evidence", *common, "--json"])
    (provider,) = json.loads(shown.stdout)
    assert (provider["provider"], provider["job"]) == (ALICE.address, None)
    assert "was paid 1" in provider["reason"]
    assert "was paid 1" in " ".join(runner.invoke(app, ["evidence", *common]).stdout.split())
    assert runner.invoke(app, ["unblock", ALICE.address, *common]).exit_code == 0
    assert json.loads(runner.invoke(app, ["evidence", *common, "--json"]).stdout) == []
