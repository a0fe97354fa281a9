"""Hosted APIs as their documentation describes them: base URL, key, list of models, and the events of a streamed chat.

Each speaks its documented format on a port of this machine, and refuses what the real one refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "the-key"
OPENAI_USAGE = {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16}


@dataclass(frozen=True)
class HostedApi:
    """One API. `base`: the path and query of its documented base URL; `models`: its documented list of models, None without one.

    `refuses`: members of a chat that it refuses; `before`: bytes that come before the first event; `ends`: the events after the
    text, which report the usage `counted` (input, cached, output); `has_done`: whether its streams end with [DONE].
    """

    base: str
    model: str
    models: Any
    context: int | None = None
    header: str = "authorization"
    refuses: frozenset[str] = frozenset()
    before: bytes = b""
    ends: tuple[dict[str, Any], ...] = ({"choices": [], "usage": OPENAI_USAGE},)
    usage: dict[str, Any] = field(default_factory=lambda: dict(OPENAI_USAGE))
    counted: tuple[int, int, int] = (12, 0, 4)
    has_done: bool = True

    def app(self, key: str = KEY) -> Starlette:
        """The API as a server; everything beside its documented routes is 404."""
        path, _, query = self.base.partition("?")
        path = path.rstrip("/")

        def refusal(request: Request) -> Response | None:
            wanted = f"Bearer {key}" if self.header == "authorization" else key
            if request.headers.get(self.header) != wanted:
                return JSONResponse({"error": {"message": "no valid key", "code": 401}}, 401)
            return JSONResponse({"error": {"message": "no such version"}}, 404) if request.url.query != query else None

        async def models(request: Request) -> Response:
            return refusal(request) or JSONResponse(self.models)

        async def chat(request: Request) -> Response:
            asked = await request.json()
            if refused := refusal(request):
                return refused
            if asked.get("model") != self.model:
                return JSONResponse({"error": {"message": "no such model"}}, 400)
            if bad := sorted(self.refuses & asked.keys()):
                error = {"type": "extra_forbidden", "loc": ["body", bad[0]], "msg": "Extra inputs are not permitted"}
                return JSONResponse({"object": "error", "message": {"detail": [error]}, "type": "invalid_request_error"}, 422)
            if asked.get("stream"):
                return StreamingResponse(iter([self.stream()]), media_type="text/event-stream")
            message = {"role": "assistant", "content": "Hello there."}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse({"object": "chat.completion", "choices": [choice], "usage": self.usage})

        routes = [Route(f"{path}/chat/completions", chat, methods=["POST"])]
        routes += [Route(f"{path}/models", models)] if self.models is not None else []
        return Starlette(routes=routes)

    def stream(self) -> bytes:
        """A streamed chat."""
        delta = {"index": 0, "delta": {"role": "assistant", "content": "Hello there."}, "finish_reason": None}
        stop = {"index": 0, "delta": {}, "finish_reason": "stop"}
        last = [{"choices": [stop]}] if not any(end.get("choices") for end in self.ends) else []
        events = [{"object": "chat.completion.chunk", "choices": [delta]}, *last, *self.ends]
        return self.before + b"".join(b"data: " + orjson.dumps(e) + b"\n\n" for e in events) + b"data: [DONE]\n\n" * self.has_done


def _stop(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", **members}]}


def _listed(name: str, **members: Any) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 1, **members}]}


FILTERED = b'data: {"choices":[],"created":0,"id":"","model":"","object":"","prompt_filter_results":[{"prompt_index":0}]}\n\n'
"""Azure's first event."""
LLAMA = "meta-llama/Llama-3.3-70B-Instruct"
HOSTED = {
    "OpenAI": HostedApi("/v1", "gpt-5-mini", _listed("gpt-5-mini", owned_by="openai"), refuses=frozenset({"max_tokens"})),
    "Azure OpenAI, v1": HostedApi(
        "/openai/v1/", "my-deployment", _listed("my-deployment", capabilities={"chat_completion": True}), header="api-key",
        before=FILTERED,
    ),
    "Azure OpenAI, deployments": HostedApi(
        "/openai/deployments/my-deployment?api-version=2024-10-21", "my-deployment", None, header="api-key",
        before=FILTERED,
    ),
    "Vertex AI": HostedApi(
        "/v1/projects/p/locations/us-central1/endpoints/openapi", "google/gemini-2.5-flash", None,
        ends=(_stop() | {"usage": {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 76}},),
        usage={"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 76}, counted=(12, 0, 64),
    ),
    "Gemini API": HostedApi(
        "/v1beta/openai/", "models/gemini-2.5-flash", _listed("models/gemini-2.5-flash", owned_by="google"),
        ends=(_stop() | {"usage": {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 76}},),
        usage={"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 76}, counted=(12, 0, 64),
    ),
    "OpenRouter": HostedApi(
        "/api/v1", "meta-llama/llama-3.3-70b-instruct",
        {"data": [{"id": "meta-llama/llama-3.3-70b-instruct", "name": "Llama", "context_length": 131_072,
                   "top_provider": {"context_length": 65_536, "max_completion_tokens": None}}]},
        context=131_072, before=b": OPENROUTER PROCESSING\n\n" * 3,
    ),
    "DeepInfra": HostedApi(
        "/v1/openai", LLAMA, _listed(LLAMA, metadata={"context_length": 131_072, "max_tokens": 131_072}), context=131_072,
        ends=({"choices": [], "usage": OPENAI_USAGE | {"estimated_cost": 2.1e-05}},),
    ),
    "Together": HostedApi(
        "/v1", LLAMA, [{"id": LLAMA, "object": "model", "type": "chat", "context_length": 131_072}], context=131_072,
        ends=(_stop() | {"usage": OPENAI_USAGE},),
    ),
    "Fireworks": HostedApi(
        "/inference/v1", "accounts/fireworks/models/llama-v3p3-70b-instruct",
        _listed("accounts/fireworks/models/llama-v3p3-70b-instruct", context_length=131_072, supports_chat=True), context=131_072,
        ends=({"choices": [], "usage": OPENAI_USAGE | {"prompt_tokens_details": {"cached_tokens": 8}}},), counted=(12, 8, 4),
        usage=OPENAI_USAGE | {"prompt_tokens_details": {"cached_tokens": 8}},
    ),
    "Groq": HostedApi(
        "/openai/v1", "llama-3.3-70b-versatile", _listed("llama-3.3-70b-versatile", active=True, context_window=131_072),
        context=131_072, ends=(_stop() | {"x_groq": {"id": "req", "usage": OPENAI_USAGE | {"queue_time": 0.01}}},),
    ),
    "DeepSeek": HostedApi(
        "", "deepseek-chat", _listed("deepseek-chat", owned_by="deepseek"), before=b": keep-alive\n\n",
        ends=({"choices": [], "usage": OPENAI_USAGE | {"prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 4}},),
        usage=OPENAI_USAGE | {"prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 4}, counted=(12, 8, 4),
    ),
    "Mistral": HostedApi(
        "/v1", "mistral-large-latest", _listed("mistral-large-latest", max_context_length=131_072, type="base"), context=131_072,
        refuses=frozenset({"stream_options", "max_completion_tokens"}), ends=(_stop() | {"usage": OPENAI_USAGE},),
    ),
    "Z.ai": HostedApi("/api/paas/v4", "glm-4.6", None, ends=(_stop() | {"usage": OPENAI_USAGE},)),
    "Volcengine Ark": HostedApi("/api/v3", "ep-20250101000000-abcde", None),
    "Moonshot": HostedApi(
        "/v1", "kimi-k2", _listed("kimi-k2", owned_by="moonshot", context_length=262_144), context=262_144,
        ends=(_stop(usage=OPENAI_USAGE | {"cached_tokens": 8}),), usage=OPENAI_USAGE | {"cached_tokens": 8}, counted=(12, 8, 4),
    ),
    "xAI": HostedApi(
        "/v1", "grok-4", _listed("grok-4", owned_by="xai"),
        ends=({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 76,
                                        "completion_tokens_details": {"reasoning_tokens": 60}}},),
        usage={"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 76,
               "completion_tokens_details": {"reasoning_tokens": 60}}, counted=(12, 0, 64),
    ),
    "Perplexity": HostedApi("", "sonar", None, ends=(_stop() | {"usage": OPENAI_USAGE},), has_done=False),
    "GitHub Models": HostedApi("/inference", "openai/gpt-4.1", None),
    "Databricks": HostedApi("/serving-endpoints", "databricks-llama", None),
    "Alibaba Model Studio": HostedApi("/compatible-mode/v1", "qwen-plus", _listed("qwen-plus")),
    "Hugging Face": HostedApi("/v1", LLAMA, _listed(LLAMA, providers=[{"provider": "x", "context_length": 131_072}])),
    "Novita": HostedApi("/v3/openai", LLAMA, _listed(LLAMA, context_size=131_072), context=131_072),
    "Cloudflare Workers AI": HostedApi("/client/v4/accounts/a/ai/v1", "@cf/meta/llama-3.1-8b-instruct", None),
    "Amazon Bedrock": HostedApi("/openai/v1", "openai.gpt-oss-20b-1:0", _listed("openai.gpt-oss-20b-1:0")),
}  # fmt: skip
