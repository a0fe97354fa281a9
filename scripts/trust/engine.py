"""A served engine, as measurements of audits use it: it chats with log-probabilities, and scores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from tallystick.protocol.routes import CHAT
from tallystick.protocol.token_scores import MAX_TOP, ScoreRequest, ScoreResponse
from tallystick.scoring.engine_api import EngineApi
from tallystick.scoring.llama_cpp import LlamaCppScorer

Document = dict[str, Any]


class ServedEngine:
    """See the module's docstring."""

    def __init__(self, api: EngineApi, model: str) -> None:
        self._api, self._model = api, model
        self._scorer = LlamaCppScorer(api, model)

    @classmethod
    @asynccontextmanager
    async def at(cls, url: str, model: str) -> AsyncIterator[ServedEngine]:
        """The engine at a base URL."""
        async with EngineApi.open(url) as api:
            yield cls(api, model)

    async def chat(self, body: Mapping[str, Any]) -> Document:
        """Answers a chat, whatever it asks for, with five log-probabilities a token."""
        wanted = {"model": self._model, "stream": False, "logprobs": True, "top_logprobs": 5}
        return await self._api.post(CHAT, {**body, **wanted})

    async def score(
        self, body: Mapping[str, Any], tokens: Sequence[int], positions: Sequence[int], top: int = MAX_TOP
    ) -> ScoreResponse:
        """Scores an answer to a chat."""
        return await self._scorer.score(ScoreRequest.of({**body, "model": self._model}, tokens, positions, top))


def logprob_entries(response: ScoreResponse, texts: Sequence[str]) -> list[Document]:
    """The scores of all tokens of an answer as `logprobs.content` of a chat. A token that its row lacks gets the row's lowest."""
    entries = []
    for row, token, text in zip(response.rows, response.tokens, texts, strict=True):
        top = [{"id": other, "token": str(other), "bytes": [], "logprob": value} for other, value in (row.top if row else ())]
        lowest = top[-1]["logprob"] if top else 0.0
        logprob = lowest if row is None or row.logprob is None else row.logprob
        entries.append({"id": token, "token": text, "bytes": list(text.encode()), "logprob": logprob, "top_logprobs": top})
    return entries
