"""Finds out whether and how an engine can score, by what it does: each adapter tries to score a word."""

from __future__ import annotations

from typing import Any, Final

from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.token_scores import ScoreRequest
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute
from tallystick.scoring.llama_cpp import LlamaCppScorer
from tallystick.scoring.scorer import Scorer
from tallystick.scoring.sglang import SglangScorer
from tallystick.scoring.vllm import VllmScorer

SCORERS: Final = (LlamaCppScorer, SglangScorer, VllmScorer)
"""All adapters. Each asks for an endpoint or a member that the other engines lack."""
_TOP = 5
_PROMPTS: Final[tuple[dict[str, Any], ...]] = (
    {"messages": [{"role": "user", "content": "Say a word."}]},
    {"prompt": "A word is"},
)
"""A base model has no template for messages."""


async def find_scorer(api: EngineApi, model: str) -> Scorer | None:
    """The adapter that can score by this engine; None if none can. Raises Unavailable if the engine is busy or down.

    The engine reads and generates a few tokens.
    """
    failure: Unavailable | None = None
    answered = False
    adapters: tuple[Scorer, ...] = tuple(adapter(api, model) for adapter in SCORERS)
    for scorer, prompt in ((adapter, prompt) for adapter in adapters for prompt in _PROMPTS):
        try:
            if await _scores(scorer, ScoreRequest(model, prompt, " the", (0, 1), _TOP)):
                return scorer
            answered = True
        except (NoSuchRoute, BadMessage):
            answered = True
        except Unavailable as error:
            if error.code is Code.NODE_BUSY:
                raise
            failure = error  # some engines answer an unknown member or a missing template with 500
    if failure is not None and not answered:
        raise failure
    return None


async def _scores(scorer: Scorer, request: ScoreRequest) -> bool:
    """Whether all rows of the answer have several tokens."""
    response = await scorer.score(request)
    return all(row is not None and len(row.top) > 1 for row in response.rows)
