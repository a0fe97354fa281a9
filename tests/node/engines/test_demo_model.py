"""The stand-in's answers are audited like those of a model: by the node's own probe and rows, and by the adapters of referees."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from node.domain.answer_rows import AnswerRows
from node.engines.demo import DemoEngine
from node.engines.demo_answer import MODEL
from node.engines.demo_model import MAX_KNOWN_WORDS, DemoModel
from node.engines.logprobs import read_reports
from tallystick.audit.divergence import measure_divergence
from tallystick.audit.sampling import Sampling
from tallystick.audit.scores import Row, scored_answer
from tallystick.audit.surprisal import measure_surprisal
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.sse import DONE
from tallystick.protocol.token_evidence import EvidenceRow, unpack_evidence
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse
from tallystick.protocol.wire import loads
from tallystick.runtime.serving import serving
from tallystick.scoring.detect import find_scorer
from tallystick.scoring.engine_api import EngineApi
from tallystick.scoring.vllm import VllmScorer

PROMPTS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "what is a tally stick"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what is  a\ntally?"}]},
    {
        "messages": [
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "é 🙂 a a"},
        ]
    },
    {"prompt": "Once upon a time"},
)


@pytest.fixture
async def api() -> AsyncIterator[EngineApi]:
    """A stand-in that writes."""
    async with serving(DemoEngine().app, "127.0.0.1", 0) as port, EngineApi.open(f"http://127.0.0.1:{port}") as api:
        yield api


@pytest.fixture
async def referee() -> AsyncIterator[EngineApi]:
    """Another process's stand-in, which has seen nothing yet."""
    async with serving(DemoEngine().app, "127.0.0.1", 0) as port, EngineApi.open(f"http://127.0.0.1:{port}") as api:
        yield api


async def answer(api: EngineApi, prompt: dict[str, Any], **more: Any) -> tuple[str, tuple[EvidenceRow, ...]]:
    """An answer, and the rows that a node commits to."""
    chat = "messages" in prompt
    asked = {"logprobs": True, "top_logprobs": 5} if chat else {"logprobs": 5}
    document = await api.post("/v1/chat/completions" if chat else "/v1/completions", {"model": MODEL, **prompt, **asked, **more})
    (choice,) = document["choices"]
    text = choice["message"]["content"] if chat else choice["text"]
    rows = AnswerRows()
    rows.add(list(read_reports(choice["logprobs"])), text.encode(), marks=False)
    truncated = choice["finish_reason"] == "length"
    return text, unpack_evidence(rows.commit(document["usage"]["completion_tokens"], truncated=truncated).packed)


async def score(api: EngineApi, prompt: dict[str, Any], completion: tuple[int, ...] | str, positions: range) -> ScoreResponse:
    """What a referee finds."""
    scorer = await find_scorer(api, MODEL)
    assert isinstance(scorer, VllmScorer)
    return await scorer.score(ScoreRequest.of({"model": MODEL, **prompt}, completion, positions))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("limit", [None, 9])
@pytest.mark.parametrize("as_text", [True, False])
async def test_an_honest_answer_passes(
    api: EngineApi, referee: EngineApi, prompt: dict[str, Any], limit: int | None, as_text: bool
) -> None:
    """By its tokens and by its text, whole and cut at a limit: the numbers agree, and the text surprises nobody."""
    text, rows = await answer(api, prompt, **({} if limit is None else {"max_tokens": limit}))
    assert len(rows) == len(text.split())
    tokens = tuple(row.token for row in rows)
    scores = await score(referee, prompt, text if as_text else tokens, range(len(tokens) + 1))
    assert scores.tokens == tokens
    numbers = scored_answer(scores)
    distance = measure_divergence({at: Row.of(row) for at, row in enumerate(rows)}, numbers)
    assert (distance.positions, distance.mean < 0.002) == (len(tokens), True)
    assert measure_surprisal(numbers, Sampling(0.7)).log_evidence < 0.1
    assert all(row is not None and len(row.top) > 1 for row in scores.rows)


async def test_the_prompt_is_counted_as_it_is_billed(api: EngineApi) -> None:
    """Each word is a token, in the usage and for a referee."""
    for prompt in PROMPTS:
        words = prompt.get("prompt") or " ".join(message["content"] for message in prompt["messages"])
        assert (await score(api, prompt, "a b", range(2))).prompt_tokens == len(words.split())


async def test_another_answer_is_found(api: EngineApi, referee: EngineApi) -> None:
    """A word that the stand-in would not have written is unlikely."""
    _, rows = await answer(api, PROMPTS[0])
    tokens = [row.token for row in rows]
    random.Random(1).shuffle(tokens)
    numbers = scored_answer(await score(referee, PROMPTS[0], tuple(tokens), range(len(tokens))))
    assert measure_surprisal(numbers, Sampling(0.7)).log_evidence > 7


async def test_a_stream_has_the_same_rows(api: EngineApi) -> None:
    """Each word comes with its own."""
    _, rows = await answer(api, PROMPTS[0])
    body = {"model": MODEL, "stream": True, "logprobs": True, "top_logprobs": 5, **PROMPTS[0]}
    async with api._session.post(api._api + "/chat/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in (await response.text()).splitlines() if line.startswith("data: ")]
    streamed = AnswerRows()
    for event in events:
        for choice in loads(event, "event")["choices"] if event.encode() != DONE else ():
            text = choice["delta"].get("content", "")
            streamed.add([] if choice["logprobs"] is None else list(read_reports(choice["logprobs"])), text.encode(), marks=False)
    assert unpack_evidence(streamed.commit(len(rows), truncated=False).packed) == rows


async def test_what_it_never_tokenized_is_refused(api: EngineApi) -> None:
    """Ids of another engine, or of a prompt without its end."""
    scorer = await find_scorer(api, MODEL)
    assert scorer is not None
    for prompt in ([1, 2, 3], []):
        with pytest.raises(BadMessage):
            await scorer.score(ScoreRequest.of({"model": MODEL, "prompt": prompt}, (1, 2, 3), (0, 1)))


def test_what_it_remembers_is_bounded() -> None:
    """Ids that were forgotten are refused, and can be tokenized again."""
    model = DemoModel(str.split)
    tokens = model.tokenize("a b", is_prompt=True)
    model.tokenize(" ".join(map(str, range(MAX_KNOWN_WORDS + 1_000))), is_prompt=False)
    assert len(model._known) <= MAX_KNOWN_WORDS
    with pytest.raises(ValueError, match="expected ids"):
        model.score(tokens, 5)
    assert model.tokenize("a b", is_prompt=True) == tokens
    assert len(model.score(tokens, 5)) == 3


def test_log_probabilities_are_some() -> None:
    """Those of a row add up to less than 1, with any number of tokens, the likeliest first."""
    for top in range(1, 21):
        for row in DemoModel(str.split).rows(["a", "b"], top):
            assert Row(next(iter(row)), row).lowest == min(row.values())
            assert len(row) == top
            assert next(iter(row.values())) == max(row.values())
