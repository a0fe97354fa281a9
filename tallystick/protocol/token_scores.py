"""A scoring job: an engine reads a prompt with a given answer, and reports how probable the answer's tokens are. Pure.

The request names the prompt as the audited request had it, the answer, and the positions of interest, never anybody else's
numbers. The answer holds one row a position. It is an ordinary job on the route SCORES, sealed and with a receipt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.token_evidence import MAX_TOKEN_ID

MAX_POSITIONS: Final = 256
"""Positions of one request."""
MAX_TOP: Final = 20
"""Most probable tokens of a position: as many as engines report (`max_logprobs` of vLLM)."""
MAX_TOKENS: Final = 1 << 17
"""Tokens of an answer that is scored, and of a prompt that is given as tokens."""
MAX_TEXT: Final = 4 * MAX_TOKENS
"""Characters of an answer that is given as text."""
LEAST_LOGPROB: Final = -10_000.0
"""Nats. Engines write an impossible token as this, or as minus infinity."""
PROMPT_MEMBERS: Final = (
    *("messages", "prompt", "tools", "functions", "tool_choice", "parallel_tool_calls", "response_format"),
    *("chat_template", "chat_template_kwargs", "documents", "reasoning_effort", "reasoning", "add_generation_prompt"),
)
"""Members of a chat or a completion that decide which tokens the model reads."""
_ROUNDING = 1e-3
_MOST_MASS = 1.02
"""The most that the probabilities of a row add up to, with what rounding adds."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What to score. `prompt`: the PROMPT_MEMBERS of the audited request. `completion`: its answer, as tokens if they are known.

    `positions`: of the answer, ascending, from 0 on. The position after its last token is its end, where the row tells how
    probable other continuations were. `top`: tokens a row, at least. Raises BadMessage.
    """

    model: str
    prompt: Mapping[str, Any]
    completion: tuple[int, ...] | str = field(repr=False)
    positions: tuple[int, ...]
    top: int = MAX_TOP

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not 0 < len(self.model) <= 256:
            raise BadMessage("model: expected the name of a model, 1 to 256 characters")
        if unknown := sorted(self.prompt.keys() - set(PROMPT_MEMBERS)):
            raise BadMessage(f"score request: {unknown[0]}: unknown member")
        if ("messages" in self.prompt) == ("prompt" in self.prompt):
            raise BadMessage("score request: expected either messages or prompt")
        if "prompt" in self.prompt and not isinstance(self.prompt["prompt"], str):
            _read_tokens(self.prompt["prompt"], "prompt")
        if not self.completion:
            raise BadMessage("completion: expected at least one token")
        read_count(self.top, "top", 1, MAX_TOP)
        ordered = all(earlier < later for earlier, later in zip(self.positions, self.positions[1:], strict=False))
        if not self.positions or len(self.positions) > MAX_POSITIONS or not ordered or self.positions[0] < 0:
            raise BadMessage(f"positions: expected 1 to {MAX_POSITIONS} positions, ascending, from 0 on")
        if self.positions[-1] > (longest := self.longest):
            raise BadMessage(f"positions: expected positions of the completion, up to its end at {longest}")

    @property
    def longest(self) -> int:
        """The most tokens that the completion can have: a token has at least one byte."""
        return len(self.completion.encode(errors="replace")) if isinstance(self.completion, str) else len(self.completion)

    @classmethod
    def of(
        cls, request: Mapping[str, Any], completion: Sequence[int] | str, positions: Sequence[int], top: int = MAX_TOP
    ) -> ScoreRequest:
        """Scores the answer to a chat or a completion request. Raises BadMessage."""
        prompt = {name: request[name] for name in PROMPT_MEMBERS if request.get(name) is not None}
        answer = completion if isinstance(completion, str) else tuple(completion)
        return cls(request.get("model") or "", prompt, answer, tuple(positions), top)

    @classmethod
    def from_json(cls, raw: object) -> ScoreRequest:
        """Reads the wire form. Raises BadMessage, whose text quotes nothing of the prompt."""
        if not isinstance(raw, Mapping):
            raise BadMessage("score request: expected a JSON object")
        known = ("model", "completion", "positions", "top", *PROMPT_MEMBERS)
        if raw.keys() - set(known):
            raise BadMessage(f"score request: unknown member; known members: {', '.join(known)}")
        positions = [
            read_count(position, "positions", 0, MAX_TOKENS)
            for position in read_items(raw.get("positions"), "positions", MAX_POSITIONS)
        ]
        completion = raw.get("completion")
        if isinstance(completion, str):
            read_text(completion, "completion", MAX_TEXT)
        else:
            completion = _read_tokens(completion, "completion")
        prompt = {name: raw[name] for name in PROMPT_MEMBERS if raw.get(name) is not None}
        return cls(raw.get("model") or "", prompt, completion, tuple(positions), raw.get("top", MAX_TOP))

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        completion = self.completion if isinstance(self.completion, str) else list(self.completion)
        return {
            "model": self.model,
            **self.prompt,
            "completion": completion,
            "positions": list(self.positions),
            "top": self.top,
        }


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One position. `token`: of the answer; None at its end. `logprob`: of that token, in nats; None if the engine did not say.

    `top`: the most probable tokens, best first. All logarithms are of the model's own probabilities at temperature 1, before
    truncation. Raises BadMessage for numbers that are no such probabilities.
    """

    position: int
    token: int | None
    logprob: float | None
    top: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        numbers = [value for _, value in self.top] + ([] if self.logprob is None else [self.logprob])
        if not all(LEAST_LOGPROB <= value <= 0 for value in numbers):
            raise BadMessage(f"rows: expected log-probabilities from {LEAST_LOGPROB} to 0")
        if len(self.top) > MAX_TOP + 1 or len({token for token, _ in self.top}) < len(self.top):
            raise BadMessage(f"rows: expected at most {MAX_TOP + 1} tokens a row, each once")
        if not all(0 <= token <= MAX_TOKEN_ID for token in (self.position, self.token or 0, *(token for token, _ in self.top))):
            raise BadMessage(f"rows: expected positions and tokens from 0 to {MAX_TOKEN_ID}")
        if any(earlier < later for (_, earlier), (_, later) in zip(self.top, self.top[1:], strict=False)):
            raise BadMessage("rows: expected the most probable tokens first")
        if math.fsum(math.exp(value) for _, value in self.top) > _MOST_MASS:
            raise BadMessage("rows: expected probabilities that add up to at most 1")

    @classmethod
    def of(cls, position: int, token: int | None, logprobs: Mapping[int, float], top: int) -> ScoreRow:
        """Of what an engine reports: logarithms by token. Raises BadMessage."""
        known = {other: bounded_logprob(value) for other, value in logprobs.items()}
        ordered = sorted(known.items(), key=lambda entry: (-entry[1], entry[0]))
        return cls(position, token, known.get(token) if token is not None else None, tuple(ordered[:top]))

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        top = [[token, round(value, 5)] for token, value in self.top]
        logprob = None if self.logprob is None else round(self.logprob, 5)
        return {"position": self.position, "token": self.token, "logprob": logprob, "top": top}


@dataclass(frozen=True, slots=True)
class ScoreResponse:
    """The scores: one row for each position of the request, or None where the engine could not tell.

    `tokens`: the answer, as the model reads it. `prompt_tokens`: tokens of the prompt alone.
    `end_logprob`: the logarithm of the probability that the answer ends where it does, in nats; None if the engine does not say
    which tokens end a turn, or if the end was not among the positions.
    """

    model: str
    prompt_tokens: int
    tokens: tuple[int, ...] = field(repr=False)
    rows: tuple[ScoreRow | None, ...]
    end_logprob: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The wire form. Its usage counts all tokens that were read as input."""
        tokens_read = self.prompt_tokens + len(self.tokens)
        return {
            "object": "score",
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "tokens": list(self.tokens),
            "rows": [None if row is None else row.to_json() for row in self.rows],
            "end_logprob": None if self.end_logprob is None else round(self.end_logprob, 5),
            "usage": {"prompt_tokens": tokens_read, "completion_tokens": 0, "total_tokens": tokens_read},
        }

    @classmethod
    def from_json(cls, raw: object, request: ScoreRequest) -> ScoreResponse:
        """Reads the answer to `request`. Raises BadMessage if it answers another request, or if its numbers are impossible."""
        if not isinstance(raw, Mapping) or raw.get("object") != "score":
            raise BadMessage("score response: expected a JSON object with object 'score'")
        tokens = _read_tokens(raw.get("tokens"), "tokens")
        if tokens != request.completion and not isinstance(request.completion, str):
            raise BadMessage("tokens: expected those of the request")
        if len(tokens) > request.longest:
            raise BadMessage(f"tokens: expected at most {request.longest}, got {len(tokens)}")
        raw_rows = read_items(raw.get("rows"), "rows", MAX_POSITIONS)
        if len(raw_rows) != len(request.positions):
            raise BadMessage(f"rows: expected {len(request.positions)}, one for each position, got {len(raw_rows)}")
        rows = []
        for position, row in zip(request.positions, raw_rows, strict=True):
            expected = tokens[position] if position < len(tokens) else None
            rows.append(None if row is None or position > len(tokens) else _read_row(row, position, expected))
        prompt_tokens = read_count(raw.get("prompt_tokens"), "prompt_tokens", 0, (1 << 31) - 1)
        end = raw.get("end_logprob")
        end_logprob = None if end is None else _number(end, "end_logprob")
        if end_logprob is not None and not LEAST_LOGPROB <= end_logprob <= 0:
            raise BadMessage(f"end_logprob: expected a number from {LEAST_LOGPROB} to 0")
        return cls(read_text(raw.get("model"), "model"), prompt_tokens, tokens, tuple(rows), end_logprob)


def bounded_logprob(value: float) -> float:
    """A log-probability of an engine, at least LEAST_LOGPROB and at most 0. Raises BadMessage if it is no such number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value <= _ROUNDING:
        raise BadMessage(f"log-probability: expected a number of at most 0, got {value!r:.40}")
    return max(min(float(value), 0.0), LEAST_LOGPROB)


def _read_row(raw: object, position: int, token: int | None) -> ScoreRow:
    if not isinstance(raw, Mapping):
        raise BadMessage("rows: expected objects")
    if raw.get("position") != position or raw.get("token") != token:
        raise BadMessage(f"rows: expected a row of position {position} and its token")
    top = []
    for entry in read_items(raw.get("top"), "rows.top", MAX_TOP + 1):
        other, value = read_items(entry, "rows.top", 2) if isinstance(entry, list) and len(entry) == 2 else (None, None)
        top.append((read_count(other, "rows.top", 0, MAX_TOKEN_ID), _number(value, "rows.top")))
    logprob = raw.get("logprob")
    return ScoreRow(position, token, None if logprob is None else _number(logprob, "rows.logprob"), tuple(top))


def _number(value: object, member: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise BadMessage(f"{member}: expected a number")
    return float(value)


def _read_tokens(raw: object, member: str) -> tuple[int, ...]:
    return tuple(read_count(token, member, 0, MAX_TOKEN_ID) for token in read_items(raw, member, MAX_TOKENS))
