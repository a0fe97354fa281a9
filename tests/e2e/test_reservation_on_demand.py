"""A provider that gives no unsecured credit: the gateway reserves money for it, within its limit."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx

from scripts.relay import processes
from scripts.relay.mock import MODEL
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc
from tallystick.cli.local.processes import free_port
from tallystick.protocol.types import parse_address
from tallystick.runtime.keystore import keystore_address
from tests.e2e.conftest import TALLY, clean_environment
from tests.e2e.extra_node import node_beside


async def _ask(url: str) -> tuple[int, str]:
    body = {"model": "wary", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        for _ in range(300):
            try:
                answer = await http.post(f"{url}/v1/chat/completions", json=body)
            except httpx.ConnectError:
                await asyncio.sleep(0.1)
            else:
                return answer.status_code, answer.text
    raise AssertionError("the gateway does not answer")


async def test_gateway_reserves_on_demand(tmp_path: Path) -> None:
    """Without permission the request is refused with the reason; with it the request succeeds, and no more than needed is
    reserved.
    """
    folder = tmp_path / "market"
    async with processes.upstream() as mock, processes.market(folder, mock) as site:
        wary = f'[credit]\nper_payer = "0"\n[[engines]]\nurl = "{mock}"\n[[engines.models]]\nname = "{MODEL}"\nsell_as = "wary"\n'
        async with node_beside(folder, site, wary, model="wary"):
            status, why = await _ask(site.gateway)
            assert (status, "is reserved for this provider" in why) == (402, True), why
            settings, port = folder / "generous.toml", free_port(0)
            settings.write_text(
                f'coordinator = "{site.coordinator}"\ndeployment = "{folder}/deployment.json"\nport = {port}\n'
                'reserve_target = "0.5"\ntop_up_total = "2"\n'
            )
            command = (*TALLY, "gateway", "--config", str(settings), "--wallet", str(folder / "keys" / "payer.json"))
            environment = clean_environment() | {
                "TALLYSTICK_HOME": str(folder),
                "TALLYSTICK_PASSWORD_FILE": str(folder / "password"),
            }
            gateway = await asyncio.create_subprocess_exec(*command, env=environment)
            try:
                for _ in range(2):
                    status, text = await _ask(f"http://127.0.0.1:{port}")
                    assert status == 200, text
                rpc = Rpc(site.deployment.rpc)
                provider = parse_address(keystore_address(folder / "keys" / "beside.json"))
                tab = await Escrow(rpc, site.deployment).tab(site.payer.address, provider)
                await rpc.close()
                assert tab.reserved + tab.settled > 0
                assert tab.reserved <= 500_000
            finally:
                gateway.send_signal(signal.SIGTERM)
                assert await gateway.wait() == 0
