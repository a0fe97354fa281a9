"""What engines say of themselves: the endpoints that tell them apart, and what else can be read there. Pure.

Each entry follows the engine's own documentation or source; tests/node/engines/test_discover.py holds what each was seen to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from node.domain.upstream_models import UpstreamModel
from node.ports import EngineLoad
from tallystick.protocol.messages import UNKNOWN, Spec

Documents = Mapping[str, dict[str, Any]]
"""What an engine answered, by path; an empty object where it did not."""


class EngineKind(str, Enum):
    """What an engine is."""

    OLLAMA = "ollama"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"
    LM_STUDIO = "lm-studio"
    TGI = "tgi"
    TENSORRT_LLM = "tensorrt-llm"
    TRITON = "triton"
    NIM = "nim"
    LITELLM = "litellm"
    LOCALAI = "localai"
    WEBUI = "text-generation-webui"
    BENTOML = "bentoml"
    RAY_SERVE = "ray-serve"
    DEMO = "tally-demo"
    OTHER = "openai-compatible"


DEFAULT_URLS = tuple(f"http://127.0.0.1:{port}" for port in (11434, 8000, 30000, 8080, 1234, 3000, 4000, 5000, 9000))
"""Where they listen unless told otherwise: Ollama; vLLM, TensorRT-LLM, NIM, Ray Serve; SGLang; llama.cpp, LocalAI, TGI;
LM Studio; BentoML; LiteLLM; text-generation-webui; Triton's OpenAI frontend.
"""

KIND_BY_OWNER = {
    "vllm": EngineKind.VLLM,
    "sglang": EngineKind.SGLANG,
    "llamacpp": EngineKind.LLAMA_CPP,
    "tensorrt_llm": EngineKind.TENSORRT_LLM,
    "triton inference server": EngineKind.TRITON,
    "tally-demo": EngineKind.DEMO,
}
"""What engines write into `owned_by`, in lower case."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """An endpoint that only one kind of engine has: its path, a member of what it answers, and where that has the version."""

    kind: EngineKind
    path: str
    member: str
    version: str = ""


PROXY_FINGERPRINTS = (
    Fingerprint(EngineKind.NIM, "/v1/metadata", "modelInfo", "version"),
    Fingerprint(EngineKind.LITELLM, "/health/readiness", "db", "litellm_version"),
    Fingerprint(EngineKind.RAY_SERVE, "/-/routes", "/"),
    Fingerprint(EngineKind.BENTOML, "/schema.json", "routes"),
)
"""Those that stand before another engine and pass on what it says of itself; they are asked before anybody is believed."""
ENGINE_FINGERPRINTS = (
    Fingerprint(EngineKind.LM_STUDIO, "/api/v0/models", "data"),
    Fingerprint(EngineKind.LOCALAI, "/system", "backends"),
    Fingerprint(EngineKind.WEBUI, "/v1/internal/model/info", "loader"),
    Fingerprint(EngineKind.TGI, "/info", "max_total_tokens", "version"),
    Fingerprint(EngineKind.OLLAMA, "/api/version", "version", "version"),
    Fingerprint(EngineKind.LLAMA_CPP, "/props", "default_generation_settings", "build_info"),
    Fingerprint(EngineKind.SGLANG, "/get_model_info", "model_path"),
)
FINGERPRINT_PATHS = (
    *(sign.path for sign in (*PROXY_FINGERPRINTS, *ENGINE_FINGERPRINTS)),
    "/version",
    "/api/ps",
    "/get_server_info",
)


def identify(models: tuple[UpstreamModel, ...], said: Documents) -> tuple[EngineKind, str]:
    """What kind of engine it is, and its version."""
    for sign in PROXY_FINGERPRINTS:
        if sign.member in said[sign.path]:
            return sign.kind, _version(sign, said)
    kind = next((KIND_BY_OWNER[model.owner.lower()] for model in models if model.owner.lower() in KIND_BY_OWNER), None)
    for sign in ENGINE_FINGERPRINTS:
        if sign.member in said[sign.path] and kind in (None, sign.kind):
            return sign.kind, _version(sign, said)
    return kind or EngineKind.OTHER, _text(said["/version"], "version")


def _version(sign: Fingerprint, said: Documents) -> str:
    return _text(said[sign.path], sign.version) if sign.version else _text(said["/version"], "version")


@dataclass(frozen=True, slots=True)
class EngineDetails:
    """What is known of an engine beyond its kind. `slots`: requests that it runs at once; by model: context length and spec."""

    slots: int | None = None
    contexts: Mapping[str, int] = field(default_factory=dict)
    specs: Mapping[str, Spec] = field(default_factory=dict)


OLLAMA_CONTEXT = 4_096
"""What Ollama gives a model that is not loaded, whatever the model could take; a longer prompt it silently cuts."""


def read_details(kind: EngineKind, models: tuple[UpstreamModel, ...], said: Documents) -> EngineDetails:
    """Reads them from what the engine answered."""
    names = [model.name for model in models]
    if kind is EngineKind.LLAMA_CPP:
        settings = said["/props"].get("default_generation_settings")
        context = _count(settings, "n_ctx") if isinstance(settings, dict) else None
        return EngineDetails(_count(said["/props"], "total_slots"), dict.fromkeys(names, context) if context else {})
    if kind is EngineKind.TGI:
        info = said["/info"]
        spec = Spec(precision=_text(info, "model_dtype"), revision=_text(info, "model_sha"))
        context = _count(info, "max_total_tokens")
        return EngineDetails(
            _count(info, "max_concurrent_requests"), dict.fromkeys(names, context) if context else {}, dict.fromkeys(names, spec)
        )
    if kind is EngineKind.OLLAMA:
        loaded = {_text(one, "name"): _count(one, "context_length") for one in _list(said["/api/ps"], "models")}
        return EngineDetails(contexts={name: loaded.get(name) or OLLAMA_CONTEXT for name in names})
    if kind is EngineKind.LM_STUDIO:
        listed = {_text(one, "id"): one for one in _list(said["/api/v0/models"], "data")}
        known = {name: listed[name] for name in names if name in listed}
        sizes = {name: _count(one, "loaded_context_length") or _count(one, "max_context_length") for name, one in known.items()}
        return EngineDetails(
            contexts={name: size for name, size in sizes.items() if size},
            specs={name: Spec(precision=_text(one, "quantization")) for name, one in known.items()},
        )
    if kind is EngineKind.SGLANG:
        server = said["/get_server_info"]
        spec = Spec(precision=_text(server, "dtype"), kv_precision=_text(server, "kv_cache_dtype"))
        return EngineDetails(_count(server, "max_running_requests"), specs=dict.fromkeys(names, spec))
    return EngineDetails()


_WAITING = frozenset({"vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred", "tgi_queue_size"})
_KV_USED = frozenset({"vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"})


def read_load(metrics: bytes) -> EngineLoad | None:
    """An engine's queue and KV cache, out of its Prometheus metrics; None where they say nothing of a queue."""
    waiting: float | None = None
    used: list[float] = []
    try:
        for family in text_string_to_metric_families(metrics.decode(errors="replace")):
            for sample in family.samples:
                if sample.name in _WAITING:
                    waiting = (waiting or 0) + max(0.0, sample.value)
                elif sample.name in _KV_USED:
                    used.append(sample.value)
    except ValueError:  # not what it should be
        return None
    return None if waiting is None else EngineLoad(int(min(waiting, 1e9)), max(used) if used else None)


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    return value[:64] if isinstance(value, str) and value else UNKNOWN


def _count(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else None


def _list(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = document.get(name)
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
