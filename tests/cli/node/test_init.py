from __future__ import annotations

import io
import json
import os
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.engines.demo import build_app
from node.engines.discover import DiscoveredEngine
from node.engines.kinds import QUEUE_DEPTH, QUEUEING, EngineKind
from node.service.config import load_config
from node.storage.state_folder import claim_state, lock_state
from tallystick.cli.node.init_file import ModelPlan, NodeSetup, to_toml
from tallystick.protocol.types import Amount
from tests.chain.harness import serving
from tests.cli.conftest import Tally


def test_node_reads_the_written_config(tmp_path: Path) -> None:
    """A node reads the intended prices, names and keys; a model loaded from a path gets a market name without the path."""
    engine_found = DiscoveredEngine('http://x/"y"', EngineKind.VLLM, "0.9", (), api_key="secret")
    plans = [
        ModelPlan("/models/tiny.gguf", 512, Amount(1_500_000), Amount(10), "as given"),
        ModelPlan("org/model:7b", None, Amount(0), Amount(2_000_000), "default"),
    ]
    setup = NodeSetup("http://c", tmp_path / "d.json", None, tmp_path / "state")
    text = to_toml(setup, [engine_found], {engine_found.url: plans}, 3)
    assert "secret" not in text
    assert tomllib.loads(text)["engines"][0]["api_key_env"] == "OPENAI_API_KEY"
    (tmp_path / "node.toml").write_text(text)
    loaded = load_config(tmp_path / "node.toml", environment={})
    assert (loaded.deployment, loaded.rpc, loaded.state) == (tmp_path / "d.json", None, tmp_path / "state")
    (engine,) = loaded.engines
    assert (engine.url, engine.slots) == (engine_found.url, 3)
    assert engine.queue_depth == QUEUE_DEPTH, "vLLM lets requests wait"
    tiny, other = engine.models
    assert (tiny.name, tiny.sold_as, tiny.context_tokens) == ("/models/tiny.gguf", "tiny", 512)
    assert (tiny.prices.input, tiny.prices.output) == (1_500_000, 10)
    assert (other.sold_as, other.context_tokens, other.prices.input) == ("org/model:7b", None, 0)


@pytest.mark.parametrize(("kind", "depth"), [(kind, QUEUE_DEPTH if kind in QUEUEING else 0) for kind in EngineKind])
@pytest.mark.parametrize("reported", [None, 2])
def test_only_engines_that_queue_get_a_queue(tmp_path: Path, kind: EngineKind, depth: int, reported: int | None) -> None:
    """Others refuse what they cannot run, and a job sent to them would fail over."""
    engine = DiscoveredEngine("http://x", kind, "1", (), slots=reported)
    plans = {engine.url: [ModelPlan("m", 512, Amount(1), Amount(1), "as given")]}
    setup = NodeSetup("http://c", tmp_path / "d.json", None, tmp_path / "state")
    (tmp_path / "node.toml").write_text(to_toml(setup, [engine], plans, None))
    assert load_config(tmp_path / "node.toml", environment={}).engines[0].queue_depth == depth


@pytest.fixture
def engine_url() -> Iterator[str]:
    """A stand-in engine."""
    with serving(build_app()) as url:
        yield url


def _init(tally: Tally, url: str, engine_url: str, name: str, *more: str, fails: bool = False) -> Any:
    options = ("--coordinator", url, "--engine", engine_url, "--no-probe", "--out", str(tally.home / f"{name}.toml"))
    return tally("node", "init", *options, *more, fails=fails)


def test_each_node_gets_its_own_state(tally: Tally, url: str, engine_url: str) -> None:
    """A second node gets a wallet and a state of its own; a wallet that serves another node is refused if it is named."""
    first = _init(tally, url, engine_url, "node")
    assert (first["wallet"], first["state"]) == ("default", str(tally.home / "nodes" / "node"))
    second = _init(tally, url, engine_url, "other")
    assert (second["wallet"], second["state"]) == ("other", str(tally.home / "nodes" / "other"))
    assert first["provider"] != second["provider"]
    error = _init(tally, url, engine_url, "third", "--wallet", "default", fails=True)
    assert "serves another node already" in error["message"]
    assert "--wallet third" in error["message"]
    assert not (tally.home / "third.toml").exists()
    again = _init(tally, url, engine_url, "node", "--force")
    assert (again["wallet"], again["state"]) == ("default", first["state"]), "a new config for the same node"
    (tally.home / "more").mkdir()
    same_name = _init(tally, url, engine_url, "more/node")
    assert (same_name["wallet"], same_name["state"]) == ("node", str(tally.home / "nodes" / "node-2"))


def test_a_cold_wallet_for_payouts(tally: Tally, url: str, engine_url: str) -> None:
    """The options write the automatic payout; a wrong amount or address writes nothing."""
    cold = "0x" + "c0" * 20
    _init(tally, url, engine_url, "paid", "--payout-address", cold, "--payout-min-amount", "2.5", "--coin-price", "3000")
    policy = load_config(tally.home / "paid.toml", environment={}).payout
    assert (policy.address, policy.min_amount, policy.coin_price) == (cold, 2_500_000, 3_000_000_000)
    for options, name in (
        (("--payout-address", "0x12"), "--payout-address"),
        (("--payout-address", cold, "--payout-min-amount", "0"), "--payout-min-amount"),
        (("--payout-address", cold, "--coin-price", "x"), "--coin-price"),
    ):
        assert name in _init(tally, url, engine_url, "unpaid", *options, fails=True)["message"]
    assert not (tally.home / "unpaid.toml").exists()


def test_an_earlier_state_is_kept(tally: Tally, url: str, engine_url: str) -> None:
    """A wallet that has a state on this market continues with it, wherever an earlier config put it."""
    wallet = tally.wallet("default")
    folder = tally.home / "node"
    claim_state(folder, wallet, tally.home / "node.toml")
    assert _init(tally, url, engine_url, "node")["state"] == str(folder)
    elsewhere = tally.home / "elsewhere"
    (tally.home / "own.toml").write_text(f'state = "{elsewhere}"\n')
    claim_state(elsewhere, tally.wallet("own"), tally.home / "own.toml")
    assert _init(tally, url, engine_url, "own", "--force", "--wallet", "own")["state"] == str(elsewhere)


def test_a_running_node_is_named(tally: Tally, url: str, engine_url: str) -> None:
    """A node that runs now with the wallet is named with its process."""
    wallet = tally.wallet("default")
    with lock_state(tally.home / "nodes" / "node", wallet, tally.home / "node.toml"):
        error = _init(tally, url, engine_url, "second", "--wallet", "default", fails=True)
        assert f"running as process {os.getpid()}" in error["message"]
        checks = {check["check"]: check for check in _doctor(tally, tally.home / "copy.toml", tally.home / "nodes" / "node")}
        assert not checks["state"]["ok"]
        assert "node.toml" in checks["state"]["found"]
        checks = {check["check"]: check for check in _doctor(tally, tally.home / "copy.toml", tally.home / "nodes" / "mine")}
        assert checks["state"]["ok"]
        assert not checks["wallet"]["ok"], "two nodes with one wallet"
    claim_state(tally.home / "nodes" / "node", "0x" + "11" * 20, tally.home / "node.toml")
    checks = {check["check"]: check for check in _doctor(tally, tally.home / "copy.toml", tally.home / "nodes" / "node")}
    assert "belongs to the wallet 0x1111" in checks["state"]["found"]


def _doctor(tally: Tally, config: Path, state: Path) -> list[dict[str, Any]]:
    config.write_text(f'coordinator = "http://127.0.0.1:9"\nstate = "{state}"\n[[engines]]\nurl = "http://127.0.0.1:9"\n')
    code, out, _ = tally.run_main(("node", "doctor", "--config", str(config), "--json"))
    assert code == 1
    checks: list[dict[str, Any]] = json.loads(out)["checks"]
    return checks


def test_the_port_of_the_metrics(tally: Tally) -> None:
    """The doctor says which program has the port that the node's metrics would use."""
    tally.wallet("default")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = tally.home / "node.toml"
        config.write_text(f"metrics_port = {taken.getsockname()[1]}\n[[engines]]\nurl = 'http://127.0.0.1:9'\n")
        _, out, _ = tally.run_main(("node", "doctor", "--config", str(config), "--json"))
        (check,) = [check for check in json.loads(out)["checks"] if check["check"] == "metrics"]
        assert not check["ok"]
        assert "metrics_port" in check["remedy"]


def test_init_survives_typos(tally: Tally, url: str, engine_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wrong answer is asked again: coordinator, engine, prices. It says where it looks and what it found."""
    monkeypatch.setattr("node.engines.kinds.DEFAULT_URLS", ("http://127.0.0.1:9",))
    monkeypatch.setattr("node.engines.discover.discover.__defaults__", (("http://127.0.0.1:9",),))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    typed = [
        "htp//x",
        "http://127.0.0.1:9",
        "perhaps",
        "no",
        url,
        "engine",
        "http://127.0.0.1:9",
        engine_url,
        "ten",
        "0.3",
        "",
        "",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    out = tally.home / "n.toml"
    shown = tally.says("node", "init", "--no-probe", "--out", str(out))
    for part in (
        "looking for engines at this machine, ports 9",
        "no engine with a model was found",
        "expected yes or no",
        "found",
    ):
        assert part in shown
    assert shown.count("try again") == 4
    assert 'input_price = "0.3"' in out.read_text()


def test_init_without_anybody_to_ask(tally: Tally, url: str, engine_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If stdin ends, the error says which option answers the question; nothing is written."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    options = ("--coordinator", url, "--engine", engine_url, "--no-probe", "--out", str(tally.home / "n.toml"))
    shown = tally.says("node", "init", *options, code=1)
    assert "stdin has ended: name it with --input-price" in shown
    assert not (tally.home / "n.toml").exists()
    assert not (tally.home / "nodes").exists()
