"""The models that an engine lists in its answer to GET /v1/models. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from tallystick.protocol.sse import MalformedAnswer

_CONTEXTS = ("max_model_len", "context_length", "context_window", "max_context_length", "context_size", "n_ctx")
"""vLLM and SGLang; Together, Fireworks, OpenRouter and DeepInfra; Groq; Mistral; Novita; llama.cpp."""


@dataclass(frozen=True, slots=True)
class UpstreamModel:
    """A model as its engine names it, with the context length and the owner if the engine tells them."""

    name: str
    context_tokens: int | None = None
    owner: str = ""


def read_models(body: bytes) -> tuple[UpstreamModel, ...]:
    """The models in an answer to GET /v1/models; entries without a name are left out.

    The list may be bare, or null. Raises MalformedAnswer.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise MalformedAnswer("expected JSON") from None
    entries = document
    if isinstance(document, dict):
        if not document.keys() & {"data", "models"}:
            raise MalformedAnswer("data: expected a list of models")
        entries = document.get("data") or document.get("models") or []
    if not isinstance(entries, list):
        raise MalformedAnswer("data: expected a list of models")
    models = (_read_model(entry) for entry in entries)
    return tuple(model for model in models if model is not None)


def _read_model(entry: object) -> UpstreamModel | None:
    """One entry of a list: an object with an `id` or, at some engines, a `name`; or the name alone."""
    if isinstance(entry, str):
        return UpstreamModel(entry) if entry else None
    if not isinstance(entry, dict):
        return None
    name = next((entry[key] for key in ("id", "name", "model") if isinstance(entry.get(key), str) and entry[key]), None)
    return None if name is None else UpstreamModel(name, _read_context(entry), str(entry.get("owned_by") or ""))


def _read_context(entry: dict[str, Any]) -> int | None:
    """The context length in tokens, under the names that vLLM, SGLang, llama.cpp and hosted APIs use."""
    inner = [entry.get(name) for name in ("meta", "metadata", "top_provider")]
    for value in [holder[name] for holder in (entry, *inner) if isinstance(holder, dict) for name in _CONTEXTS if name in holder]:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
