from __future__ import annotations

import tomllib
from pathlib import Path

from node.engines.discover import DiscoveredEngine
from node.engines.kinds import EngineKind
from node.service.config import load_config
from tallystick.cli.node.init import ModelPlan, _toml
from tallystick.protocol.types import Amount


def test_node_reads_the_written_config(tmp_path: Path) -> None:
    """A node reads the intended prices, names and keys; a model loaded from a path gets a market name without the path."""
    engine_found = DiscoveredEngine('http://x/"y"', EngineKind.VLLM, "0.9", (), api_key="secret")
    plans = [
        ModelPlan("/models/tiny.gguf", 512, Amount(1_500_000), Amount(10), "as given"),
        ModelPlan("org/model:7b", None, Amount(0), Amount(2_000_000), "default"),
    ]
    text = _toml("http://c", tmp_path / "d.json", [engine_found], {engine_found.url: plans}, 3)
    assert "secret" not in text
    assert tomllib.loads(text)["engines"][0]["api_key_env"] == "OPENAI_API_KEY"
    (tmp_path / "node.toml").write_text(text)
    loaded = load_config(tmp_path / "node.toml", environment={})
    (engine,) = loaded.engines
    assert (engine.url, engine.slots) == (engine_found.url, 3)
    tiny, other = engine.models
    assert (tiny.name, tiny.sold_as, tiny.context_tokens) == ("/models/tiny.gguf", "tiny", 512)
    assert (tiny.prices.input, tiny.prices.output) == (1_500_000, 10)
    assert (other.sold_as, other.context_tokens, other.prices.input) == ("org/model:7b", None, 0)
