"""`tally coordinator fee`: what a coordinator has registered, and registering it."""

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


def test_a_fee_is_registered_and_shown(market: Tally) -> None:
    """It is 0 at first; registered once it costs one transaction, and none where it stands already."""
    assert market("coordinator", "fee")["registeredBps"] == 0
    first = market("coordinator", "fee", "250")
    assert (first["registeredBps"], first["configBps"]) == (250, None)
    assert first["tx"].startswith("0x")
    assert market("coordinator", "fee", "250")["tx"] is None
    assert market("coordinator", "fee", "0")["registeredBps"] == 0
    assert "2.5 %" in market.says("coordinator", "fee", "250")


def test_a_fee_other_than_the_config_says_is_pointed_out(market: Tally, tmp_path: Path) -> None:
    """Beside the config, both rates are shown, and what to do where they differ."""
    config = tmp_path / "coordinator.toml"
    config.write_text(f'deployment = "{tmp_path}/deployment.json"\nfee_bps = 100\n')
    shown = market("coordinator", "fee", "--config", str(config))
    assert (shown["registeredBps"], shown["configBps"]) == (0, 100)
    assert "tally coordinator fee 100" in market.says("coordinator", "fee", "--config", str(config))
    assert "does not start" not in market.says("coordinator", "fee", "100", "--config", str(config))


@pytest.mark.parametrize("bps", ["10001", "-1", "1.5", "x"])
def test_what_is_no_rate_is_not_registered(market: Tally, bps: str) -> None:
    """A rate is 0 to 10000 whole hundredths of a percent."""
    market.says("coordinator", "fee", "--", bps, code=2)
    assert market("coordinator", "fee")["registeredBps"] == 0


def test_a_wallet_without_coins_is_told_so(market: Tally) -> None:
    """Registering takes gas; showing takes neither gas nor a password."""
    market.wallet("penniless")
    assert market("coordinator", "fee", "5", "--wallet", "penniless", fails=True)["code"] == "insufficient_funds"
    assert market("coordinator", "fee", "--wallet", "penniless")["registeredBps"] == 0
