"""A small market with cheaters on real engines: the quick form of `scripts/bench trust`."""

from __future__ import annotations

from pathlib import Path

from scripts.relay import llama_cpp
from scripts.trust.figures import figures
from scripts.trust.live import SMALL, Plan, make_variants, observe
from tallystick.audit.divergence import measure_divergence
from tallystick.audit.scores import Row, scored_answer
from tallystick.audit.thresholds import Thresholds


async def test_a_small_market_with_cheaters(tmp_path: Path) -> None:
    """Honest engines are far below the threshold; another quantization and a hidden prompt are found with two answers."""
    engine = llama_cpp.install_engine()
    assert engine is not None
    models = make_variants(engine)
    assert models is not None
    observed = await observe(engine, models, tmp_path, Plan(SMALL.providers, 2))
    threshold = Thresholds().divergence
    for name in ("honest_a", "honest_b", "prefill"):
        for observation in observed[name]:
            evidence = {position: Row.of(row) for position, row in enumerate(observation.rows)}
            assert measure_divergence(evidence, scored_answer(observation.response)).mean < threshold / 2, name
    found = figures(observed, runs=4, audits=20)
    assert found["honest_suspect_per_1000"] == 0
    cheaters = found["cheaters"]
    assert isinstance(cheaters, dict)
    for name in ("q4_0", "hidden_prompt"):
        assert cheaters[name]["jobs_to_confirm_p95"] == 2, name
