"""What a payer is told of the providers that its wallet leaves out."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from typer.testing import CliRunner

from tallystick.cli.jobs.receipts import app
from tallystick.client.ledger.ledger import Ledger
from tallystick.protocol.types import Amount
from tests.client.parties import ALICE, DOMAIN, NOW_S, PAYER, take


def test_no_provider_is_left_out_without_a_word(tmp_path: Path) -> None:
    """`tally receipt evidence` names a provider that was paid beyond its receipts, and why; `unblock` takes it back."""
    state, config = tmp_path / "a.db", tmp_path / "client.toml"
    config.write_text(f'state = "{state}"\n')

    async def block() -> None:
        ledger = await Ledger.open(state, PAYER.address)
        await take(ledger)
        await ledger.merge_proven(DOMAIN, ALICE.address, [], Amount(10**6), NOW_S, paid=[])
        await ledger.close()

    asyncio.run(block())
    runner, common = CliRunner(), ("--config", str(config), "--wallet", PAYER.address)
    told = runner.invoke(app, ["evidence", *common, "--json"])
    (one,) = json.loads(told.stdout)
    assert (one["provider"], one["job"]) == (ALICE.address, None)
    assert "was paid 1" in one["reason"]
    assert "was paid 1" in " ".join(runner.invoke(app, ["evidence", *common]).stdout.split())
    assert runner.invoke(app, ["unblock", ALICE.address, *common]).exit_code == 0
    assert json.loads(runner.invoke(app, ["evidence", *common, "--json"]).stdout) == []
