"""`tally coordinator fee`: showing and registering a coordinator's fee."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Tally


@pytest.fixture
def market(tally: Tally, chain_url: str) -> Tally:
    """A market on a chain, and a coordinator's wallet with coins for gas."""
    tally.wallet("default")
    tally("deploy", "--rpc", chain_url, "--dev-account", "0", "--short-waits", "--fund", "default")
    return tally


def test_fee_is_registered_and_shown(market: Tally) -> None:
    """The fee is 0 at first. Registering it takes one transaction, and none if it is registered already."""
    assert market("coordinator", "fee")["registeredBps"] == 0
    first = market("coordinator", "fee", "250")
    assert (first["registeredBps"], first["configBps"]) == (250, None)
    assert first["tx"].startswith("0x")
    assert market("coordinator", "fee", "250")["tx"] is None
    assert market("coordinator", "fee", "0")["registeredBps"] == 0
    assert "2.5 %" in market.says("coordinator", "fee", "250")


def test_fee_that_differs_from_the_config(market: Tally, tmp_path: Path) -> None:
    """With a config, both fees are shown, and what to do if they differ."""
    config = tmp_path / "coordinator.toml"
    config.write_text(f'deployment = "{tmp_path}/deployment.json"\nfee_bps = 100\n')
    shown = market("coordinator", "fee", "--config", str(config))
    assert (shown["registeredBps"], shown["configBps"]) == (0, 100)
    assert "tally coordinator fee 100" in market.says("coordinator", "fee", "--config", str(config))
    assert "does not start" not in market.says("coordinator", "fee", "100", "--config", str(config))


@pytest.mark.parametrize("bps", ["10001", "-1", "1.5", "x"])
def test_invalid_fee(market: Tally, bps: str) -> None:
    """A fee is a whole number of basis points from 0 to 10000; nothing else is registered."""
    market.says("coordinator", "fee", "--", bps, code=2)
    assert market("coordinator", "fee")["registeredBps"] == 0


def test_fee_without_coins(market: Tally) -> None:
    """Registering takes gas; showing takes neither gas nor a password."""
    market.wallet("penniless")
    assert market("coordinator", "fee", "5", "--wallet", "penniless", fails=True)["code"] == "insufficient_funds"
    assert market("coordinator", "fee", "--wallet", "penniless")["registeredBps"] == 0
