"""How long each phase of a job may take."""

from __future__ import annotations

from dataclasses import dataclass

SHORT_PROMPT_BYTES = 16 << 10
"""Bytes of a request that an engine reads within the time for its first token."""
PROMPT_BYTES_PER_SECOND = 256
"""Further bytes of a request that the slowest engine reads a second: some 64 tokens."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that each phase of a job may take.

    `queue`: until a slot is free; `first_token`: until the first output of a stream, or its next sign of life
    (`first_token_for`; a response in one piece has `total`);
    `between_tokens`: from one output to the next; `total`: the whole job without waits for the reader; `reader`: all waits for
    the reader together; `first_credit`: until the coordinator confirms that it has output.
    """

    queue: float = 10.0
    first_token: float = 60.0
    between_tokens: float = 30.0
    total: float = 900.0
    reader: float = 900.0
    first_credit: float = 15.0

    def first_token_for(self, body_bytes: int) -> float:
        """Seconds until the first output of a stream whose request has `body_bytes`: a long prompt takes longer to read."""
        return self.first_token + max(0, body_bytes - SHORT_PROMPT_BYTES) / PROMPT_BYTES_PER_SECOND
