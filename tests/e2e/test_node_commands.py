"""The provider's commands beside a running node: readiness, earnings, collecting without a coordinator, backup."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from scripts.relay import load, processes
from tests.e2e.conftest import TALLY, clean_environment


class Provider:
    """Runs `tally node …` as the node's provider would."""

    def __init__(self, folder: Path, wallet: str = "node") -> None:
        self.wallet, self.config = folder / "keys" / f"{wallet}.json", folder / "node.toml"
        self.environment = clean_environment() | {
            "TALLYSTICK_HOME": str(folder),
            "TALLYSTICK_PASSWORD_FILE": str(folder / "password"),
        }

    async def __call__(self, *arguments: str, code: int = 0, as_json: bool = True) -> Any:
        """Runs a command with the node's config. Returns its JSON or text."""
        node = (
            "--config",
            str(self.config),
            *(("--wallet", str(self.wallet)) if arguments[0] not in ("status", "backup", "restore") else ()),
        )
        return await self.run(*arguments, *node, *(("--json",) if as_json else ()), code=code)

    async def run(self, *arguments: str, code: int = 0) -> Any:
        """Runs a command. Returns its JSON with --json, else the text of both streams."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*TALLY, "node", *arguments, stdout=pipe, stderr=pipe, env=self.environment)
        stdout, stderr = await process.communicate()
        assert process.returncode == code, (stdout + stderr).decode()
        return json.loads(stdout) if "--json" in arguments else " ".join((stdout + stderr).decode().split())


def _problems(document: dict[str, Any]) -> list[str]:
    return [check["check"] for check in document["checks"] if not check["ok"]]


async def test_doctor_earnings_status_and_collect(tmp_path: Path) -> None:
    """The node is ready; earnings are shown by day, model and payer, and collected on chain with the coordinator dead."""
    folder = tmp_path / "market"
    async with processes.upstream() as mock, processes.market(folder, mock) as site:
        tally = Provider(folder)
        document = await tally("doctor")
        assert (document["ready"], _problems(document)) == (True, [])
        assert "ready" in await tally("doctor", as_json=False)
        checks = {check["check"]: check["found"] for check in document["checks"]}
        assert "accepted up to 10 %" in checks["fee"]
        assert "5 s after announcing it" in checks["reservations"]
        empty = await tally("earnings")
        assert (empty["days"], empty["earned"]) == ([], "0")
        await load.ask(site.gateway, requests=5, concurrency=2)

        earned = await tally("earnings")
        (day,) = earned["days"]
        assert (day["model"], day["payer"], day["jobs"]) == ("bench", site.payer.address, 5)
        assert earned["where"]["accrued"] == earned["earned"] == day["revenue"] != "0", "less than a claim should bring"
        assert sum(map(int, earned["where"].values())) == int(earned["earned"])
        assert "Where the money is" in await tally("earnings", as_json=False)

        why = await tally("why")
        assert why["connected"]
        assert {decision["why"] for decision in why["decisions"]} == {"got the job", "offered to the client, place 1 of 1"}
        assert "got the job" in await tally("why", as_json=False)
        repriced = await tally("why", "--at", "0.1,0.2")
        assert {decision["stage"] for decision in repriced["decisions"]} == {"shortlist"}
        assert all(decision["won"] for decision in repriced["decisions"])
        assert "--at" in (await tally("why", "--at", "0.1", code=1))["error"]["message"]

        status = await tally("status")
        assert (status["ok"], status["jobs"], status["revenue"]) == (True, {"completed": 5}, day["revenue"])
        assert [job["outcome"] for job in status["last"]] == ["completed"] * 5
        shown = await tally("status", as_json=False)
        expected = ("ready to earn", "Asks; prices", "Latest jobs", "bench", "written off", "up to 10 %")
        assert [text for text in expected if text not in shown] == [], shown
        assert list(status["fees_bps"].values()) == [0]

        os.kill(site.pids["coordinator"], signal.SIGKILL)
        nothing = await tally("collect", "--dry-run")
        assert (nothing["tabs"], nothing["left"]["belowMinAmount"]) == ([], day["revenue"])
        shown = await tally("collect", "--min-amount", "0", "--dry-run", as_json=False)
        assert "not sent" in shown
        shown = await tally("collect", "--min-amount", "0", "--dry-run")
        assert [tab["owed"] for tab in shown["tabs"]] == [day["revenue"]]
        refused = await tally("collect", "--min-amount", "0", code=1)
        assert "has no coins" in refused["error"]["message"]
        await _fund(site, folder)
        (tab,) = (await tally("collect", "--min-amount", "0"))["tabs"]
        assert (tab["paid"], tab["skipped"]) == (day["revenue"], None)
        assert (await tally("collect", "--min-amount", "0"))["tabs"] == []
        assert "no payer owes anything" in await tally("collect", as_json=False)
        for options in ((), ("--offline",)):
            earned = await tally("earnings", *options)
            assert earned["where"]["accrued"] == earned["where"]["claimable"] == "0", "settled, and known at once"
            assert sum(map(int, earned["where"].values())) == int(earned["earned"])
        earned = await tally("earnings")
        assert earned["where"]["credited"] == day["revenue"]
        assert earned["gas"]["transactions"] == 1
        assert int(earned["gas"]["fee"]) >= earned["gas"]["gasUsed"] > 20_000
        assert "gwei for 1 transaction" in await tally("earnings", as_json=False)
        assert _problems(await tally("doctor", code=1)) == ["coordinator"]
        assert (await tally("why", code=1))["error"]["code"] == "coordinator_unavailable"
        assert "check `coordinator`" in await tally("doctor", as_json=False, code=1)
        assert not (await tally("status"))["ok"]
        assert "not earning" in await tally("status", as_json=False)
        os.kill(site.pids["node"], signal.SIGKILL)
        assert "no node runs" in (await tally("status", code=1))["error"]["message"]


async def test_backup_and_restore(tmp_path: Path) -> None:
    """A backup is restored after the node signed more: the node learns the rest from its coordinator, continues, and both sides'
    records and the chain agree.
    """
    folder = tmp_path / "market"
    async with processes.upstream() as mock, processes.market(folder, mock) as site:
        tally, file = Provider(folder), tmp_path / "backup.tgz"
        await load.ask(site.gateway, requests=3, concurrency=1)
        made = await tally("backup", str(file))
        assert (made["receipts"], file.stat().st_mode & 0o777) == (3, 0o600)
        assert "exists" in (await tally("backup", str(file), code=1))["error"]["message"]
        await load.ask(site.gateway, requests=4, concurrency=1)
        assert "is running" in (await tally("restore", str(file), "--force", code=1))["error"]["message"]
        os.kill(site.pids["node"], signal.SIGKILL)
        assert "no node runs" in str(await tally("status", code=1))
        assert "--force" in (await tally("restore", str(file), code=1))["error"]["message"]
        assert (await tally("restore", str(file), "--force"))["receipts"] == 3
        assert sum(day["jobs"] for day in (await tally("earnings"))["days"]) == 3
        command = (*TALLY, "node", "run", "--config", str(tally.config), "--wallet", str(tally.wallet))
        node = await asyncio.create_subprocess_exec(*command, env=tally.environment, stderr=asyncio.subprocess.DEVNULL)
        try:
            await _until_ready(tally)
            await load.ask(site.gateway, requests=2, concurrency=1)
            earned = await tally("earnings")
            assert int(earned["earned"]) == 9 * int(earned["days"][0]["revenue"]) // earned["days"][0]["jobs"]
        finally:
            node.send_signal(signal.SIGTERM)
            assert await node.wait() == 0
        (tmp_path / "broken.tgz").write_bytes(file.read_bytes()[:1_000])
        assert "expected a backup" in (await tally("restore", str(tmp_path / "broken.tgz"), code=1))["error"]["message"]


async def _until_ready(tally: Provider) -> None:
    for _ in range(100):
        try:
            if (await tally("status"))["ok"]:
                return
        except AssertionError:
            await asyncio.sleep(0.1)
    raise AssertionError("the node did not get ready")


async def test_init_to_first_sale(tmp_path: Path) -> None:
    """`init` finds the engine, takes the market's price and makes the wallet; the doctor accepts it, and the node sells."""
    folder = tmp_path / "market"
    async with processes.upstream() as mock, processes.market(folder, mock) as site:
        tally, config = Provider(folder, wallet="new"), folder / "mine.toml"
        options = ("--engine", mock, "--coordinator", site.coordinator, "--wallet", "new", "--out", str(config))
        document = await tally.run("init", *options, "--output-price", "0.30", "--json")
        (engine,) = document["engines"]
        (model,) = engine["models"]
        assert (model["name"], model["inputPrice"], model["outputPrice"]) == ("bench", "100000", "300000")
        assert (folder / "keys" / "new.json").stat().st_mode & 0o777 == 0o600
        assert "overwrite it with --force" in (await tally.run("init", *options, "--json", code=1))["error"]["message"]
        answers = folder / "answers.toml"
        answers.write_text(
            f'engine = ["{mock}"]\ncoordinator = "{site.coordinator}"\nwallet = "new"\nout = "{config}"\n'
            'input_price = "7"\noutput_price = 8.5\nslots = 3\nforce = true\njson = true\n'
        )
        document = await tally.run("init", "--answers-file", str(answers), "--input-price", "0.2", "--json")
        (model,) = document["engines"][0]["models"]
        assert (model["inputPrice"], model["outputPrice"]) == ("200000", "8500000"), "a flag wins over the file"
        assert "slots = 3" in config.read_text()
        answers.write_text("mood = 1")
        assert "unknown: mood" in (await tally.run("init", "--answers-file", str(answers), "--json", code=1))["error"]["message"]
        answers.write_text("slots =")
        assert "answers.toml" in (await tally.run("init", "--answers-file", str(answers), "--json", code=1))["error"]["message"]
        await tally.run("init", *options, "--json", "--force")
        tally.config = config
        assert (await tally("doctor"))["ready"]
        command = (*TALLY, "node", "run", "--config", str(config), "--wallet", "new")
        node = await asyncio.create_subprocess_exec(*command, env=tally.environment, stderr=asyncio.subprocess.DEVNULL)
        try:
            while "this node's asks are published" not in str(await tally("doctor")):
                pass
        finally:
            node.send_signal(signal.SIGTERM)
            assert await node.wait() == 0


async def test_init_without_an_engine(tmp_path: Path) -> None:
    """If a named engine does not answer, the error says so and nothing is written."""
    (tmp_path / "password").write_text("x")
    tally = Provider(tmp_path)
    document = await tally.run("init", "--engine", "http://127.0.0.1:9", "--out", str(tmp_path / "n.toml"), "--json", code=1)
    assert document["error"]["code"] == "engine_unavailable"
    assert not (tmp_path / "n.toml").exists()
    assert not (tmp_path / "keys").exists()


async def _fund(site: processes.Site, folder: Path) -> None:
    """Gives the provider coins for gas."""
    address = json.loads((folder / "keys" / "node.json").read_text())["address"]
    command = (sys.executable, "-m", "tallystick.cli", "chain", "fund", f"0x{address}", "--rpc", site.deployment.rpc)
    process = await asyncio.create_subprocess_exec(*command, env=clean_environment())
    assert await process.wait() == 0


async def test_doctor_names_every_problem(tmp_path: Path) -> None:
    """In an empty home folder, the doctor names each missing thing and its remedy."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "password").write_text("x")
    (tmp_path / "node.toml").write_text(
        'coordinator = "http://127.0.0.1:9"\ndeployment = "nowhere.json"\n[[engines]]\nurl = "http://127.0.0.1:9/v1"\n'
    )
    tally = Provider(tmp_path)
    document = await tally("doctor", code=1)
    assert _problems(document) == ["wallet", "chain", "coordinator", "engine 127.0.0.1:9"]
    assert all(check["remedy"] for check in document["checks"] if not check["ok"])
    (tmp_path / "node.toml").write_text("slots = ")
    assert _problems(await tally("doctor", code=1)) == ["config"]
