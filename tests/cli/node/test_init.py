from __future__ import annotations

import tomllib
from pathlib import Path

from node.engines.discover import DiscoveredEngine
from node.engines.kinds import EngineKind
from node.service.config import load_config
from tallystick.cli.node.init import Sale, _toml
from tallystick.protocol.types import Amount


def test_what_is_written_is_what_a_node_reads(tmp_path: Path) -> None:
    """Prices, names and keys arrive as they were meant; a path of this machine is not what the model is called on the market."""
    found = DiscoveredEngine('http://x/"y"', EngineKind.VLLM, "0.9", (), api_key="secret")
    sales = [
        Sale("/models/tiny.gguf", 512, Amount(1_500_000), Amount(10), "as given"),
        Sale("org/model:7b", None, Amount(0), Amount(2_000_000), "default"),
    ]
    text = _toml("http://c", tmp_path / "d.json", [found], {found.url: sales}, 3)
    assert "secret" not in text
    assert tomllib.loads(text)["engines"][0]["api_key_env"] == "OPENAI_API_KEY"
    (tmp_path / "node.toml").write_text(text)
    loaded = load_config(tmp_path / "node.toml", environment={})
    (engine,) = loaded.engines
    assert (engine.url, engine.slots) == (found.url, 3)
    tiny, other = engine.models
    assert (tiny.name, tiny.sold_as, tiny.context_tokens) == ("/models/tiny.gguf", "tiny", 512)
    assert (tiny.prices.input, tiny.prices.output) == (1_500_000, 10)
    assert (other.sold_as, other.context_tokens, other.prices.input) == ("org/model:7b", None, 0)
