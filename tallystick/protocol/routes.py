"""The OpenAI routes that asks sell. Pure.

Each ask sells chat, completions and embeddings, except for those whose absence it declares, for example "-/v1/embeddings". Any
other route (images, audio, rerank, responses, …) is sold only by asks that list its path among their features.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.features import denied

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
SCORES: Final = "/v1/token_scores"
"""Scores the tokens of a given answer (`token_scores`). Engines have no such route; vLLM's /v1/score compares texts."""
MODELS: Final = "/v1/models"
"""The route that lists models. It is not for sale."""
EVIDENCE_ROUTE: Final = "/v1/evidence"
"""The node's own route, free of charge, for rows of evidence (token_evidence.py) that did not come with their answer.

The request is {"model", "job": hex}, the answer the packed rows.
"""
ALWAYS: Final = (CHAT, COMPLETIONS, EMBEDDINGS)
JSON: Final = "application/json"
FORM: Final = "multipart/form-data"
_PATH = re.compile(r"/v1(/[a-z0-9][a-z0-9_.-]{0,63}){1,6}")


def check_route(path: str) -> str:
    """Returns the path if it has the form of a route. Raises Refusal (unknown_route)."""
    if not _PATH.fullmatch(path):
        raise Refusal(Code.UNKNOWN_ROUTE, f"route: expected a path such as {CHAT} or /v1/rerank, got {path[:100]!r}")
    return path


def sold_routes(features: Collection[str]) -> tuple[str, ...]:
    """The routes that an ask with these features sells."""
    listed = (feature for feature in features if _PATH.fullmatch(feature))
    return tuple(dict.fromkeys((*(path for path in ALWAYS if serves(features, path)), *listed)))


def serves(features: Collection[str], path: str) -> bool:
    """Whether an ask with these features sells this route."""
    if path in ALWAYS:
        return not denied(features, (path,))
    return path in features and _PATH.fullmatch(path) is not None


def media_type(content_type: str) -> str:
    """A content type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()
