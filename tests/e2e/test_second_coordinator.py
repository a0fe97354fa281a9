"""Two coordinator processes on one database: the second refuses to start with the reason, and the first one's jobs continue."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from pathlib import Path

import aiohttp
import pytest

from coordinator.storage.job_codec import load_job
from scripts.relay import load, processes
from tallystick.protocol.eip712 import Signer
from tests.e2e.conftest import TALLY, clean_environment

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the lock on a file is POSIX's")


async def _start_second(folder: Path, db: str) -> tuple[int, str]:
    """Starts another coordinator on this database. Returns its exit code and output."""
    environment = clean_environment() | {"TALLYSTICK_PASSWORD_FILE": str(folder / "password"), "TALLYSTICK_HOME": str(folder)}
    wallet = str(folder / "keys" / "coordinator.json")
    command = ("coordinator", "run", "--config", str(folder / "coordinator.toml"), "--wallet", wallet, "--port", "0", "--db", db)
    process = await asyncio.create_subprocess_exec(
        *TALLY, *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, out.decode()


def _states(folder: Path) -> list[str]:
    """The states of all stored jobs, in the order of their ends; those that run come last."""
    with sqlite3.connect(f"file:{folder}/coordinator.db?mode=ro", uri=True) as connection:
        ended = [state for (state,) in connection.execute("SELECT state FROM jobs ORDER BY number")]
        running = [load_job(doc) for (doc,) in connection.execute("SELECT doc FROM open_jobs ORDER BY number")]
    return ended + [doc.record.state.value for doc in running]


async def test_second_coordinator_refuses_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a job runs at the first, the second names the process and the remedy, and marks nothing as failed. After SIGKILL of
    the first, a coordinator starts.
    """
    folder = tmp_path / "market"
    monkeypatch.setenv("TALLY_COORDINATOR_ACCEPT_TIMEOUT", "3000")  # the job outlasts a slow start of the second coordinator
    async with processes.upstream() as mock, processes.market(folder, mock) as site:
        node = await load.EnginelessNode.join(site.coordinator, Signer(os.urandom(32)), site.deployment.domain)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{site.coordinator}/v1/info") as response:
                coordinator = (await response.json())["coordinator"]
            (job,) = load.sign_jobs(1, payer=site.payer, coordinator=coordinator, domain=site.deployment.domain, ask=node.ask)
            async with session.post(f"{site.coordinator}/v1/jobs", data=job) as answer:
                assert await answer.content.readexactly(5), "it is matched, and its node keeps it"
                code, output = await _start_second(folder, f"sqlite:///{folder}/coordinator.db")
                assert code != 0
                assert f"process {site.pids['coordinator']} runs a coordinator on the database" in output
                assert "stop it first" in output
                assert "Traceback" not in output
                assert _states(folder)[-1] not in {"failed", "expired"}
        assert (folder / "coordinator.db").stat().st_mode & 0o777 == 0o600
        os.kill(site.pids["coordinator"], signal.SIGKILL)
        await asyncio.sleep(0.2)
        environment = clean_environment() | {"TALLYSTICK_PASSWORD_FILE": str(folder / "password"), "TALLYSTICK_HOME": str(folder)}
        command = ("coordinator", "run", "--config", str(folder / "coordinator.toml"))
        with (folder / "third.log").open("wb") as log:
            third = await asyncio.create_subprocess_exec(
                *TALLY, *command, "--wallet", str(folder / "keys" / "coordinator.json"), env=environment, stdout=log, stderr=log
            )
        try:
            async with asyncio.timeout(60):
                while "coordinator ready" not in (folder / "third.log").read_text():
                    assert third.returncode is None, (folder / "third.log").read_text()
                    await asyncio.sleep(0.1)
            assert _states(folder)[-1] == "failed", "what the killed one left open"
        finally:
            third.send_signal(signal.SIGTERM)
            await third.wait()
