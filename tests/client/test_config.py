from __future__ import annotations

from pathlib import Path

import pytest

import tallystick.client
from tallystick.client.config import ClientConfig, load_config
from tallystick.client.upstream_settings import Upstream, UpstreamTarget
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
        {"hedge_after": -0.1},
        {"hedge_after": 600.1},
        {"hedge_after": float("nan")},
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


UPSTREAM = """
[[upstreams]]
name = "cloud"
url = "https://api.example.org/v1"
key_env = "CLOUD_KEY"
[[upstreams.models]]
name = "org/big:latest"
input_price = "0.15"
output_price = "0.60"
[[aliases]]
name = "always"
models = ["small", "upstream://cloud/org/big:latest"]
"""


def test_upstreams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream has prices in dollars and a key from the environment, which never shows."""
    (tmp_path / "c.toml").write_text(UPSTREAM)
    config = load_config(tmp_path / "c.toml")
    (upstream,) = config.upstreams
    assert upstream.model("org/big:latest").output_price == Amount(600_000)
    assert upstream.model("another").output_price is None
    assert UpstreamTarget.parse(config.aliases[0].models[1]) == UpstreamTarget("cloud", "org/big:latest")
    assert UpstreamTarget.parse("org/model:tag") is None
    with pytest.raises(BadMessage, match="CLOUD_KEY, which is not set"):
        upstream.read_key()
    monkeypatch.setenv("CLOUD_KEY", " sk-secret\n")
    assert upstream.read_key() == "sk-secret"
    assert "sk-secret" not in repr(config)
    monkeypatch.setenv("CLOUD_KEY", "two words")
    with pytest.raises(BadMessage, match="printable ASCII") as caught:
        upstream.read_key()
    assert "two words" not in str(caught.value)


def test_a_key_file(tmp_path: Path) -> None:
    """It must be readable by its owner alone."""
    file = tmp_path / "key"
    upstream = Upstream(name="cloud", url="https://example.org", key_file=file)
    with pytest.raises(BadMessage, match="key_file"):
        upstream.read_key()
    file.write_text("sk-secret\n")
    file.chmod(0o644)
    with pytest.raises(BadMessage, match="chmod 600"):
        upstream.read_key()
    file.chmod(0o600)
    assert upstream.read_key() == "sk-secret"
    file.write_text("\n")
    with pytest.raises(BadMessage, match="expected an API key, got nothing"):
        upstream.read_key()
    assert Upstream(name="cloud", url="https://example.org").read_key() is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "cloud"', 'name = "Cloud/1"', "upstreams: name"),
        ('url = "https://', 'url = "https://user:pass@', "no user or password"),
        ('url = "https://api.example.org/v1"', 'url = "ftp://example.org"', "http:// or https://"),
        ('url = "https://api.example.org/v1"', 'url = "https://example.org/v1?key=x"', "without a query"),
        ('key_env = "CLOUD_KEY"', 'key_env = "A"\nkey_file = "b"', "got both"),
        ('output_price = "0.60"', "", "both input_price and output_price"),
        ("upstream://cloud/", "upstream://clouds/", "expected an upstream of the config"),
        ("upstream://cloud/org/big:latest", "upstream://cloud", "NAME/MODEL"),
        ('url = "https', 'timeout_seconds = 0\nurl = "https', "timeout_seconds"),
    ],
)
def test_upstreams_that_make_no_sense(old: str, new: str, says: str, tmp_path: Path) -> None:
    """The error names the upstream or the alias, and quotes no password."""
    (tmp_path / "c.toml").write_text(UPSTREAM.replace(old, new, 1))
    with pytest.raises(BadMessage, match=says) as caught:
        load_config(tmp_path / "c.toml")
    assert "pass@" not in str(caught.value)
