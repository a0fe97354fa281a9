from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import Code
from tallystick.protocol.jobs import State
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import parse_job_id
from tests.chain.harness import person
from tests.cli.conftest import PASSWORD, Tally
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket
from tests.client.parties import MODEL

WALLET = person("wallet default")


def _finished_job(payer: Tally, url: str) -> str:
    """Runs a job with the wallet. Returns its id."""

    async def run() -> str:
        async with Market(url, WALLET, ClientConfig(ledger_file=payer.home / "client" / f"{WALLET.address}.db")) as market:
            async with await market.submit(CHAT, BODY) as job:
                await job.result()
            return job.id.hex()

    return asyncio.run(run())


def test_job_show(payer: Tally, url: str) -> None:
    """The ledger's record and the coordinator's status are shown, as text and as JSON."""
    number = _finished_job(payer, url)
    shown = payer("job", "show", number, "--coordinator", url)
    assert (shown["state"], shown["model"], shown["coordinator"]["state"]) == ("completed", MODEL, "completed")
    text = payer.says("job", "show", "0x" + number, "--coordinator", url)
    for part in ("completed", MODEL, shown["receipt"]["digest"][:24], "Orders that this wallet signed", "Attempts"):
        assert part in text
    assert payer("job", "show", number, "--offline")["coordinator"] is None
    assert "unknown: not asked" in payer.says("job", "show", number, "--offline")


def test_job_show_tells_the_place_of_a_waiting_job(payer: Tally, fake: FakeMarket, url: str) -> None:
    """A job that waits for a free slot is shown with its position and the expected wait, once that is known."""
    number = _finished_job(payer, url)
    session = fake.sessions[parse_job_id(number)]
    for place, text in (
        (QueuePlace(3), "queued: all providers are busy; number 3 in the queue"),
        (QueuePlace(2, 5_200), "number 2 in the queue, about 5 s"),
    ):
        session.state, session.place = State.QUEUED, place
        assert text in payer.says("job", "show", number, "--coordinator", url)
        assert payer("job", "show", number, "--coordinator", url)["coordinator"]["queue"]["position"] == place.position


def test_job_show_without_coordinator(payer: Tally, url: str) -> None:
    """The ledger's record is shown all the same, with the reason why the coordinator's status is missing."""
    number = _finished_job(payer, url)
    assert "127.0.0.1:9" in payer.says("job", "show", number, "--coordinator", "http://127.0.0.1:9")


def test_job_show_without_password(payer: Tally, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the password, or for an address alone, the ledger's record is shown with what to do; a password file helps."""
    number = _finished_job(payer, url)
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


def test_job_list(payer: Tally, url: str) -> None:
    """Jobs are listed newest first, and at most as many as requested."""
    assert payer("job", "list") == []
    first, second = _finished_job(payer, url), _finished_job(payer, url)
    assert [known["job"] for known in payer("job", "list")] == [second, first]
    assert [known["job"] for known in payer("job", "list", "-n", "1")] == [second]
    assert second in payer.says("job", "list")


def test_spending(payer: Tally, url: str, tmp_path: Path) -> None:
    """Spending is grouped as requested and shown with the budgets, as text, JSON and CSV."""
    assert payer("spending") == {"spent": [], "upstreams": [], "budgets": []}
    _finished_job(payer, url), _finished_job(payer, url)
    config = tmp_path / "client.toml"
    config.write_text('[[budgets]]\nper_day = "0.000012"\n[[budgets]]\nper_day = "1"\nlabel = "research"\n')
    answer = payer("spending", "--by", "model", "--config", str(config))
    assert [(line["model"], line["requests"], line["failed"], line["cost"]) for line in answer["spent"]] == [(MODEL, 2, 0, "6")]
    assert [(line["label"], line["spent"], line["left"], line["percent"]) for line in answer["budgets"]] == [
        (None, "6", "6", 50),
        ("research", "0", "1000000", 0),
    ]
    assert [line["day"][:2] for line in payer("spending")["spent"]] == ["20"]
    assert all(0 <= line["latencyMsP50"] <= line["latencyMsP99"] < 10_000 for line in answer["spent"])
    text = payer.says("spending", "--by", "", "--config", str(config))
    for part in ("20 + 10", "0.000006", "50 %", "research", "everything"):
        assert part in text
    assert f",{MODEL},2,0,20,0,10,6,0.000006," in payer.says("spending", "--csv", "--by", "label,model")
    assert "--by" in payer("spending", "--by", "mood", fails=True)["message"]


@pytest.mark.parametrize("job", ["00" * 16, "no job", "0x12"])
def test_unknown_job(payer: Tally, job: str) -> None:
    """An unknown or malformed job id gives an error message."""
    assert payer("job", "show", job, "--offline", fails=True)["message"]


def test_saved_proof_is_verified_without_a_wallet(payer: Tally, url: str, tmp_path: Path) -> None:
    """Anyone can verify a proof of `chat --save-proof` with the file alone; a modified proof is refused."""
    file = tmp_path / "proof.json"
    answer = payer("chat", "hi", "--coordinator", url, "--save-proof", str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    (payer.home / "keys" / "default.json").unlink()
    result = payer("receipt", "verify", str(file))
    assert (result["valid"], result["job"], result["cost"]) == (True, answer["job"], answer["cost"])
    assert "transcript" in payer.says("receipt", "verify", str(file))
    raw = json.loads(file.read_text())
    raw["response"].pop()
    file.write_text(json.dumps(raw))
    assert "lacks its end" in payer("receipt", "verify", str(file), fails=True)["message"]
    file.unlink()
    assert "No such file" in payer("receipt", "verify", str(file), fails=True)["message"]


def test_no_proof_without_a_receipt(payer: Tally, tmp_path: Path) -> None:
    """Nothing is written, and the error is the job's."""
    proof = ("--save-proof", str(tmp_path / "x"))
    error = payer("chat", "hi", "-m", "m", "--coordinator", "http://127.0.0.1:9", *proof, fails=True)
    assert error["code"] == Code.COORDINATOR_UNAVAILABLE.value
    assert not (tmp_path / "x").exists()
