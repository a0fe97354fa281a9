from __future__ import annotations

from pathlib import Path

import pytest

import tallystick.client
from tallystick.client.config import ClientConfig, load_config
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Amount

EXAMPLE = Path(tallystick.client.__file__).parent / "example.toml"


def test_example_is_the_defaults() -> None:
    """The example file loads and has the default values."""
    assert load_config(EXAMPLE) == ClientConfig()


def test_commented_settings_are_right(tmp_path: Path) -> None:
    """The settings that the example has only in comments are known and parse."""
    lines = [
        line.removeprefix("# ") if line.startswith("# ") and (" = " in line or line.startswith("# [")) else line
        for line in EXAMPLE.read_text().splitlines()
    ]
    (tmp_path / "all.toml").write_text("\n".join(line for line in lines if not line.startswith("# Every")))
    config = load_config(tmp_path / "all.toml")
    assert (config.max_input_price, config.max_cost) == (500_000, 100_000)
    assert config.deployment == Path("deployment.json")
    assert (config.require.region, config.require.context_tokens) == (("eu-west", "eu-north"), 32_768)


def test_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment overrides the file, and flags override both."""
    monkeypatch.setenv("TALLY_GATEWAY_PORT", "1234")
    monkeypatch.setenv("TALLY_GATEWAY_MAX_OUTPUT_PRICE", "1.25")
    monkeypatch.setenv("TALLY_GATEWAY_ALLOW_ORIGINS", "http://a,http://b")
    config = load_config(EXAMPLE, {"host": "::1", "coordinator": None})
    assert (config.port, config.host, config.max_output_price) == (1234, "::1", Amount(1_250_000))
    assert config.allow_origins == ("http://a", "http://b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"coordinator": "ftp://x"},
        {"shortlist_size": 9},
        {"max_fee_bps": 10_001},
        {"run_seconds": 0},
        {"stream_idle_seconds": 0.0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    """An impossible value is refused at once, with the setting's name."""
    with pytest.raises(BadMessage, match=next(iter(wrong))):
        load_config(None, wrong)


def test_ledger_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The ledger file is the wallet's own, in the home folder, unless another is configured."""
    monkeypatch.setenv("TALLYSTICK_HOME", str(tmp_path))
    wallet = Address("0x" + "12" * 20)
    assert ClientConfig().ledger_path(wallet) == tmp_path / "client" / f"{wallet}.db"
    assert ClientConfig(ledger_file=tmp_path / "x.db").ledger_path(wallet) == tmp_path / "x.db"
