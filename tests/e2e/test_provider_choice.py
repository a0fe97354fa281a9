"""Choice of providers through the whole market: a request header, the config, `tally models`, `explain`, `balance`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from scripts.relay import processes
from scripts.relay.mock import MODEL
from tests.e2e.conftest import TALLY, clean_environment
from tests.e2e.extra_node import node_beside, sells


async def _tally(folder: Path, *arguments: str) -> Any:
    environment = clean_environment() | {"TALLYSTICK_HOME": str(folder), "COLUMNS": "250"}
    process = await asyncio.create_subprocess_exec(*TALLY, *arguments, stdout=asyncio.subprocess.PIPE, env=environment)
    stdout, _ = await process.communicate()
    assert process.returncode == 0, stdout.decode()
    return json.loads(stdout) if "--json" in arguments else stdout.decode()


async def test_choice_of_provider(tmp_path: Path) -> None:
    """Of two providers the cheaper one gets a request, unless the request says otherwise; `explain` predicts the same."""
    folder = tmp_path / "market"
    async with processes.upstream() as mock, processes.market(folder, mock) as site:
        dear = (
            f'[[engines]]\nurl = "{mock}"\n[engines.spec]\nregion = "eu"\nprecision = "bf16"\n'
            f'[[engines.models]]\nname = "{MODEL}"\ninput_price = "5"\noutput_price = "5"\n'
            f'[[engines.models]]\nname = "{MODEL}"\nsell_as = "other"\n'
        )
        async with (
            node_beside(folder, site, dear, model="other"),
            httpx.AsyncClient(base_url=site.gateway, trust_env=False, timeout=120) as http,
        ):
            await sells(site, MODEL)
            wallet = json.loads((folder / "keys" / "beside.json").read_text())["address"]
            expensive = f"0x{wallet}".lower()

            async def provider(**options: Any) -> tuple[int, str]:
                headers = {"x-tally-options": json.dumps(options)} if options else {}
                body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
                answer = await http.post("/v1/chat/completions", json=body, headers=headers)
                return answer.status_code, answer.headers.get("x-tally-provider") or answer.json()["error"]["message"]

            status, cheap = await provider()
            assert (status, cheap != expensive) == (200, True)
            for options in ({"require": {"region": ["EU"]}}, {"pin": [expensive]}, {"prefer": [expensive]}, {"exclude": [cheap]}):
                assert await provider(**options) == (200, expensive), options
            assert await provider(prefer=[expensive], max_input_price="1") == (200, cheap)
            status, why = await provider(require={"region": ["us"]})
            assert (status, "not in a region asked for" in why) == (503, True)
            status, why = await provider(mood="good")
            assert (status, "unknown options: mood" in why) == (400, True)

            common = ("--coordinator", site.coordinator)
            names = {model["id"]: model for model in await _tally(folder, "models", *common, "--json")}
            assert names.keys() == {MODEL, "other"}
            assert (names[MODEL]["providers"], names[MODEL]["inputPrice"]) == (2, "100000")
            assert MODEL in await _tally(folder, "models", *common)
            explained = await _tally(folder, "explain", MODEL, "--region", "eu", *common, "--wallet", "payer", "--json")
            assert [(row["provider"], row["offered"], row["why"]) for row in explained] == [
                (expensive, True, None),
                (cheap, False, "it is not in a region asked for"),
            ]
            shown = await _tally(folder, "explain", MODEL, "--max-input-price", "1", *common, "--wallet", "payer")
            assert "its input price is above the client's maximum" in shown
            request, settings = folder / "request.json", folder / "explain.toml"
            request.write_text(json.dumps({"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}))
            settings.write_text(f'max_cost = "0.001"\n[[aliases]]\nname = "any"\nmodels = ["{MODEL}", "other"]\n')
            whole = ("explain", str(request), "--config", str(settings), *common, "--wallet", "payer")
            explained = await _tally(folder, *whole, "--json")
            assert [(row["model"], row["provider"], row["offered"]) for row in explained] == [
                (MODEL, cheap, True),
                (MODEL, expensive, False),
                ("other", expensive, True),
            ]
            assert "more than max_cost allows" in explained[1]["why"]
            assert 0 < int(explained[0]["atMost"]) <= 1_000 < int(explained[1]["atMost"])
            assert "at most" in await _tally(folder, *whole)
            explained = await _tally(folder, "explain", MODEL, "--min-stake", "1", *common, "--wallet", "payer", "--json")
            assert {row["why"] for row in explained} == {"it has staked less than asked for"}
            shown = await _tally(tmp_path / "empty", "explain", MODEL, *common, "--json")
            assert all(row["offered"] for row in shown), "without a wallet, no provider is blocked"
            status, why = await provider(min_stake="1")
            assert (status, "staked less than asked for" in why) == (503, True)

            chain = ("--deployment", str(folder / "deployment.json"))
            balance = await _tally(folder, "balance", "--wallet", "payer", *chain, "--json")
            sums = {place["place"].split(" 0x")[0]: int(place["amount"]) for place in balance["places"]}
            assert sums["within the above: owed to"] > 0
            assert sums["within the above: in flight with"] == 0
            assert f"owed to {cheap}" in await _tally(folder, "balance", "--wallet", "payer", *chain)
