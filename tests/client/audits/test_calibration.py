from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tallystick.audit.thresholds import MIN_SAMPLES, Thresholds
from tallystick.client.audits.calibration import HonestEngine, HonestPairs, compare, make_request, write_thresholds
from tallystick.client.audits.threshold_table import ThresholdTable
from tallystick.protocol.errors import BadMessage, Unavailable
from tallystick.scoring.engine_api import EngineApi
from tallystick.scoring.vllm import VllmScorer
from tests.scoring.engines import FakeEngine, best, llama_cpp, serving, template, text_only, tokens_of, vllm


def writing(engine: FakeEngine) -> FakeEngine:
    """The engine with chats: the likeliest printable text after the prompt."""

    def chat(body: dict[str, Any]) -> Any:
        text = tokens_of(template(body["messages"]))
        start = len(text)
        while len(text) < start + 24:
            text.append(next(token for token in best(text, 300) if 32 <= token < 127))
        return {"choices": [{"message": {"content": bytes(text[start:]).decode()}, "finish_reason": "length"}]}

    engine.endpoints["/v1/chat/completions"] = chat
    return engine


async def test_honest_engines_of_different_kinds_are_compared() -> None:
    """Both write and both score. Engines with equal numbers differ by no more than rounding."""
    async with (
        serving(writing(llama_cpp())) as first,
        serving(writing(vllm())) as second,
        EngineApi.open(first) as first_api,
        EngineApi.open(second) as second_api,
    ):
        engines = [await HonestEngine.of(first_api, "toy", "first"), await HonestEngine.of(second_api, "toy", "second")]
        seen: list[int] = []
        pairs = await compare(engines, 2, seen.append)
    assert len(pairs.divergence) == len(pairs.margin) == 4
    assert max(pairs.divergence) < 0.002
    assert min(pairs.margin) > 0, "printable tokens are not always the best ones"
    assert seen == [1, 2, 3, 4]


async def test_an_engine_that_cannot_score_is_named() -> None:
    """The command says which engine does not fit."""
    async with serving(text_only()) as url, EngineApi.open(url) as api:
        with pytest.raises(Unavailable, match="first: expected an engine that can score"):
            await HonestEngine.of(api, "toy", "first")


def test_requests_differ() -> None:
    """No request repeats before all subjects were used with all forms."""
    texts = [make_request(number, 0.0)["messages"][0]["content"] for number in range(110)]
    assert len(set(texts)) == 110


def test_thresholds_are_above_what_honest_pairs_show() -> None:
    """They have a margin above the pairs, and are never zero, though equal machines differ by nothing."""
    pairs = HonestPairs([0.001] * MIN_SAMPLES, [0.02] * MIN_SAMPLES)
    assert pairs.thresholds().divergence == pytest.approx(0.0015)
    assert pairs.thresholds().margin == pytest.approx(0.03)
    equal = HonestPairs([0.0] * MIN_SAMPLES, [0.0] * MIN_SAMPLES).thresholds()
    assert (equal.divergence, equal.margin) == (1e-4, 1e-3)
    with pytest.raises(ValueError, match="at least"):
        HonestPairs([0.001] * 5, [0.02] * MIN_SAMPLES).thresholds()


def test_the_file_keeps_what_it_has(tmp_path: Path) -> None:
    """Thresholds of one product are added to those of others, in the form that audits read."""
    path = tmp_path / "thresholds.json"
    write_thresholds(path, "a", "f16", Thresholds(divergence=0.02, margin=0.1))
    write_thresholds(path, "a", "q8_0", Thresholds(divergence=0.03))
    write_thresholds(path, "b", "", Thresholds(divergence=0.04))
    table = ThresholdTable.load(path)
    assert [table.of("a", "f16").divergence, table.of("a", "q8_0").divergence, table.of("b", "any").divergence] == [
        0.02,
        0.03,
        0.04,
    ]
    assert table.of("a", "f16").margin == 0.1
    assert table.of("a", "f16").surprisal == Thresholds().surprisal
    path.write_text(json.dumps({"a": {"f16": {"divergence": -1}}}))
    with pytest.raises(BadMessage):
        write_thresholds(path, "a", "f16", Thresholds())


async def test_an_engine_that_fails_is_named() -> None:
    """Of two engines, the one that went away while they were compared."""
    async with (
        serving(writing(llama_cpp())) as first,
        EngineApi.open(first) as first_api,
    ):
        async with serving(writing(vllm())) as second, EngineApi.open(second) as second_api:
            engines = [await HonestEngine.of(first_api, "toy", "first"), await HonestEngine.of(second_api, "toy", "second")]
            gone = EngineApi.open(second)
        async with gone as gone_api:
            engines[1] = replace(engines[1], api=gone_api, scorer=VllmScorer(gone_api, "toy"))
            with pytest.raises(Unavailable, match="second: the engine cannot be asked"):
                await compare(engines, 1)
