"""Scoring by vLLM: a completion of the text's tokens that reports the log-probabilities of its prompt (`prompt_logprobs`).

They are the model's own, before temperature and truncation. The answer has every position of the text. So a long text is scored
by one-token completions at the chosen positions instead, which share their prefix in the engine's cache.
Source: vLLM, "OpenAI-Compatible Server".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tallystick.protocol.routes import COMPLETIONS
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse, ScoreRow
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute
from tallystick.scoring.prompt_tokens import read_completion, read_prompt
from tallystick.scoring.scorer import find_list

MAX_PROMPT_LOGPROBS = 8_192
"""Tokens of a text whose log-probabilities are read in one answer: about 15 MB of JSON."""
_PREFIX = "token_id:"


class VllmScorer:
    """See the module's docstring."""

    def __init__(self, api: EngineApi, model: str, max_prompt_logprobs: int = MAX_PROMPT_LOGPROBS) -> None:
        self._api, self._model, self._max_prompt_logprobs = api, model, max_prompt_logprobs

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Scorer."""
        prompt = await read_prompt(self._api, self._model, request.prompt)
        tokens = await read_completion(self._api, self._model, request.completion)
        positions = [position for position in request.positions if position <= len(tokens)]
        read = len(prompt) + (positions[-1] if positions else 0)
        if read <= self._max_prompt_logprobs:
            logprobs = await self._score_whole((*prompt, *tokens), len(prompt), positions, request.top)
        else:
            logprobs = await self._score_each((*prompt, *tokens), len(prompt), positions, request.top)
        rows = []
        for position in request.positions:
            token = tokens[position] if position < len(tokens) else None
            known = logprobs.get(position)
            rows.append(ScoreRow.of(position, token, known, request.top) if known else None)
        return ScoreResponse(request.model, len(prompt), tokens, tuple(rows))

    async def _score_whole(
        self, text: tuple[int, ...], start: int, positions: list[int], top: int
    ) -> dict[int, Mapping[int, float]]:
        if not positions:
            return {}
        last = positions[-1]
        read = text[: start + last + 1]
        document = await self._complete({"prompt": list(read), "prompt_logprobs": top, "logprobs": top})
        rows = find_list(document, "choices", 0, "prompt_logprobs")
        if len(rows) != len(read):
            raise NoSuchRoute
        scores = {position: _read_row(rows[start + position]) for position in positions if start + position < len(rows)}
        if start + last == len(text):
            scores[last] = _read_next(document)
        return scores

    async def _score_each(
        self, text: tuple[int, ...], start: int, positions: list[int], top: int
    ) -> dict[int, Mapping[int, float]]:
        scores = {}
        for position in positions:
            scores[position] = _read_next(await self._complete({"prompt": list(text[: start + position]), "logprobs": top}))
        return scores

    async def _complete(self, members: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {"model": self._model, "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
        return await self._api.post(COMPLETIONS, {**fixed, **members})


def _read_row(row: object) -> Mapping[int, float]:
    """One position of `prompt_logprobs`: log-probabilities by token, as the text of a number."""
    if not isinstance(row, dict) or not row:
        raise NoSuchRoute
    try:
        return {int(token): entry["logprob"] if isinstance(entry, dict) else entry for token, entry in row.items()}
    except (KeyError, ValueError):
        raise NoSuchRoute from None


def _read_next(document: Mapping[str, Any]) -> Mapping[int, float]:
    """The likeliest tokens after the prompt; empty if the engine names them by their text."""
    row = find_list(document, "choices", 0, "logprobs", "top_logprobs")
    entries = row[0] if row and isinstance(row[0], dict) else {}
    try:
        return {int(name.removeprefix(_PREFIX)): value for name, value in entries.items() if name.startswith(_PREFIX)}
    except ValueError:
        return {}
