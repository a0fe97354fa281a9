"""The models that an engine lists in its answer to GET /v1/models. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from tallystick.protocol.sse import MalformedAnswer


@dataclass(frozen=True, slots=True)
class UpstreamModel:
    """A model as its engine names it, with the context length and the owner if the engine tells them."""

    name: str
    context_tokens: int | None = None
    owner: str = ""


def read_models(body: bytes) -> tuple[UpstreamModel, ...]:
    """The models in an answer to GET /v1/models; entries without a name are left out. Raises MalformedAnswer."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise MalformedAnswer("expected JSON") from None
    entries = document.get("data") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise MalformedAnswer("data: expected a list of models")
    return tuple(
        UpstreamModel(entry["id"], _read_context(entry), str(entry.get("owned_by") or ""))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"]
    )


def _read_context(entry: dict[str, Any]) -> int | None:
    """The context length in tokens, under the names that vLLM, SGLang, llama.cpp and hosted APIs use."""
    meta = entry.get("meta")
    for value in (entry.get("max_model_len"), entry.get("context_length"), meta.get("n_ctx") if isinstance(meta, dict) else None):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
