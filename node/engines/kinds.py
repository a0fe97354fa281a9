"""Identifies engines by the endpoints that only they have, and reads their settings and load from these. Pure.

Each entry follows the engine's documentation or source. tests/node/engines/test_discover.py holds recorded answers of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from node.domain.upstream_models import UpstreamModel
from node.ports import EngineLoad
from tallystick.protocol.features import AUDIO_INPUT, EMBEDDINGS_FEATURE, JSON_SCHEMA, TOOLS, VISION, absent
from tallystick.protocol.messages import UNKNOWN, Spec
from tallystick.protocol.precisions import gguf_precision, precision_class
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS

Documents = Mapping[str, dict[str, Any]]
"""An engine's answers by path; an empty object for a path that it did not answer."""


class EngineKind(str, Enum):
    """The kinds of engine that can be identified."""

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


QUEUEING = frozenset({EngineKind.OLLAMA, EngineKind.VLLM, EngineKind.SGLANG, EngineKind.LLAMA_CPP})
"""Kinds that let a request wait if they cannot run it at once. Sources: Ollama's FAQ (OLLAMA_MAX_QUEUE, 512), vLLM's and SGLang's
schedulers (requests waiting, in their metrics), llama.cpp's server (requests_deferred, in its metrics).
"""
QUEUE_DEPTH = 2
"""Jobs that wait in such an engine's queue, if nothing else is said: enough that a free slot is taken at once."""

DEFAULT_URLS = tuple(f"http://127.0.0.1:{port}" for port in (11434, 8000, 30000, 8080, 1234, 3000, 4000, 5000, 9000))
"""Default addresses of, in order: Ollama; vLLM, TensorRT-LLM, NIM, Ray Serve; SGLang; llama.cpp, LocalAI, TGI; LM Studio;
BentoML; LiteLLM; text-generation-webui; Triton's OpenAI frontend.
"""

KIND_BY_OWNER = {
    "vllm": EngineKind.VLLM,
    "sglang": EngineKind.SGLANG,
    "llamacpp": EngineKind.LLAMA_CPP,
    "tensorrt_llm": EngineKind.TENSORRT_LLM,
    "triton inference server": EngineKind.TRITON,
    "tally-demo": EngineKind.DEMO,
}
"""The kind of engine by the `owned_by` of its models, in lower case."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """An endpoint that only one kind of engine has: its path, a member of its answer, and the member with the version, if any."""

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
"""Proxies, which pass on the answers of the engine behind them. They are checked before anything else is believed."""
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
    *(fingerprint.path for fingerprint in (*PROXY_FINGERPRINTS, *ENGINE_FINGERPRINTS)),
    "/version",
    "/api/ps",
    "/get_server_info",
)


def identify(models: tuple[UpstreamModel, ...], answers: Documents) -> tuple[EngineKind, str]:
    """The kind of an engine, and its version. `answers` has an entry for each of FINGERPRINT_PATHS."""
    for fingerprint in PROXY_FINGERPRINTS:
        if fingerprint.member in answers[fingerprint.path]:
            return fingerprint.kind, _read_version(fingerprint, answers)
    kind = next((KIND_BY_OWNER[model.owner.lower()] for model in models if model.owner.lower() in KIND_BY_OWNER), None)
    for fingerprint in ENGINE_FINGERPRINTS:
        if fingerprint.member in answers[fingerprint.path] and kind in (None, fingerprint.kind):
            return fingerprint.kind, _read_version(fingerprint, answers)
    return kind or EngineKind.OTHER, _read_text(answers["/version"], "version")


def _read_version(fingerprint: Fingerprint, answers: Documents) -> str:
    if fingerprint.version:
        return _read_text(answers[fingerprint.path], fingerprint.version)
    return _read_text(answers["/version"], "version")


@dataclass(frozen=True, slots=True)
class EngineDetails:
    """An engine's settings. `slots`: requests that it runs at a time; `contexts` (tokens) and `specs` are by model."""

    slots: int | None = None
    contexts: Mapping[str, int] = field(default_factory=dict)
    specs: Mapping[str, Spec] = field(default_factory=dict)


_SLOT_VARIABLES = {EngineKind.OLLAMA: "OLLAMA_NUM_PARALLEL", EngineKind.LLAMA_CPP: "LLAMA_ARG_N_PARALLEL"}


def slots_in_environment(kind: EngineKind, environment: Mapping[str, str]) -> int | None:
    """The requests that an engine of this machine runs at a time, from the variable that sets it; None if that is not set here.

    Source: Ollama's FAQ, "How does Ollama handle concurrent requests?"; llama.cpp's tools/server/README.md. Ollama does not tell
    it over HTTP.
    """
    variable = _SLOT_VARIABLES.get(kind)
    value = environment.get(variable, "").strip() if variable else ""
    return int(value) if value.isascii() and value.isdigit() and 0 < int(value) < 1 << 16 else None


OLLAMA_CONTEXT = 4_096
"""Ollama's context for a model that is not loaded, whatever the model supports. It silently truncates longer prompts."""


def read_details(kind: EngineKind, models: tuple[UpstreamModel, ...], answers: Documents) -> EngineDetails:
    """Reads an engine's settings from its answers."""
    names = [model.name for model in models]
    if kind is EngineKind.LLAMA_CPP:
        settings = answers["/props"].get("default_generation_settings")
        context = _read_count(settings, "n_ctx") if isinstance(settings, dict) else None
        contexts = dict.fromkeys(names, context) if context else {}
        spec = Spec(
            precision=gguf_precision(_read_path(answers["/props"], "model_path")), features=_llama_cpp_features(answers["/props"])
        )
        return EngineDetails(_read_count(answers["/props"], "total_slots"), contexts, dict.fromkeys(names, spec))
    if kind is EngineKind.TGI:
        info = answers["/info"]
        spec = Spec(precision=precision_class(_read_text(info, "model_dtype")), revision=_read_text(info, "model_sha"))
        context = _read_count(info, "max_total_tokens")
        contexts = dict.fromkeys(names, context) if context else {}
        return EngineDetails(_read_count(info, "max_concurrent_requests"), contexts, dict.fromkeys(names, spec))
    if kind is EngineKind.OLLAMA:
        running = _read_list(answers["/api/ps"], "models")
        loaded = {_read_text(model, "name"): _read_count(model, "context_length") for model in running}
        return EngineDetails(contexts={name: loaded.get(name) or OLLAMA_CONTEXT for name in names})
    if kind is EngineKind.LM_STUDIO:
        return _read_lm_studio(names, answers)
    if kind is EngineKind.SGLANG:
        server = answers["/get_server_info"]
        quantized, stored = precision_class(_read_text(server, "quantization")), precision_class(_read_text(server, "dtype"))
        precision = stored if quantized == UNKNOWN else quantized
        spec = Spec(precision=precision, kv_precision=_read_text(server, "kv_cache_dtype"))
        return EngineDetails(_read_count(server, "max_running_requests"), specs=dict.fromkeys(names, spec))
    return EngineDetails()


def _llama_cpp_features(properties: Mapping[str, Any]) -> tuple[str, ...]:
    """The media that llama.cpp says its model understands, in `modalities` of GET /props."""
    modalities = properties.get("modalities")
    if not isinstance(modalities, dict):
        return ()
    media = ((VISION, modalities.get("vision")), (AUDIO_INPUT, modalities.get("audio")))
    return tuple(name if present else absent(name) for name, present in media if isinstance(present, bool))


def _read_lm_studio(names: list[str], answers: Documents) -> EngineDetails:
    models = {_read_text(model, "id"): model for model in _read_list(answers["/api/v0/models"], "data")}
    known = {name: models[name] for name in names if name in models}
    contexts: dict[str, int] = {}
    for name, model in known.items():
        context = _read_count(model, "loaded_context_length") or _read_count(model, "max_context_length")
        if context:
            contexts[name] = context
    specs = {
        name: Spec(precision=precision_class(_read_text(model, "quantization")), features=_lm_studio_features(model))
        for name, model in known.items()
    }
    return EngineDetails(contexts=contexts, specs=specs)


def _lm_studio_features(model: Mapping[str, Any]) -> tuple[str, ...]:
    """What LM Studio says of a model: its type, and since 0.3.16 its capabilities."""
    kind, capabilities = model.get("type"), model.get("capabilities")
    if kind == "embeddings":
        return (EMBEDDINGS_FEATURE, absent(CHAT), absent(COMPLETIONS))
    stated = (VISION if kind == "vlm" else absent(VISION),) if kind in ("llm", "vlm") else ()
    tools = (TOOLS,) if isinstance(capabilities, list) and "tool_use" in capabilities else ()
    return (*stated, *tools, *((absent(EMBEDDINGS),) if stated else ()))


def read_ollama_spec(answer: Mapping[str, Any]) -> Spec:
    """What Ollama's POST /api/show says of a model: its quantization in `details`, and what it can do."""
    details = answer.get("details")
    precision = _read_text(details, "quantization_level") if isinstance(details, dict) else UNKNOWN
    return Spec(precision=precision_class(precision), features=read_ollama_features(answer))


def read_ollama_features(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """What Ollama's POST /api/show says of a model in `capabilities`, which are missing before 0.6.4."""
    capabilities = answer.get("capabilities")
    if not isinstance(capabilities, list) or not capabilities:
        return ()
    if "completion" not in capabilities:
        return (EMBEDDINGS_FEATURE, absent(CHAT), absent(COMPLETIONS))
    return (
        TOOLS if "tools" in capabilities else absent(TOOLS),
        VISION if "vision" in capabilities else absent(VISION),
        JSON_SCHEMA,
    )


_WAITING = frozenset({"vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred", "tgi_queue_size"})
_KV_USED = frozenset({"vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"})


def read_load(metrics: bytes) -> EngineLoad | None:
    """An engine's queue and KV cache use, from its Prometheus metrics; None if they have no queue length."""
    waiting: float | None = None
    used: list[float] = []
    try:
        for family in text_string_to_metric_families(metrics.decode(errors="replace")):
            for sample in family.samples:
                if sample.name in _WAITING:
                    waiting = (waiting or 0) + max(0.0, sample.value)
                elif sample.name in _KV_USED:
                    used.append(sample.value)
    except ValueError:  # not in Prometheus' text format
        return None
    return None if waiting is None else EngineLoad(int(min(waiting, 1e9)), max(used) if used else None)


def _read_text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    return value[:64] if isinstance(value, str) and value else UNKNOWN


def _read_path(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    return value if isinstance(value, str) else ""


def _read_count(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31 else None


def _read_list(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = document.get(name)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
