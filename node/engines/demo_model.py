"""The stand-in's tokens and log-probabilities, so that its answers have evidence and can be audited like those of a model.

A token is a word; its id is a hash of it, the same in every process. The last word of a message, or of a prompt, has an id of its
own there, so that a text of ids says where its answer begins. The stand-in is sure of its answer: each word of it has a
probability of nearly 1, the same in every process. So two stand-ins agree, and any other answer is found.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tallystick.protocol.token_evidence import MAX_TOKEN_ID

MAX_KNOWN_WORDS = 1 << 16
"""Words that are remembered by their ids; then all are forgotten. Whoever sends ids got them from `tokenize` just before."""
SURE, UNLIKELY, STEP = 10.5, 16.0, 0.25
"""Minus the log-probability, in nats, of the likeliest wrong token and of any that is not listed; from one to the next."""
END = 0
"""The token that ends an answer."""
_PLAIN, _MESSAGE_END, _PROMPT_END = b"word", b"last of a message", b"last of a prompt"


class DemoModel:
    """See the module's docstring. `reply` returns the words that answer a question."""

    def __init__(self, reply: Callable[[str], list[str]]) -> None:
        self._reply = reply
        self._known: dict[int, tuple[bytes, str]] = {END: (_PLAIN, "")}

    def tokenize(self, text: str, *, is_prompt: bool) -> list[int]:
        """The tokens of a text. `is_prompt`: an answer to it follows."""
        return self.tokenize_messages([text]) if is_prompt else [self._token(_PLAIN, word) for word in text.split()]

    def tokenize_messages(self, texts: Sequence[str]) -> list[int]:
        """The tokens of a chat with these messages, before its answer."""
        tokens: list[int] = []
        for number, text in enumerate(texts, 1):
            words = text.split()
            last = _PROMPT_END if number == len(texts) else _MESSAGE_END
            tokens += [self._token(_PLAIN, word) for word in words[:-1]]
            tokens += [self._token(last, word) for word in words[-1:]]
        return tokens

    def rows(self, reply: Sequence[str], top: int) -> list[dict[int, float]]:
        """Log-probabilities by token at each position of an answer, and at its end. The likeliest one comes first."""
        expected = [*(self._token(_PLAIN, word) for word in reply), END]
        return [_row(token, position, top) for position, token in enumerate(expected)]

    def score(self, tokens: Sequence[int], top: int) -> list[dict[int, float] | None]:
        """The same for a prompt with the beginning of an answer, and for the token that follows. The prompt's own rows are None.

        Each row has the token that stands there. Raises ValueError for ids that were not tokenized here, or without an end of the
        prompt.
        """
        known = [self._known.get(token) for token in tokens]
        starts = [at for at, entry in enumerate(known) if entry is not None and entry[0] == _PROMPT_END]
        if not starts:
            raise ValueError("prompt: expected ids of POST /tokenize, with the end of a prompt")
        start = starts[0] + 1
        words: list[str] = []
        for entry in reversed(known[:start]):
            if entry is None:
                raise ValueError("prompt: expected ids of POST /tokenize")
            if entry[0] == _MESSAGE_END:
                break
            words.append(entry[1])
        rows = self.rows(self._reply(" ".join(reversed(words))), top)
        scored: list[dict[int, float] | None] = [None] * start
        for position in range(len(tokens) - start + 1):
            row = rows[position] if position < len(rows) else _row(END, position, top)
            at = start + position
            scored.append(row | ({tokens[at]: -UNLIKELY} if at < len(tokens) and tokens[at] not in row else {}))
        return scored

    def text_of(self, token: int) -> str:
        """A token's text; its number if it is no known word."""
        known = self._known.get(token)
        return f"<{token}>" if known is None else known[1]

    def entry(self, row: Mapping[int, float], text: str) -> dict[str, Any]:
        """A position of `logprobs.content`, as llama.cpp has it. `text`: of the first token of the row, with its space."""
        token, logprob = next(iter(row.items()))
        best = [{"id": other, "token": self.text_of(other), "logprob": value} for other, value in row.items()]
        return {"id": token, "token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": best}

    def _token(self, kind: bytes, word: str) -> int:
        digest = hashlib.sha256(kind + b"\0" + word.encode(errors="surrogatepass")).digest()
        token = 1 + int.from_bytes(digest[:8], "big") % MAX_TOKEN_ID
        if len(self._known) >= MAX_KNOWN_WORDS:
            self._known = {END: (_PLAIN, "")}
        self._known[token] = kind, word
        return token


def _row(expected: int, position: int, top: int) -> dict[int, float]:
    """The expected token, and wrong ones that depend on it and on its position."""
    draws = hashlib.shake_256(f"{expected} {position}".encode()).digest(4 * max(top - 1, 0))
    wrong: dict[int, float] = {}
    for number in range(max(top - 1, 0)):
        token = 1 + int.from_bytes(draws[4 * number : 4 * number + 4], "big") % MAX_TOKEN_ID
        if token != expected:
            wrong[token] = -(SURE + STEP * number + draws[4 * number] / 1_024)
    return {expected: math.log1p(-math.fsum(map(math.exp, wrong.values())))} | wrong
