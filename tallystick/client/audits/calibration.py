"""Calibrates thresholds with two honest engines of one model, which show how far apart the numbers of different machines are.

Each writes answers and both score them. What the writer finds stands for a provider's evidence, and what the other one finds
for a referee. The thresholds are above nearly all that such pairs show (`tallystick.audit.thresholds`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tallystick.audit.divergence import measure_divergence
from tallystick.audit.greedy_margin import measure_margin
from tallystick.audit.scores import Answer, Row, scored_answer
from tallystick.audit.thresholds import MIN_SAMPLES, Thresholds, calibrate
from tallystick.client.audits.threshold_table import ANY, ThresholdTable
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.openai_wire import completion_text
from tallystick.protocol.routes import CHAT
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.token_scores import ScoreRequest
from tallystick.scoring.detect import find_scorer
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute, naming
from tallystick.scoring.scorer import Scorer

POSITIONS = 48
OUTPUT_TOKENS = 96
TEMPERATURES = (0.7, 0.0)
_REQUESTS = (
    "Explain {}.",
    "Write a short story about {}.",
    "Give five facts about {}.",
    "Tell a child about {}.",
    "Describe {}.",
)
_SUBJECTS = (
    *("rain", "bread", "a lighthouse", "the moon", "honey bees", "a violin", "paper", "an old bridge", "sleep", "glass"),
    *("a market", "tides", "a bicycle", "salt", "maps", "a clock", "wool", "volcanoes", "a garden", "ships", "echoes", "ink"),
)


@dataclass(frozen=True, slots=True)
class HonestEngine:
    """An engine that serves what it should. `served_model`: its own name of the model. `name`: what errors call it."""

    api: EngineApi
    scorer: Scorer
    served_model: str
    name: str

    @classmethod
    async def of(cls, api: EngineApi, served_model: str, where: str) -> HonestEngine:
        """Raises Unavailable if it cannot score."""
        with naming(where):
            scorer = await find_scorer(api, served_model)
        if scorer is None:
            text = f"{where}: expected an engine that can score, such as vLLM, SGLang or llama.cpp's server"
            raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.CLIENT)
        return cls(api, scorer, served_model, where)

    async def write(self, request: Mapping[str, Any]) -> str | None:
        """The text of its answer; None without one. Raises TallyError, which names the engine."""
        with self._naming():
            return completion_text(await self.api.post(CHAT, {**request, "model": self.served_model}))

    async def score(self, request: Mapping[str, Any], answer: str, positions: Sequence[int]) -> Answer:
        """What it finds of an answer. Raises TallyError, which names the engine."""
        with self._naming():
            asked = ScoreRequest.of({**request, "model": self.served_model}, answer, positions)
            return scored_answer(await self.scorer.score(asked))

    @contextmanager
    def _naming(self) -> Iterator[None]:
        with naming(self.name):
            try:
                yield
            except NoSuchRoute:
                text = "the engine does not answer any more as before"
                raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE) from None


@dataclass
class HonestPairs:
    """What honest pairs showed: the statistic of each answer, by test."""

    divergence: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)

    def thresholds(self) -> Thresholds:
        """Raises ValueError if there are fewer than MIN_SAMPLES of a test."""
        return Thresholds(divergence=max(calibrate(self.divergence), 1e-4), margin=max(calibrate(self.margin), 1e-3))


def make_request(number: int, temperature: float) -> dict[str, Any]:
    """A chat. Different numbers give different ones, as long as there are subjects."""
    request = _REQUESTS[number // len(_SUBJECTS) % len(_REQUESTS)].format(_SUBJECTS[number % len(_SUBJECTS)])
    sampling = {"temperature": temperature, "top_p": 1, "max_tokens": OUTPUT_TOKENS}
    return {"messages": [{"role": "user", "content": request}], **sampling}


async def compare(engines: Sequence[HonestEngine], answers: int, progress: Callable[[int], None] = lambda _: None) -> HonestPairs:
    """Lets each engine write so many answers, and compares the numbers of both. Raises TallyError.

    `progress` is called with the number of answers that were compared.
    """
    pairs = HonestPairs()
    done = 0
    for number in range(answers):
        for writer, referee in (engines, engines[::-1]):
            for temperature in TEMPERATURES:
                await _compare_answer(writer, referee, make_request(number, temperature), pairs)
            done += 1
            progress(done)
    return pairs


async def _compare_answer(writer: HonestEngine, referee: HonestEngine, request: Mapping[str, Any], pairs: HonestPairs) -> None:
    """Adds one answer. One that is empty, or too short for its test, adds nothing."""
    answer = await writer.write(request)
    if not answer:
        return
    positions = range(min(POSITIONS, len(answer.encode())))
    scored = await referee.score(request, answer, positions)
    if request["temperature"] == 0:
        margin = measure_margin(scored)
        pairs.margin += [margin.mean] if margin.conclusive else []
        return
    written = await writer.score(request, answer, positions)
    evidence = {position: Row.of(EvidenceRow.of(row.token, row.logprobs.items())) for position, row in written.items()}
    distance = measure_divergence(evidence, scored)
    pairs.divergence += [distance.mean] if distance.conclusive else []


def write_thresholds(path: Path, model: str, precision: str, thresholds: Thresholds) -> None:
    """Puts thresholds into the file of `[audits] thresholds`, beside what it has. Raises BadMessage for another file there."""
    table: dict[str, Any] = {}
    if path.exists():
        ThresholdTable.load(path)
        table = json.loads(path.read_text())
    table.setdefault(model, {})[precision or ANY] = {"divergence": thresholds.divergence, "margin": thresholds.margin}
    try:
        path.write_text(json.dumps(table, indent=2) + "\n")
    except OSError as error:
        raise BadMessage(f"{path}: {error.strerror}") from None


__all__ = ["MIN_SAMPLES", "HonestEngine", "HonestPairs", "compare", "make_request", "write_thresholds"]
