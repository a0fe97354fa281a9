"""What a scoring adapter does, and the reading of engines' answers that all of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count
from tallystick.protocol.token_evidence import MAX_TOKEN_ID
from tallystick.protocol.token_scores import MAX_TOKENS, ScoreRequest, ScoreResponse
from tallystick.scoring.engine_api import NoSuchRoute


class Scorer(Protocol):
    """An engine that can score."""

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Scores an answer. A row that the engine cannot tell is None.

        Raises BadMessage if the engine refuses the request, Unavailable if it is busy or broken, and NoSuchRoute if it turns out
        to be an engine of another kind.
        """
        ...


def read_tokens(document: Mapping[str, Any], member: str = "tokens") -> tuple[int, ...]:
    """The tokens in an engine's answer. Raises NoSuchRoute."""
    tokens = document.get(member)
    if not isinstance(tokens, list) or len(tokens) > MAX_TOKENS:
        raise NoSuchRoute
    try:
        return tuple(read_count(token, member, 0, MAX_TOKEN_ID) for token in tokens)
    except BadMessage:
        raise NoSuchRoute from None


def find_list(document: Mapping[str, Any], *path: str | int) -> list[Any]:
    """The list at a path of members and indices. Raises NoSuchRoute if there is none."""
    value: Any = document
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            raise NoSuchRoute from None
    if not isinstance(value, list):
        raise NoSuchRoute
    return value
