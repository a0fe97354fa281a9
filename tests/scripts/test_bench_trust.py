"""The figures of `scripts/bench trust`, from answers of toy models instead of real engines."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from scripts.trust import cheaters
from scripts.trust.engine import Document, ServedEngine
from scripts.trust.figures import MAX_JOBS, Detection, detection_figures, figures, served_share
from scripts.trust.live import FULL, SMALL, make_requests
from scripts.trust.observations import Observation, read_observations, write_observations
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.token_scores import ScoreResponse, ScoreRow
from tallystick.protocol.usage_reports import read_usage
from tallystick.scoring.engine_api import EngineApi
from tests.audit.models import VOCABULARY, ToyModel

RIGHT = ToyModel(1)
LENGTH, PROMPT = 60, 20
REQUEST = {"model": "m", "messages": [], "temperature": 1.0, "top_p": 1, "top_k": 0, "min_p": 0}


def rows_of(model: ToyModel, tokens: list[int]) -> list[dict[int, float]]:
    """The log-probabilities of each position, the end included. The first depends on token 0."""
    return [dict(enumerate(model.logprobs(last))) for last in (0, *tokens)]


def observe(
    name: str, draws: random.Random, *, writer: ToyModel, evidence: ToyModel, temperature: float, billed: float
) -> Observation:
    """An answer that one model wrote, with the evidence of another, scored by the right one."""
    tokens = [draws.choices(range(VOCABULARY), [math.exp(value) for value in writer.logprobs(0, temperature)])[0]]
    while len(tokens) < LENGTH:
        weights = [math.exp(value) for value in writer.logprobs(tokens[-1], temperature)]
        tokens.append(draws.choices(range(VOCABULARY), weights)[0])
    committed = [
        EvidenceRow.of(token, row.items()) for token, row in zip(tokens, rows_of(evidence, tokens)[:LENGTH], strict=True)
    ]
    scored = [
        ScoreRow.of(position, tokens[position] if position < LENGTH else None, row, 20)
        for position, row in enumerate(rows_of(RIGHT, tokens))
    ]
    response = ScoreResponse("m", PROMPT, tuple(tokens), tuple(scored))
    return Observation(name, REQUEST, tuple(committed), response, round((PROMPT + LENGTH) * billed), ended=False)


def market() -> dict[str, list[Observation]]:
    """Answers of honest providers, on machines that differ a little, and of cheaters."""
    draws = random.Random(3)
    near, coarse, other = ToyModel(1, 0.003), ToyModel(1, 0.2), ToyModel(2)
    kinds = {
        "honest_a": (RIGHT, RIGHT, 1.0, 1.0),
        "honest_b": (near, near, 1.0, 1.0),
        "q4_0": (coarse, coarse, 1.0, 1.0),
        "other_model": (other, other, 1.0, 1.0),
        "prefill": (other, RIGHT, 1.0, 1.0),
        "temperature": (RIGHT, RIGHT, 0.7, 1.0),
        "padded": (RIGHT, RIGHT, 1.0, 1.05),
    }
    return {
        name: [observe(name, draws, writer=writer, evidence=evidence, temperature=temperature, billed=billed) for _ in range(10)]
        for name, (writer, evidence, temperature, billed) in kinds.items()
    }


@pytest.fixture(scope="module")
def found() -> dict[str, object]:
    """The figures of the market."""
    return figures(market(), runs=2, audits=40)


def test_cheaters_are_confirmed_in_time(found: dict[str, object]) -> None:
    """Every cheat that the tests are made for is found within its goal, honest jobs in between or not."""
    cheaters = found["cheaters"]
    assert isinstance(cheaters, dict)
    most = {"q4_0": 2, "other_model": 2, "prefill": 3, "temperature": 20, "one_job_in_five": 100, "honest_at_first": 14}
    for name, jobs in most.items():
        assert cheaters[name]["jobs_to_confirm_p50"] <= jobs, name
        assert cheaters[name]["found_share"] == 1, name
    assert cheaters["padded"]["tokens_to_confirm_p50"] <= 25_000


def test_honest_providers_are_left_alone(found: dict[str, object]) -> None:
    """Machines that differ a little are no reason for a suspicion, and audits of trusted providers cost little."""
    assert found["honest_suspect_per_1000"] == 0
    assert found["honest_confirmed_per_1000"] == 0
    share = found["audit_cost_share"]
    assert isinstance(share, float)
    assert 0 < share <= 0.03


def test_figures_of_one_cheater() -> None:
    """Runs that found nothing count as never, in the quantiles as well."""
    seen = detection_figures([Detection(2, 100), Detection(4, 300), Detection(3, 200), Detection(None, None)])
    assert seen["jobs_to_confirm_p50"] == 4
    assert seen["jobs_to_confirm_p95"] is None
    assert (seen["tokens_to_confirm_p50"], seen["found_share"]) == (200, 0.75)
    never = detection_figures([Detection(None, None)] * 3)
    assert never["jobs_to_confirm_p50"] is never["tokens_to_confirm_p50"] is None
    assert served_share(never) == 1.0
    assert served_share({"jobs_to_confirm_p50": 3}) == pytest.approx(0.01)
    assert detection_figures([Detection(MAX_JOBS, 1)])["jobs_to_confirm_p50"] == MAX_JOBS


def test_observations_are_kept(tmp_path: Path) -> None:
    """What was observed once can be judged again without a market."""
    observed = [jobs[0] for jobs in market().values()]
    write_observations(tmp_path / "seen", observed)
    again = read_observations(tmp_path / "seen")
    assert [(o.provider, o.rows, o.billed, o.ended) for o in again] == [(o.provider, o.rows, o.billed, o.ended) for o in observed]
    assert [len(o.response.rows) for o in again] == [LENGTH + 1] * len(observed)


def test_plans_and_requests() -> None:
    """The small plan is a part of the full one, and no provider gets the same request twice."""
    assert set(SMALL.providers) < set(FULL.providers)
    texts = [request["messages"][0]["content"] for request in make_requests(60)]
    assert len(set(texts)) == 60
    assert make_requests(3) == make_requests(3)


async def test_a_cut_answer_fits_its_counts() -> None:
    """A node commits to rows only if there are as many as its engine counts, and takes a larger total for reasoning."""
    words = [{"id": number, "token": f" {number}", "logprob": -0.1, "top_logprobs": []} for number in range(9)]

    class Engine(ServedEngine):
        async def chat(self, body: Mapping[str, Any]) -> Document:
            choice = {"message": {"content": "all"}, "logprobs": {"content": words}, "finish_reason": "length"}
            return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}}

    async with EngineApi.open("http://127.0.0.1:9") as api:
        answer = await cheaters.cut(Engine(api, "m"))({"messages": []})
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (" 0 1 2 3", "stop")
    usage = read_usage(answer["usage"])
    assert usage is not None
    assert usage.output == len(choice["logprobs"]["content"]) == 4


async def test_a_replayed_answer_is_not_that_of_a_trial() -> None:
    """A node asks its engine for a token or two before it sells. That text would be too short to be found again."""
    asked: list[int] = []

    class Engine(ServedEngine):
        async def chat(self, body: Mapping[str, Any]) -> Document:
            asked.append(body["max_tokens"])
            entries = [{"id": number, "token": f" {number}", "logprob": -0.1} for number in range(body["max_tokens"])]
            choice = {"message": {"content": f"answer {len(asked)}"}, "logprobs": {"content": entries}}
            return {"choices": [choice], "usage": {"completion_tokens": body["max_tokens"]}}

        async def score(
            self, body: Mapping[str, Any], tokens: Sequence[int], positions: Sequence[int], top: int = 5
        ) -> ScoreResponse:
            scored = [(position, tokens[position]) for position in positions]
            rows = tuple(ScoreRow.of(position, token, {token: -0.5}, top) for position, token in scored)
            return ScoreResponse(body["model"], PROMPT, tuple(tokens), rows)

    async with EngineApi.open("http://127.0.0.1:9") as api:
        cheat = cheaters.replay(Engine(api, "m"))
        texts = [
            (await cheat({"model": "m", "max_tokens": limit}))["choices"][0]["message"]["content"] for limit in (1, 64, 64, 2)
        ]
    assert asked == [1, 64]
    assert texts == ["answer 1", "answer 2", "answer 2", "answer 2"]
