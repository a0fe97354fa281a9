"""One more node beside a running market, as its provider would start it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from scripts.relay import processes
from tallystick.runtime.keystore import create_keystore
from tests.e2e.conftest import TALLY, clean_environment


@asynccontextmanager
async def node_beside(
    folder: Path, site: processes.Site, engines: str, *, model: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a node with these engines (TOML); yields when it sells `model`. The node must exit with code 0."""
    (folder / "beside.password").write_text("x" * 12)
    create_keystore(folder / "keys" / "beside.json", "x" * 12, cost=1 << 12)
    config = folder / "beside.toml"
    config.write_text(
        f'coordinator = "{site.coordinator}"\ndeployment = "{folder}/deployment.json"\nstate = "{folder}/beside"\n'
        f"engine_check_interval = 0.5\n{engines}"
    )
    command = (*TALLY, "node", "run", "--config", str(config), "--wallet", str(folder / "keys" / "beside.json"))
    environment = clean_environment() | {"TALLYSTICK_PASSWORD_FILE": str(folder / "beside.password")}
    with (folder / "beside.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
    try:
        await sells(site, model)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


async def sells(site: processes.Site, model: str, *, seconds: float = 180, yes: bool = True) -> None:
    """Waits until some provider sells a model, or none does."""
    async with httpx.AsyncClient(trust_env=False) as http:
        for _ in range(int(seconds * 10)):
            answer = await http.get(f"{site.coordinator}/v1/asks", params={"model": model})
            if ('"ask"' in answer.text) is yes:
                return
            await asyncio.sleep(0.1)
    raise AssertionError(f"{model}: {'nobody sells it' if yes else 'it is still sold'} after {seconds} s")
