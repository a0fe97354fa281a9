from __future__ import annotations

from pathlib import Path

import pytest

import coordinator
from coordinator.config import ENV_PREFIX, CoordinatorConfig, load_config
from coordinator.domain.limits import IntakeLimits, JobLimits
from coordinator.http.response_buffer import Retention
from tallystick.protocol.errors import BadMessage

EXAMPLE = Path(coordinator.__file__).parent / "example.toml"
DEFAULTS = CoordinatorConfig(deployment=Path("deployment.json"))


def test_the_example_shows_the_defaults() -> None:
    """example.toml loads, names every setting, and says what holds without it."""
    assert load_config(EXAMPLE) == DEFAULTS
    text = EXAMPLE.read_text()
    assert [name for name in CoordinatorConfig.__dataclass_fields__ if f"\n{name} = " not in text] == []


def test_the_markets_limits_have_the_same_defaults() -> None:
    """What the config hands to the market by default is what the market does by default."""
    assert DEFAULTS.job_limits == JobLimits()


def test_flags_win_over_environment_over_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later sources win: the file, then the environment, then flags."""
    monkeypatch.setenv(f"{ENV_PREFIX}PORT", "1")
    monkeypatch.setenv(f"{ENV_PREFIX}FEE_BPS", "25")
    config = load_config(EXAMPLE, {"port": 2, "rpc": None})
    assert (config.port, config.fee_bps, config.rpc) == (2, 25, None)
    assert config.job_limits.fee_bps == 25


def test_a_config_needs_a_deployment() -> None:
    """Without a deployment file there is no market to serve, and the error says which setting is missing."""
    with pytest.raises(BadMessage, match="missing setting deployment"):
        load_config()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settle_interval", 0),
        ("accept_timeout", -1),
        ("max_order_seconds", 0),
        ("fee_bps", 10_001),
        ("funds_ttl", -1),
        ("idle_timeout", 0),
    ],
)
def test_nonsense_is_refused_at_the_start(name: str, value: float) -> None:
    """A time or a rate that would hang or loop the process is refused, and named."""
    with pytest.raises(BadMessage, match=name):
        load_config(EXAMPLE, {name: value})


def test_nan_is_no_time() -> None:
    """A deadline that no clock ever reaches is refused."""
    with pytest.raises(BadMessage, match="idle_timeout"):
        load_config(EXAMPLE, {"idle_timeout": float("nan")})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "coordinator.example", "localhost.evil.example"])
def test_a_coordinator_that_is_open_to_others_knows_its_address(host: str) -> None:
    """One that binds beyond loopback does not start without the addresses under which nodes dial it, and says what to set."""
    with pytest.raises(BadMessage, match=r"public_urls: must name .* public_urls = \["):
        load_config(EXAMPLE, {"host": host})
    config = load_config(EXAMPLE, {"host": host, "public_urls": "https://coordinator.example, http://10.0.0.1:8420"})
    assert config.endpoints == {"coordinator.example:443", "10.0.0.1:8420"}


@pytest.mark.parametrize("url", ["coordinator", "https://", "ftp://x", "https://x:99999", "https://x:" + "9" * 400])
def test_a_public_url_that_nobody_can_dial(url: str) -> None:
    """An address without host or port is refused, and named."""
    with pytest.raises(BadMessage, match="public_urls"):
        load_config(EXAMPLE, {"public_urls": [url]})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_loopback_needs_no_address(host: str) -> None:
    """What only this machine reaches is known by its port."""
    assert load_config(EXAMPLE, {"host": host}).endpoints == frozenset()


def test_the_intakes_limits_have_the_same_defaults() -> None:
    """What the config hands to the routes by default is what they do by default."""
    assert DEFAULTS.intake_limits == IntakeLimits()
    assert DEFAULTS.retention == Retention()
