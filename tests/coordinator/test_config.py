from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import coordinator
from coordinator.config import ENV_PREFIX, CoordinatorConfig, load_config
from coordinator.domain.limits import IntakeLimits, JobLimits
from coordinator.http.response_buffer import Retention
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.match_log import MERGE_SECONDS

EXAMPLE = Path(coordinator.__file__).parent / "example.toml"
DEFAULTS = CoordinatorConfig(deployment=Path("deployment.json"))


def test_the_example_shows_the_defaults() -> None:
    """example.toml loads, names every setting, and shows its default."""
    assert load_config(EXAMPLE) == DEFAULTS
    text = EXAMPLE.read_text()
    shown = ("\n{} = ", "\n[{}]", "\n# [[{}]]\n")
    names = CoordinatorConfig.__dataclass_fields__
    assert [name for name in names if not any(form.format(name) in text for form in shown)] == []


def test_job_limits_have_the_same_defaults() -> None:
    """The config's default job limits are the market's defaults."""
    assert DEFAULTS.job_limits == JobLimits()


def test_flags_win_over_environment_over_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later sources win: the file, then the environment, then flags."""
    monkeypatch.setenv(f"{ENV_PREFIX}PORT", "1")
    monkeypatch.setenv(f"{ENV_PREFIX}FEE_BPS", "25")
    config = load_config(EXAMPLE, {"port": 2, "rpc": None})
    assert (config.port, config.fee_bps, config.rpc) == (2, 25, None)
    assert config.job_limits.fee_bps == 25


def test_the_default_deployment_file_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config without `deployment` uses the home folder's file."""
    monkeypatch.setenv("TALLYSTICK_HOME", str(tmp_path))
    config = tmp_path / "coordinator.toml"
    config.write_text('name = "other"\n')
    assert load_config().deployment == load_config(config).deployment == tmp_path / "deployment.json"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settle_interval", 0),
        ("accept_timeout", -1),
        ("max_order_seconds", 0),
        ("fee_bps", 10_001),
        ("funds_ttl", -1),
        ("idle_timeout", 0),
        ("hedge_share", -0.01),
        ("hedge_share", 1.01),
        ("hedge_share", float("nan")),
        ("match_log_seconds", 0.05),
        ("match_log_seconds", 31),
        ("match_log_seconds", float("nan")),
        ("match_log_keep_seconds", 86_399),
        ("job_keep_seconds", 3_599),
    ],
)
def test_invalid_values_are_refused_at_start(name: str, value: float) -> None:
    """A time or a rate that would hang or spin the process is refused, and the error names it."""
    with pytest.raises(BadMessage, match=name):
        load_config(EXAMPLE, {name: value})


def test_trusted_proxies_reach_the_server() -> None:
    """The setting is that of the HTTP server; a name, which may change, is refused at start."""
    proxies = load_config(EXAMPLE, {"trusted_proxies": ["10.0.0.0/8"]}).connection_limits.proxies
    assert proxies.trust("10.1.2.3")
    assert not load_config(EXAMPLE).connection_limits.proxies.networks
    with pytest.raises(BadMessage, match="trusted_proxies"):
        load_config(EXAMPLE, {"trusted_proxies": ["proxy.example"]})


def test_the_match_log_is_signed_and_kept_as_configured() -> None:
    """Both times reach the market. Any head interval allowed leaves a match time to be under a head when it is due."""
    limits = load_config(EXAMPLE, {"match_log_seconds": 30, "match_log_keep_seconds": 86_400, "match_log_lost": True}).job_limits
    assert (limits.match_log_seconds, limits.match_log_keep_seconds, limits.match_log_lost) == (30, 86_400, True)
    assert 2 * limits.match_log_seconds <= MERGE_SECONDS


def test_nan_is_no_time() -> None:
    """NaN is refused as a deadline: no clock reaches it."""
    with pytest.raises(BadMessage, match="idle_timeout"):
        load_config(EXAMPLE, {"idle_timeout": float("nan")})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "coordinator.example", "localhost.evil.example"])
def test_a_public_coordinator_needs_its_address(host: str) -> None:
    """A coordinator that listens beyond loopback needs its public addresses; the error says what to set."""
    with pytest.raises(BadMessage, match=r"public_urls: must name .* public_urls = \["):
        load_config(EXAMPLE, {"host": host})
    config = load_config(EXAMPLE, {"host": host, "public_urls": "https://coordinator.example, http://10.0.0.1:8420"})
    assert config.endpoints == {"coordinator.example:443", "10.0.0.1:8420"}


@pytest.mark.parametrize("url", ["coordinator", "https://", "ftp://x", "https://x:99999", "https://x:" + "9" * 400])
def test_a_public_url_that_nobody_can_dial(url: str) -> None:
    """A URL without host or port is refused, and the error names the setting."""
    with pytest.raises(BadMessage, match="public_urls"):
        load_config(EXAMPLE, {"public_urls": [url]})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_loopback_needs_no_address(host: str) -> None:
    """A coordinator on loopback needs no public address."""
    assert load_config(EXAMPLE, {"host": host}).endpoints == frozenset()


def test_intake_limits_have_the_same_defaults() -> None:
    """The config's default intake limits and retention are the routes' defaults."""
    assert DEFAULTS.intake_limits == IntakeLimits()
    assert DEFAULTS.retention == Retention()


# Replicas

REPLICA = {"db": "postgresql+asyncpg://ann:s3cret@db.example/market", "bus": "nats://ann:s3cret@bus.example"}


def test_an_address_of_nats_makes_a_replica() -> None:
    """With `bus` and PostgreSQL, the process is one of several; without both it is alone."""
    config = load_config(EXAMPLE, REPLICA | {"workers": 3})
    assert (config.bus, config.workers) == (REPLICA["bus"], 3)
    assert load_config(EXAMPLE).bus is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bus": "nats://bus.example"}, "db: expected postgresql://"),
        ({"bus": "nats://bus.example", "db": "sqlite:///x.db"}, "db: expected postgresql://"),
        ({"workers": 2}, "bus: must name a NATS server.*`workers` is set"),
        ({"replica_url": "https://r1.example"}, "bus: must name a NATS server.*`replica_url` is set"),
        (REPLICA | {"bus": "http://bus.example"}, "bus: expected nats://"),
        (REPLICA | {"workers": 0}, "workers: expected 1 to 64, got 0"),
        (REPLICA | {"workers": 65}, "workers: expected 1 to 64, got 65"),
        (REPLICA | {"workers": 2, "replica_url": "https://r.example"}, r"replica_url: .* must contain \{port\}"),
        (REPLICA | {"workers": 2, "public_urls": ["https://r.example/market"]}, "replica_url: required"),
        (REPLICA | {"replica_url": "r.example"}, "replica_url: expected a URL"),
        (REPLICA | {"replica_url": "https://ann:pw@r.example"}, "replica_url: expected a URL"),
        (REPLICA | {"public_urls": ["https://m.example"], "replica_url": "http://r.example"}, "would not use"),
        (REPLICA | {"public_urls": ["https://m.example"], "replica_url": "https://r.example/r1"}, "would not use"),
        (REPLICA | {"public_urls": ["http://m.example"], "replica_url": "http://localhost:8420"}, "would not use"),
        (REPLICA | {"drain_seconds": -1}, "drain_seconds"),
    ],
)
def test_half_of_a_replica_is_refused(flags: dict[str, object], words: str) -> None:
    """The error names the setting that is missing or wrong, and shows no password."""
    with pytest.raises(BadMessage, match=words) as caught:
        load_config(EXAMPLE, flags)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:8421"),
        ({"host": "::1"}, "http://[::1]:8421"),
        ({"public_urls": ["https://a.example", "https://b.example"]}, "https://a.example"),
        ({"public_urls": ["https://a.example/"]}, "https://a.example"),
        ({"public_urls": ["https://a.example:443"], "workers": 2}, "https://a.example:8421"),
        ({"public_urls": ["http://[2001:db8::1]:80"], "workers": 2}, "http://[2001:db8::1]:8421"),
        ({"public_urls": ["https://a.example"], "replica_url": "https://r1.example"}, "https://r1.example"),
        ({"replica_url": "https://r{port}.example/", "workers": 2}, "https://r8421.example"),
    ],
)
def test_each_replica_has_its_own_url(settings: dict[str, object], url: str) -> None:
    """It is `replica_url`, else the first public one, with the port of the process where one command runs several."""
    assert load_config(EXAMPLE, REPLICA | settings).own_url(8421) == url


def test_the_tiers_of_the_example_can_be_used(tmp_path: Path) -> None:
    """Without their comment signs, the example's tiers load, and swallow no other setting."""
    lines = EXAMPLE.read_text().splitlines()
    start = lines.index("# [[tiers]]")
    file = tmp_path / "coordinator.toml"
    file.write_text("\n".join([*lines[:start], *(line.removeprefix("# ") for line in lines[start:])]))
    config = load_config(file)
    assert [tier.name for tier in config.tiers] == ["new", "known"]
    assert replace(config, tiers=()) == DEFAULTS
