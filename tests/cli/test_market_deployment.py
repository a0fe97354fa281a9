"""A market's contract from its coordinator's address alone, checked on the chain, by every command that needs it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tallystick.chain.deployment import Deployment
from tallystick.cli.market_deployment import fetch_deployment, pinned_deployment
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.protocol.errors import BadMessage, TallyError
from tests.chain.harness import World
from tests.cli.conftest import Tally, on_chain
from tests.client.fake_coordinator import FakeMarket


@pytest.fixture
def market(tally: Tally, chain_url: str, fake: FakeMarket) -> Tally:
    """A wallet with coins, and a coordinator on this machine whose contract is on a chain; no deployment file."""
    tally.wallet("default")
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", "default")
    path = tally.home / "deployment.json"
    deployment = Deployment.load(path)
    path.unlink()
    fake.info |= {"chainId": deployment.chain_id, "contract": deployment.escrow, "token": deployment.token}
    fake.info |= {"rpc": chain_url, "block": deployment.block}
    return tally


def _file(market: Tally) -> Deployment:
    return Deployment.load(market.home / "deployment.json")


def test_deposit_with_the_coordinators_address_alone(market: Tally, fake: FakeMarket) -> None:
    """The contract is asked of the coordinator, checked, shown and kept; the next command needs no coordinator."""
    assert market("deposit", "2", "--coordinator", fake.url)["free"] == "2000000"
    kept = _file(market)
    assert (kept.escrow, kept.rpc, kept.block) == (fake.info["contract"], fake.info["rpc"], fake.info["block"])
    assert market("deposit", "1")["free"] == "3000000"
    (market.home / "deployment.json").unlink()
    shown = market.says("deposit", "1", "--coordinator", fake.url)
    assert f"settles on contract {kept.escrow} on chain 31337" in shown
    assert "its code is this version's escrow" in shown
    assert "5 seconds to thaw" in shown


def test_every_command_that_reads_the_chain_fetches_it(market: Tally, fake: FakeMarket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator of the client's settings is asked; where it does not answer, the error says what to name."""
    monkeypatch.setenv("TALLY_GATEWAY_COORDINATOR", "http://127.0.0.1:9")
    message = market("balance", fails=True)["message"]
    for part in ("no deployment file at", "--coordinator", "--deployment", "tally deploy", "127.0.0.1:9"):
        assert part in message
    monkeypatch.setenv("TALLY_GATEWAY_COORDINATOR", fake.url)
    assert market("balance")["places"]
    assert _file(market).escrow == fake.info["contract"]


def test_a_named_coordinator_of_another_market(market: Tally, fake: FakeMarket) -> None:
    """A file of one market is not used for another one's coordinator; with a name for its own file, that is fetched."""
    market("deposit", "1", "--coordinator", fake.url)

    async def deploy_another(world: World) -> None:
        (await World.make(world.rpc)).deployment.save(market.home / "deployment.json")

    on_chain(market, deploy_another)
    error = market("deposit", "1", "--coordinator", fake.url, fails=True)
    assert "is of another market" in error["message"]
    other = market.home / "other.json"
    assert market("deposit", "1", "--coordinator", fake.url, "--deployment", str(other))["free"] == "2000000"
    assert Deployment.load(other).escrow == fake.info["contract"]


@pytest.mark.parametrize(
    ("announced", "expected"),
    [
        ({"contract": "0x" + "77" * 20}, "there is no escrow"),
        ({"token": "0x" + "77" * 20}, "settles in"),
        ({"token": None}, "info.token"),
        ({"chainId": 5}, "chain"),
        ({"tokenDecimals": 18}, "info.tokenDecimals: expected 6"),
        ({"contract": "0x12"}, "info.contract"),
        ({"block": -1}, "info.block"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_the_chain_does_not_confirm_is_refused(
    market: Tally, fake: FakeMarket, announced: dict[str, Any], expected: str
) -> None:
    """Each wrong announcement is refused, and no file is written."""
    fake.info |= announced
    assert expected in market("deposit", "1", "--coordinator", fake.url, fails=True)["message"]
    assert not (market.home / "deployment.json").exists()


def test_another_contract_is_refused(market: Tally, fake: FakeMarket) -> None:
    """A coordinator that names a contract with other code gets no deposit."""

    async def deploy_token(world: World) -> None:
        other = await World.make(world.rpc)
        fake.info |= {"contract": other.deployment.token, "token": other.deployment.token}

    path = market.home / "deployment.json"
    market("deposit", "1", "--coordinator", fake.url)
    on_chain(market, deploy_token)
    path.unlink()
    assert "not the escrow of this version" in market("deposit", "1", "--coordinator", fake.url, fails=True)["message"]
    assert not path.exists()


async def test_the_endpoint_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a market elsewhere, the endpoint that its coordinator names is never asked, and neither is this machine's own."""
    info = CoordinatorInfo.from_json(FakeMarket().info | {"rpc": "http://127.0.0.1:8545"})

    async def ask(_coordinator: str) -> CoordinatorInfo:
        return info

    monkeypatch.setattr("tallystick.cli.market_deployment._ask_coordinator", ask)
    with pytest.raises(BadMessage, match="name an RPC endpoint of this chain that you trust"):
        await fetch_deployment("https://market.example", None)
    elsewhere = replace(info, rpc="http://chain.example:9")
    info = elsewhere
    with pytest.raises(TallyError, match=r"127\.0\.0\.1:8545"):
        await fetch_deployment("http://127.0.0.1:8420", None)


def test_a_gateway_is_held_to_its_contract(market: Tally, fake: FakeMarket, capsys: pytest.CaptureFixture[str]) -> None:
    """It uses the file that is there, or fetches one. It accepts any contract only if it has none of this market, and says so."""
    config = ClientConfig(coordinator=fake.url)
    path = market.home / "deployment.json"
    assert asyncio.run(pinned_deployment(config)) == path
    assert _file(market).escrow == fake.info["contract"]
    assert asyncio.run(pinned_deployment(config)) == path
    fake.info["contract"] = "0x" + "77" * 20
    assert asyncio.run(pinned_deployment(config)) is None
    assert "another market" in capsys.readouterr().err
    path.unlink()
    assert asyncio.run(pinned_deployment(config)) is None
    assert "any contract of the coordinator is accepted" in capsys.readouterr().err
    with pytest.raises(BadMessage, match="no deployment file"):
        asyncio.run(pinned_deployment(replace(config, deployment=market.home / "none.json")))
    assert asyncio.run(pinned_deployment(ClientConfig(coordinator="http://127.0.0.1:9"))) is None


def test_a_coordinator_tells_its_block_and_a_local_endpoint_only() -> None:
    """`/v1/info` has members for both; older coordinators have neither."""
    raw = FakeMarket().info
    assert CoordinatorInfo.from_json(raw).rpc is None
    assert CoordinatorInfo.from_json(raw).block == 0
    told = CoordinatorInfo.from_json(json.loads(json.dumps(raw | {"rpc": "http://127.0.0.1:1", "block": 7})))
    assert (told.rpc, told.block) == ("http://127.0.0.1:1", 7)


def test_a_missing_file_that_is_named(tally: Tally) -> None:
    """A missing file that a command names is not made up from a coordinator."""
    tally.wallet("default")
    assert "tally deploy" in tally("deposit", "1", "--deployment", str(Path("/nonexistent.json")), fails=True)["message"]


def test_a_nodes_commands_fetch_it_too(market: Tally, fake: FakeMarket) -> None:
    """The doctor of a node whose config names the coordinator, and a file that is not there, finds the contract."""
    file, config = market.home / "folder" / "mine.json", market.home / "node.toml"
    config.write_text(
        f'coordinator = "{fake.url}"\ndeployment = "{file}"\nstate = "{market.home / "s"}"\n[[engines]]\nurl = "http://127.0.0.1:9"\n'
    )
    _, out, _ = market.run_main(("node", "doctor", "--config", str(config), "--json"))
    checks = {check["check"]: check for check in json.loads(out)["checks"]}
    assert checks["chain"]["ok"], checks
    assert Deployment.load(file).escrow == fake.info["contract"]
