"""A toy language model: it has real probabilities, which depend on its seed and its context, and takes microseconds."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse, ScoreRow

VOCABULARY = 48


@dataclass(frozen=True)
class ToyModel:
    """Models of one seed are one model; `noise` moves the logits a little, as a coarser quantization does."""

    seed: int = 1
    noise: float = 0.0

    def logprobs(self, prompt: str, tokens: Sequence[int]) -> dict[int, float]:
        """Natural logarithms of the next token's probabilities."""
        context = f"{self.seed} {prompt} {list(tokens[-3:])}".encode()
        draws = random.Random(hashlib.sha256(context).digest())
        logits = [draws.gauss(0, 3) for _ in range(VOCABULARY)]
        if self.noise:
            other = random.Random(hashlib.sha256(b"noise" + context).digest())
            logits = [logit + other.gauss(0, self.noise) for logit in logits]
        total = math.log(math.fsum(map(math.exp, logits)))
        return {token: logit - total for token, logit in enumerate(logits)}

    def answer(self, prompt: str, length: int, temperature: float, draw: random.Random) -> tuple[int, ...]:
        """Draws an answer."""
        tokens: list[int] = []
        for _ in range(length):
            scores = self.logprobs(prompt, tokens)
            if temperature == 0:
                tokens.append(max(scores, key=lambda token: scores[token]))
            else:
                weights = [math.exp(value / temperature) for value in scores.values()]
                tokens.append(draw.choices(list(scores), weights)[0])
        return tuple(tokens)

    def rows(self, prompt: str, tokens: Sequence[int]) -> tuple[EvidenceRow, ...]:
        """The evidence of an answer, as an engine reports it."""
        return tuple(
            EvidenceRow.of(token, self.logprobs(prompt, tokens[:position]).items()) for position, token in enumerate(tokens)
        )

    def score(self, request: ScoreRequest) -> ScoreResponse:
        """The scores of an answer, as an honest referee sends them."""
        prompt, tokens = prompt_text(request), completion_tokens(request)
        rows: list[ScoreRow | None] = []
        for position in request.positions:
            if position > len(tokens):
                rows.append(None)
                continue
            token = tokens[position] if position < len(tokens) else None
            rows.append(ScoreRow.of(position, token, self.logprobs(prompt, tokens[:position]), request.top))
        return ScoreResponse(request.model, len(prompt.split()), tokens, tuple(rows))


def prompt_text(request: ScoreRequest) -> str:
    """The prompt as the toy model reads it."""
    return repr(sorted(request.prompt.items()))


def completion_tokens(request: ScoreRequest) -> tuple[int, ...]:
    """The answer's tokens; a text is their numbers, and each other word is the last token."""
    completion = request.completion
    if isinstance(completion, str):
        return tuple(int(word) if word.isdecimal() else VOCABULARY - 1 for word in completion.split())
    return completion
