"""The OpenAI routes that are traded, and how an ask declares those that not every engine has. Pure.

Chat, completions and embeddings are what a model name stands for. Any other route (images, audio, rerank, responses, …) is sold
by the asks that list it among their features by its path, for example "/v1/rerank".
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from tallystick.protocol.errors import Code, Refusal

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
RESPONSES: Final = "/v1/responses"
ALWAYS: Final = (CHAT, COMPLETIONS, EMBEDDINGS)
JSON: Final = "application/json"
FORM: Final = "multipart/form-data"
_PATH = re.compile(r"/v1(/[a-z0-9][a-z0-9_.-]{0,63}){1,6}")


def check_route(path: str) -> str:
    """The path, if it can be a route at all. Raises Refusal (unknown_route)."""
    if not _PATH.fullmatch(path):
        raise Refusal(Code.UNKNOWN_ROUTE, f"{path[:100]!r}: routes are paths such as {CHAT} or /v1/rerank")
    return path


def declared(features: Collection[str]) -> tuple[str, ...]:
    """The routes among an ask's features."""
    return tuple(feature for feature in features if _PATH.fullmatch(feature))


def serves(features: Collection[str], path: str) -> bool:
    """Whether an ask with these features sells this route."""
    return path in ALWAYS or (path in features and _PATH.fullmatch(path) is not None)


def media_type(content_type: str) -> str:
    """A content type without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()
