"""Scoring by SGLang: its own endpoint /generate reports the log-probabilities of its input from a position on.

SGLang's log-probabilities follow the temperature of the request, so that the request asks for 1, at which they are the model's
own. Source: SGLang, "Sampling Parameters".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse, ScoreRow
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute
from tallystick.scoring.prompt_tokens import read_completion, read_prompt
from tallystick.scoring.scorer import find_list

_SAMPLING = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1}


class SglangScorer:
    """See the module's docstring."""

    def __init__(self, api: EngineApi, model: str) -> None:
        self._api, self._model = api, model

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Scorer."""
        prompt = await read_prompt(self._api, self._model, request.prompt)
        tokens = await read_completion(self._api, self._model, request.completion)
        text = (*prompt, *tokens)[: len(prompt) + request.positions[-1] + 1]
        document = await self._generate(text, len(prompt) + request.positions[0], request.top)
        rows = []
        for position in request.positions:
            at = len(prompt) + position
            token = tokens[position] if position < len(tokens) else None
            known = _read_row(document, text, at)
            rows.append(ScoreRow.of(position, token, known, request.top) if known else None)
        return ScoreResponse(request.model, len(prompt), tokens, tuple(rows))

    async def _generate(self, text: tuple[int, ...], start: int, top: int) -> dict[str, Any]:
        body = {
            "model": self._model,
            "input_ids": list(text),
            "sampling_params": _SAMPLING,
            "return_logprob": True,
            "logprob_start_len": max(start - 1, 0),  # the first row that it reports is empty
            "top_logprobs_num": top,
        }
        return await self._api.post("/generate", body)


def _read_row(document: Mapping[str, Any], text: tuple[int, ...], at: int) -> dict[int, float]:
    """The row of the token `at` in the text, or of the one after it; empty if there is none.

    The rows end with the text, wherever they begin. A row is `[log-probability, token, text]`, and one of `top` a list of these.
    """
    if at > len(text):
        return {}
    if at == len(text):
        top = find_list(document, "meta_info", "output_top_logprobs")
        return _read_entries(top[0] if top else [])
    chosen = find_list(document, "meta_info", "input_token_logprobs")
    top = find_list(document, "meta_info", "input_top_logprobs")
    back = at - len(text)
    if -back > len(chosen) or -back > len(top):
        return {}
    entry = chosen[back]
    if not isinstance(entry, list) or len(entry) < 2 or entry[1] != text[at]:
        return {}
    return _read_entries(top[back]) | _read_entries([entry])


def _read_entries(entries: object) -> dict[int, float]:
    if not isinstance(entries, list):
        return {}
    try:
        return {int(entry[1]): entry[0] for entry in entries if entry[0] is not None}
    except (IndexError, TypeError, ValueError):
        raise NoSuchRoute from None
