"""`tally audit`, from the wallet's files alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tallystick.audit.token_counts import PooledCounts
from tallystick.audit.verdicts import Finding, Verdict
from tallystick.cli.jobs.audits import app
from tallystick.client.audits.records import AuditEnd, NewAudit, Opinion
from tallystick.client.audits.schema import AuditKind, Origin
from tallystick.client.audits.store import AuditStore
from tallystick.client.config import ClientConfig
from tallystick.client.ledger.ledger import Ledger
from tallystick.protocol.types import Amount
from tests.client.parties import ALICE, DOMAIN, NOW_S, PAYER, take

JOB = "01" * 16


class Files:
    """A wallet's files and the command on them."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "client.toml"
        self.config.write_text(f'ledger_file = "{folder / "a.db"}"\n')
        self.settings = ClientConfig(ledger_file=folder / "a.db")

    def fill(self, act: Callable[[AuditStore, Ledger], Awaitable[None]]) -> None:
        """Changes the files as a gateway does."""

        async def run() -> None:
            ledger = await Ledger.open(self.settings.ledger_path(PAYER.address), PAYER.address)
            store = await AuditStore.open(self.settings.audits_path(PAYER.address))
            await act(store, ledger)
            await store.close()
            await ledger.close()

        asyncio.run(run())

    def run(self, *arguments: str, code: int = 0) -> str:
        """What the command prints."""
        result = CliRunner().invoke(app, [*arguments, "--config", str(self.config), "--wallet", PAYER.address])
        assert result.exit_code == code, result.output
        return result.stdout


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Files with one audit, of Alice."""
    files = Files(tmp_path)

    async def audit(store: AuditStore, ledger: Ledger) -> None:
        await take(ledger, ALICE)
        new = NewAudit(AuditKind.JOB, Origin.DRAWN, ALICE.address, "m", "bf16", JOB, b"")
        number = await store.add(new, NOW_S)
        assert number == 1
        finding = Finding("divergence", 0.25, 0.01)
        opinion = Opinion("own:desk", Verdict.SUSPECT, (finding,), PooledCounts(10, 9), Amount(1_500), NOW_S)
        await store.add_opinion(1, opinion)
        await store.finish(1, AuditEnd(Verdict.SUSPECT, "1 of 1 referees: divergence"), NOW_S)

    files.fill(audit)
    return files


def test_list(files: Files) -> None:
    """Every audit, with its verdict and cost in dollars."""
    text = " ".join(files.run("list").split())
    assert JOB in text
    assert "suspect" in text
    (audit,) = json.loads(files.run("list", "--json"))
    assert (audit["job"], audit["provider"], audit["cost"], audit["verdict"]) == (JOB, ALICE.address, "1500", "suspect")


@pytest.mark.parametrize("name", [JOB, "1"])
def test_show(files: Files, name: str) -> None:
    """By the job, or by the audit's number: each test of each referee."""
    text = " ".join(files.run("show", name).split())
    assert "own:desk" in text
    assert "0.0015" in text
    shown = json.loads(files.run("show", name, "--json"))
    (opinion,) = shown["opinions"]
    assert opinion["findings"] == [
        {"test": "divergence", "statistic": 0.25, "threshold": 0.01, "conclusive": True, "verdict": "suspect"}
    ]


def withhold(files: Files, *jobs: int) -> None:
    """Adds audits of Alice's answers to these jobs, which cannot be checked."""

    async def audit(store: AuditStore, _ledger: Ledger) -> None:
        for job in jobs:
            number = await store.add(NewAudit(AuditKind.JOB, Origin.DRAWN, ALICE.address, "m", "bf16", f"{job:032x}", b""), NOW_S)
            assert number is not None
            await store.finish(number, AuditEnd(Verdict.INCONCLUSIVE, "kept back", unverifiable=True), NOW_S)

    files.fill(audit)


def test_providers(files: Files) -> None:
    """Each provider's audits by outcome, and its integrity."""
    (provider,) = json.loads(files.run("providers", "--json"))
    assert provider == {
        "provider": ALICE.address,
        "model": "m",
        "precision": "bf16",
        "passed": 0,
        "suspect": 1,
        "inconclusive": 0,
        "unverifiable": 0,
        "integrity": 1.3,
        "named": False,
    }
    assert ALICE.address in files.run("providers")


def test_who_hides_is_named_where_audits_are_shown(files: Files) -> None:
    """From three answers on, that are more than a fifth; with the outcome of each audit."""
    withhold(files, 2, 3)
    assert "cannot be checked" not in _all(files, "list")
    withhold(files, 4, 5)
    for command in (("list",), ("providers",), ("show", JOB)):
        assert f"{ALICE.address}: 4 of its latest 5 audited answers of m cannot be checked" in _all(files, *command), command
    assert "inconclusive, unverifiable" in _all(files, "list", "-n", "1")
    shown = json.loads(files.run("show", JOB, "--json"))
    assert {name: shown["providerAudits"][name] for name in ("suspect", "unverifiable", "named")} == {
        "suspect": 1,
        "unverifiable": 4,
        "named": True,
    }
    assert [audit["unverifiable"] for audit in json.loads(files.run("list", "-n", "1", "--json"))] == [True]


def _all(files: Files, *arguments: str) -> str:
    """What a command prints, its notes too, in one line."""
    result = CliRunner().invoke(app, [*arguments, "--config", str(files.config), "--wallet", PAYER.address])
    return " ".join(result.output.split())


def test_unblock(files: Files) -> None:
    """It may have orders again, and its audits so far count no more."""

    async def block(_store: AuditStore, ledger: Ledger) -> None:
        assert await ledger.block(DOMAIN, ALICE.address, "audits confirm it")
        assert not await ledger.block(DOMAIN, ALICE.address, "audits confirm it")

    async def check(store: AuditStore, ledger: Ledger) -> None:
        assert await ledger.blocked(DOMAIN) == {}
        assert await store.history(ALICE.address, "m", "bf16") == []

    files.fill(block)
    files.run("unblock", ALICE.address)
    files.fill(check)


def test_consent(files: Files) -> None:
    """What the user says is kept in a file that only the user can read."""
    assert json.loads(files.run("share", "--json")) == {"sharePrompts": None, "config": None}
    files.run("share", "--allow")
    path = files.settings.consent_path(PAYER.address)
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(files.run("share", "--json"))["sharePrompts"] is True
    files.run("share", "--forbid")
    assert json.loads(files.run("share", "--json"))["sharePrompts"] is False


def test_a_job_stands_for_its_audit(files: Files) -> None:
    """`tally audit JOB` is `tally audit job JOB`: here, with a wallet that cannot sign."""
    for arguments in ((JOB,), ("job", JOB)):
        result = CliRunner().invoke(app, [*arguments, "--config", str(files.config), "--wallet", PAYER.address])
        assert "expected a wallet that can sign" in str(result.exception)
    result = CliRunner().invoke(app, ["no-job", "--config", str(files.config), "--wallet", PAYER.address])
    assert "JOB: expected 32 hex digits" in str(result.exception)
