"""Scoring by llama.cpp's server: one-token completions at the chosen positions.

They are sent one after another, so that each finds the prefix of the last one in the cache: together they cost little more than
reading the text once. The engine reports the probabilities before any sampling. What it samples is forced to be an ordinary
word, because its answer lacks the row if it samples the end of the text or half of a UTF-8 sequence.
Source: llama.cpp, tools/server/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse, ScoreRow, bounded_logprob
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute
from tallystick.scoring.scorer import find_list, read_tokens

END_TOP = 2_000
"""Tokens that are read where an answer ends. If the end is not among them, it is at most as probable as the last."""
_WORD = " the"
_FORCE = 10_000.0
"""A bias above any difference of logits."""


class LlamaCppScorer:
    """See the module's docstring."""

    def __init__(self, api: EngineApi, model: str) -> None:
        self._api, self._model = api, model
        self._word: int | None = None
        self._end: int | None = None

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Scorer."""
        prompt = await self._read_prompt(request.prompt)
        completion = request.completion
        tokens = await self._tokenize(completion, special=False) if isinstance(completion, str) else completion
        end_token = await self._read_end()
        end = len(tokens) - (tokens[-1] == end_token)
        rows: list[ScoreRow | None] = []
        end_logprob = None
        for position in request.positions:
            if position > len(tokens):
                rows.append(None)
                continue
            top = max(request.top, END_TOP) if position == end and end_token >= 0 else request.top
            logprobs = await self._score_next((*prompt, *tokens[:position]), top)
            token = tokens[position] if position < len(tokens) else None
            rows.append(ScoreRow.of(position, token, logprobs, request.top) if logprobs else None)
            if position == end and end_token >= 0 and logprobs:
                end_logprob = bounded_logprob(logprobs.get(end_token, min(logprobs.values())))
        return ScoreResponse(request.model, len(prompt), tokens, tuple(rows), end_logprob)

    async def _read_prompt(self, prompt: Mapping[str, Any]) -> tuple[int, ...]:
        """The tokens of the prompt as the engine reads that of a chat or a completion."""
        text = prompt.get("prompt")
        if isinstance(text, list | tuple):
            return tuple(text)
        if text is None:
            document = await self._api.post("/apply-template", {"model": self._model, **prompt})
            text = document.get("prompt")
            if not isinstance(text, str):
                raise NoSuchRoute
        return await self._tokenize(text, special=True)

    async def _read_end(self) -> int:
        """The token that ends a turn, as GET /props names it; -1 if it does not."""
        if self._end is None:
            text = (await self._api.get("/props")).get("eos_token")
            body = {"model": self._model, "content": text, "add_special": False, "parse_special": True}
            tokens = read_tokens(await self._api.post("/tokenize", body)) if isinstance(text, str) and text else ()
            self._end = tokens[0] if len(tokens) == 1 else -1
        return self._end

    async def _tokenize(self, text: str, *, special: bool) -> tuple[int, ...]:
        body = {"model": self._model, "content": text, "add_special": special, "parse_special": special}
        tokens = read_tokens(await self._api.post("/tokenize", body))
        if not tokens:
            raise BadMessage("score request: expected a text of at least one token")
        return tokens

    async def _score_next(self, tokens: tuple[int, ...], top: int) -> dict[int, float]:
        """The log-probabilities of the likeliest tokens after these; empty if the engine does not say."""
        if self._word is None:
            self._word = (await self._tokenize(_WORD, special=False))[-1]
        body = {
            "model": self._model,
            "prompt": list(tokens),
            "n_predict": 1,
            "n_probs": top,
            "temperature": 0,
            "logit_bias": [[self._word, _FORCE]],
            "ignore_eos": True,
            "cache_prompt": True,
            "post_sampling_probs": False,
            "return_tokens": True,
        }
        document = await self._api.post("/completion", body)
        if "completion_probabilities" not in document and "content" in document:
            return {}
        entries = find_list(document, "completion_probabilities", 0, "top_logprobs")
        try:
            return {int(entry["id"]): entry["logprob"] for entry in entries}
        except (KeyError, TypeError, ValueError):
            raise NoSuchRoute from None
