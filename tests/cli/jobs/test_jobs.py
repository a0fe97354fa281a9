from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import Code, Fault, Unavailable
from tests.chain.harness import person
from tests.cli.conftest import PASSWORD, Tally
from tests.client.fake_coordinator import BODY, CHAT
from tests.client.parties import MODEL

WALLET = person("wallet default")


def _job(payer: Tally, url: str) -> str:
    """A finished job of the wallet; its id."""

    async def run() -> str:
        async with Market(url, WALLET, ClientConfig(ledger_file=payer.home / "client" / f"{WALLET.address}.db")) as market:
            async with await market.submit(CHAT, BODY) as job:
                await job.result()
            return job.id.hex()

    return asyncio.run(run())


def test_a_job_is_shown(payer: Tally, url: str) -> None:
    """What the books have and what the coordinator tells of it, for people and for programs."""
    number = _job(payer, url)
    shown = payer("job", "show", number, "--coordinator", url)
    assert (shown["state"], shown["model"], shown["coordinator"]["state"]) == ("completed", MODEL, "completed")
    text = payer.says("job", "show", "0x" + number, "--coordinator", url)
    for part in ("completed", MODEL, shown["receipt"]["digest"][:24], "orders that this wallet signed", "attempts"):
        assert part in text
    assert payer("job", "show", number, "--offline")["coordinator"] is None
    assert "coordinator says │ nothing: not asked" in payer.says("job", "show", number, "--offline")


def test_a_coordinator_that_is_away_hides_nothing(payer: Tally, url: str) -> None:
    """The books are shown all the same, and why the coordinator said nothing."""
    number = _job(payer, url)
    assert "127.0.0.1:9" in payer.says("job", "show", number, "--coordinator", "http://127.0.0.1:9")


def test_a_coordinator_tells_a_job_to_nobody_without_the_wallets_key(
    payer: Tally, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the password, and for an address alone, the books are shown with what to do; a password file does."""
    number = _job(payer, url)
    show = ("job", "show", number, "--coordinator", url)
    (tmp_path / "password").write_text(PASSWORD)
    monkeypatch.delenv("TALLYSTICK_PASSWORD")
    shown = payer(*show)
    assert (shown["state"], shown["coordinator"]) == ("completed", None)
    text = payer.says(*show)
    assert "its payer only" in text
    assert "TALLYSTICK_PASSWORD_FILE" in text
    assert payer(*show, "--password-file", str(tmp_path / "password"))["coordinator"]["state"] == "completed"
    assert "instead of its address" in payer.says(*show, "--wallet", WALLET.address)
    monkeypatch.setenv("TALLYSTICK_PASSWORD", "of another wallet")
    assert payer(*show)["state"] == "completed"


def test_jobs_are_listed(payer: Tally, url: str) -> None:
    """The newest first, and no more than asked for."""
    assert payer("job", "list") == []
    first, second = _job(payer, url), _job(payer, url)
    assert [known["job"] for known in payer("job", "list")] == [second, first]
    assert [known["job"] for known in payer("job", "list", "-n", "1")] == [second]
    assert second in payer.says("job", "list")


def test_where_the_money_went(payer: Tally, url: str, tmp_path: Path) -> None:
    """By what one likes, with the budgets of the config, for people, programs and spreadsheets."""
    assert payer("spending") == {"spent": [], "budgets": []}
    _job(payer, url), _job(payer, url)
    config = tmp_path / "client.toml"
    config.write_text('[[budgets]]\nper_day = "0.000012"\n[[budgets]]\nper_day = "1"\nlabel = "research"\n')
    told = payer("spending", "--by", "model", "--config", str(config))
    assert [(one["model"], one["requests"], one["failed"], one["cost"]) for one in told["spent"]] == [(MODEL, 2, 0, "6")]
    assert [(one["label"], one["spent"], one["left"], one["percent"]) for one in told["budgets"]] == [
        (None, "6", "6", 50),
        ("research", "0", "1000000", 0),
    ]
    assert [one["day"][:2] for one in payer("spending")["spent"]] == ["20"]
    assert all(0 <= one["latencyMsP50"] <= one["latencyMsP99"] < 10_000 for one in told["spent"])
    text = payer.says("spending", "--by", "", "--config", str(config))
    for part in ("20 + 10", "0.000006", "50 %", "research", "everything"):
        assert part in text
    assert f",{MODEL},2,0,20,0,10,6,0.000006," in payer.says("spending", "--csv", "--by", "label,model")
    assert "--by" in payer("spending", "--by", "mood", fails=True)["message"]


@pytest.mark.parametrize("job", ["00" * 16, "no job", "0x12"])
def test_an_unknown_job(payer: Tally, job: str) -> None:
    """Said in words, and whose it is not."""
    assert payer("job", "show", job, "--offline", fails=True)["message"]


def test_a_saved_answer_is_verified_by_a_stranger(payer: Tally, url: str, tmp_path: Path) -> None:
    """What `chat --save-proof` wrote, anyone can check with nothing else; what was altered, nobody."""
    file = tmp_path / "proof.json"
    told = payer("chat", "hi", "--coordinator", url, "--save-proof", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    (payer.home / "keys" / "default.json").unlink()
    found = payer("receipt", "verify", str(file))
    assert (found["valid"], found["job"], found["cost"]) == (True, told["job"], told["cost"])
    assert "transcript" in payer.says("receipt", "verify", str(file))
    raw = json.loads(file.read_text())
    raw["response"].pop()
    file.write_text(json.dumps(raw))
    assert "lacks its end" in payer("receipt", "verify", str(file), fails=True)["message"]
    file.unlink()
    assert "No such file" in payer("receipt", "verify", str(file), fails=True)["message"]


def test_an_answer_without_a_receipt_is_not_saved(payer: Tally, tmp_path: Path) -> None:
    """Nothing is written, and the failure is the job's."""
    error = Unavailable(Code.COORDINATOR_UNAVAILABLE, "", fault=Fault.COORDINATOR)
    told = payer("chat", "hi", "-m", "m", "--coordinator", "http://127.0.0.1:9", "--save-proof", str(tmp_path / "x"), fails=True)
    assert told["code"] == error.code.value
    assert not (tmp_path / "x").exists()
