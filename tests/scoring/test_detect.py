from __future__ import annotations

import asyncio

import pytest

from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.token_scores import MAX_TOP, ScoreRequest, ScoreResponse
from tallystick.scoring.detect import find_scorer
from tallystick.scoring.engine_api import EngineApi
from tallystick.scoring.llama_cpp import LlamaCppScorer
from tallystick.scoring.sglang import SglangScorer
from tallystick.scoring.vllm import VllmScorer
from tests.scoring.engines import (
    CONTEXT,
    END,
    ENGINES,
    FakeEngine,
    best,
    llama_cpp,
    logprobs,
    refused,
    serving,
    template,
    text_only,
    tokens_of,
    vllm,
)

MESSAGES = [{"role": "user", "content": "Say hi"}]
PROMPT = tokens_of(template(MESSAGES))
ADAPTERS = {"llama.cpp": LlamaCppScorer, "vLLM": VllmScorer, "older vLLM": VllmScorer, "SGLang": SglangScorer}


async def score(engine: FakeEngine, request: ScoreRequest) -> ScoreResponse:
    """Finds the adapter of an engine, and scores."""
    async with serving(engine) as url, EngineApi.open(f"{url}/v1") as api:
        scorer = await find_scorer(api, "toy")
        assert scorer is not None
        return await scorer.score(request)


@pytest.mark.parametrize("name", ENGINES)
async def test_engines_are_told_apart_by_what_they_do(name: str) -> None:
    """Each engine is scored by its own adapter, though none says which kind it is."""
    async with serving(ENGINES[name]()) as url, EngineApi.open(url) as api:
        assert type(await find_scorer(api, "toy")) is ADAPTERS[name]


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("completion", ["text", "tokens"])
async def test_scores_are_the_models_own_probabilities(name: str, completion: str) -> None:
    """Chosen positions of an answer, its end included, get the probabilities that the model gives after the text before them."""
    answer = tokens_of("héllo, world! 🦊 yes")
    given: str | tuple[int, ...] = bytes(answer).decode() if completion == "text" else tuple(answer)
    positions = (0, 1, 2, 7, 15, 16, len(answer) - 1, len(answer))
    response = await score(ENGINES[name](), ScoreRequest("toy", {"messages": MESSAGES}, given, positions))
    assert response.prompt_tokens == len(PROMPT)
    assert response.tokens == tuple(answer)
    end = logprobs([*PROMPT, *answer])[END] if name == "llama.cpp" else None
    assert response.end_logprob == (None if end is None else pytest.approx(end))
    for position, row in zip(positions, response.rows, strict=True):
        before = [*PROMPT, *answer[:position]]
        assert row is not None
        assert row.token == (answer[position] if position < len(answer) else None)
        assert dict(row.top) == pytest.approx(best(before, MAX_TOP))
        if row.token is not None and row.token in dict(row.top):
            assert row.logprob == pytest.approx(logprobs(before)[row.token])


@pytest.mark.parametrize("name", ENGINES)
async def test_prompts_of_completions_are_scored_as_text_and_as_tokens(name: str) -> None:
    """A completion's prompt is read as it is, without a template."""
    for prompt in ("Once upon", tokens_of("Once upon")):
        response = await score(ENGINES[name](), ScoreRequest("toy", {"prompt": prompt}, (97, 98), (1,), top=3))
        assert response.prompt_tokens == len("Once upon")
        assert response.rows[0] is not None
        assert dict(response.rows[0].top) == pytest.approx(best([*tokens_of("Once upon"), 97], 3))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("completion", [(END + 5,), (97,) * CONTEXT])
async def test_a_refusal_is_the_requests_fault_and_quotes_nothing(name: str, completion: tuple[int, ...]) -> None:
    """Unknown tokens and too long texts are refused, without the engine's words, which quote the prompt."""
    request = ScoreRequest("toy", {"messages": MESSAGES}, completion, (len(completion),))
    with pytest.raises(BadMessage) as refusal:
        await score(ENGINES[name](), request)
    assert "secret" not in str(refusal.value)


async def test_an_engine_without_scores_is_no_referee() -> None:
    """An engine that ignores the request for scores has no adapter."""
    async with serving(text_only()) as url, EngineApi.open(url) as api:
        assert await find_scorer(api, "toy") is None


async def test_a_busy_engine_is_asked_again_later() -> None:
    """Neither yes nor no is found out while an engine is busy."""
    engine = FakeEngine(dict.fromkeys(("/tokenize", "/apply-template", "/completion"), lambda _: refused(503)))
    async with serving(engine) as url, EngineApi.open(url) as api:
        with pytest.raises(Unavailable) as busy:
            await find_scorer(api, "toy")
    assert busy.value.code is Code.NODE_BUSY


async def test_an_engine_that_is_down_is_asked_again_later() -> None:
    """An address without an engine says nothing about scores."""
    async with serving(text_only()) as url:
        pass
    async with EngineApi.open(url) as api:
        with pytest.raises(Unavailable) as down:
            await find_scorer(api, "toy")
    assert down.value.code is Code.ENGINE_UNAVAILABLE


async def test_an_engine_that_hangs_ends_with_its_deadline() -> None:
    """A call never lasts longer than its deadline."""

    async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, EngineApi.open(f"http://127.0.0.1:{port}", seconds=0.05) as api:
        with pytest.raises(Unavailable):
            await find_scorer(api, "toy")


async def test_a_base_model_without_a_template_is_scored_by_completions() -> None:
    """An engine that cannot template a chat still scores completions."""
    engine = llama_cpp()
    engine.endpoints["/apply-template"] = lambda _: refused(500)
    response = await score(engine, ScoreRequest("toy", {"prompt": "a"}, (97,), (0,)))
    assert response.rows[0] is not None


async def test_long_texts_are_scored_position_by_position() -> None:
    """An answer of vLLM holds each position of its text, so that the chosen ones of a long text are asked for alone."""
    answer = tuple(tokens_of("a rather long answer"))
    request = ScoreRequest("toy", {"messages": MESSAGES}, answer, (0, 4, len(answer)))
    async with serving(vllm()) as url, EngineApi.open(url) as api:
        whole = await VllmScorer(api, "toy").score(request)
        each = await VllmScorer(api, "toy", max_prompt_logprobs=10).score(request)
    assert [row and row.top for row in each.rows] == [row and row.top for row in whole.rows]


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [],
        [{"id": 1}],
        [{"id": "x", "logprob": -1.0}],
        [{"id": 1, "logprob": 0.5}],
        [{"id": 1, "logprob": "-1"}],
        [{"id": -4, "logprob": -1.0}],
        [{"id": 1, "logprob": -0.01}, {"id": 2, "logprob": -0.01}],
        "text",
        7,
    ],
)
async def test_an_engine_whose_rows_are_no_probabilities_is_no_referee(rows: object) -> None:
    """Rows that are missing, of another form, or impossible make an engine unfit, and break nothing."""
    engine = llama_cpp()
    engine.endpoints["/completion"] = lambda _: {"content": "", "completion_probabilities": [{"top_logprobs": rows}]}
    async with serving(engine) as url, EngineApi.open(url) as api:
        assert await find_scorer(api, "toy") is None


async def test_an_answer_that_ends_with_its_last_token_ends_there() -> None:
    """Evidence may have the token that ends a turn, or end before it. Without the end among the positions, nothing is said."""
    text = tokens_of("abc")
    ended = await score(llama_cpp(), ScoreRequest("toy", {"messages": MESSAGES}, (*text, END), (3,)))
    assert ended.end_logprob == pytest.approx(logprobs([*PROMPT, *text])[END])
    unasked = await score(llama_cpp(), ScoreRequest("toy", {"messages": MESSAGES}, tuple(text), (0, 2)))
    assert unasked.end_logprob is None
