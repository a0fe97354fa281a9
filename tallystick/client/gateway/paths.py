"""Request paths as clients form them from their base URL, turned into the gateway's routes. Pure.

Base URLs come with and without /v1, and with slashes at their end. Azure's clients put the model into the path. Sources: the API
references of OpenAI and Azure OpenAI.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from tallystick.protocol.routes import ALWAYS, MESSAGES, MODELS, RESPONSES

SOLD_FAMILIES: Final = frozenset(
    {
        "audio",
        "chat",
        "classify",
        "completions",
        "embeddings",
        "images",
        "messages",
        "models",
        "moderations",
        "pooling",
        "rerank",
        "responses",
        "score",
        "videos",
    }
)
"""First segments below /v1 of routes that the gateway or a provider may have."""
OWN_FAMILIES: Final = frozenset({"batches", "files"})
"""First segments below /v1 of routes that the gateway serves by itself, and no provider."""
ABSENT_FAMILIES: Final = frozenset(
    {
        "assistants",
        "chatkit",
        "containers",
        "conversations",
        "evals",
        "fine-tunes",
        "fine_tuning",
        "organization",
        "projects",
        "realtime",
        "skills",
        "threads",
        "uploads",
        "vector_stores",
    }
)
"""First segments below /v1 of OpenAI's routes that need a service with state, which no market of single requests has."""
_OTHER_APIS: Final = {
    "/api": "Ollama's own API",
    "/v1beta": "Gemini's own API",
    "/v1beta1": "Gemini's own API",
    "/completion": "llama.cpp's own API",
    "/generate": "an engine's own API",
}
_ROUTES: Final = (*ALWAYS, RESPONSES, MESSAGES)
_GET: Final = ("GET", "HEAD", "OPTIONS")
_POST: Final = ("OPTIONS", "POST")
_OWN_ROUTES: Final = (
    (re.compile(r"/v1/files"), ("GET", "HEAD", "OPTIONS", "POST")),
    (re.compile(r"/v1/files/[^/]+"), ("DELETE", "GET", "HEAD", "OPTIONS")),
    (re.compile(r"/v1/files/[^/]+/content"), _GET),
    (re.compile(r"/v1/batches"), ("GET", "HEAD", "OPTIONS", "POST")),
    (re.compile(r"/v1/batches/[^/]+"), _GET),
    (re.compile(r"/v1/batches/[^/]+/cancel"), _POST),
)
_AZURE = re.compile(r"(?:/v1)?/openai(/.*)?")
_DEPLOYMENT = re.compile(
    r"/deployments/(?P<model>.+?)(?P<route>/(?:chat/completions|completions|embeddings|responses|(?:images|audio|videos)/[a-z/]+))"
)


@dataclass(frozen=True, slots=True)
class Target:
    """What a request asks for: the path of a route, and the model that the path names; None if it names none."""

    path: str
    model: str | None = None


def read_target(path: str) -> Target:
    """The route that a request's decoded path stands for. Paths that stand for none are returned with single slashes."""
    path = re.sub(r"/{2,}", "/", path).rstrip("/") or "/"
    azure = _AZURE.fullmatch(path)
    if azure is None:
        return Target(_with_version(path))
    rest = azure[1] or ""
    deployment = _DEPLOYMENT.fullmatch(rest)
    if deployment is not None:
        return Target(f"/v1{deployment['route']}", deployment["model"])
    if rest == "/deployments" or rest.startswith("/deployments/"):
        return Target(MODELS + rest.removeprefix("/deployments"))
    return Target(_with_version(rest) if rest else "/v1")


def _with_version(path: str) -> str:
    return f"/v1{path}" if path.split("/")[1] in SOLD_FAMILIES | OWN_FAMILIES | ABSENT_FAMILIES else path


def allowed_methods(path: str) -> tuple[str, ...]:
    """The methods that a target's path has, for the header Allow."""
    for pattern, methods in _OWN_ROUTES:
        if pattern.fullmatch(path):
            return methods
    is_sold = path.startswith("/v1/") and path != MODELS and not path.startswith(f"{MODELS}/")
    return _POST if is_sold else _GET


def explain_unknown(method: str, path: str) -> str | None:
    """What is wrong with a request's path, for its sender; None if a provider may sell the route. `path` is a target's."""
    reason = _explain_path(path)
    if path.startswith("/v1/") and path.split("/")[2] in OWN_FAMILIES:
        known = any(pattern.fullmatch(path) for pattern, _ in _OWN_ROUTES)
        reason = f"expected {', '.join(allowed_methods(path))}, got {method}" if known else "no such route"
        if known and method in allowed_methods(path):
            reason = "this gateway keeps no files (batches_mib is 0)"
    elif reason is None and allowed_methods(path) == _POST:
        if method == "POST":
            return None
        reason = f"expected POST, got {method}"
    elif reason is None and path.startswith("/v1/"):
        reason = f"expected GET, got {method}"
    routes = ", ".join(_ROUTES)
    return (
        f"{method} {path}: {reason or 'no such route'}; this gateway has GET {MODELS} and POST {routes}, files and "
        f"batches (/v1/files, /v1/batches), and the routes that providers sell besides (features in {MODELS})"
    )


def _explain_path(path: str) -> str | None:
    if path == "/v1":
        return "this is the base URL, to which clients add a route"
    if path.startswith("/v1/v1"):
        return (
            f"expected {path.removeprefix('/v1')}, got /v1 twice; the client adds /v1 by itself, so end the base URL without it"
        )
    family = path.removeprefix("/v1/").partition("/")[0]
    if path.startswith("/v1/") and family in ABSENT_FAMILIES:
        return f"no provider sells OpenAI's /v1/{family}, which needs a service that keeps something between requests"
    for route in _ROUTES:
        rest = path.removeprefix(f"{route}/")
        if rest != path and f"/v1/{rest.removeprefix('v1/')}" in (*_ROUTES, MODELS):
            return f"the client adds a route to its base URL, which contains {route} already; end the base URL with /v1"
    for prefix, api in _OTHER_APIS.items():
        if path == prefix or path.startswith(f"{prefix}/"):
            return f"this is a route of {api}; use OpenAI's or Anthropic's"
    return None
