"""Settings of the connection to an engine."""

from __future__ import annotations

from dataclasses import dataclass

from node.engines.api_key import Key


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to reach an engine. `url`: its base URL, as OpenAI's SDKs mean it or without /v1. The API key is never printed.

    `trust_env`: use the proxies in HTTP_PROXY and related environment variables.
    """

    url: str
    api_key: Key = None
    connect_seconds: float = 5.0
    check_seconds: float = 5.0
    max_event_bytes: int = 1 << 20
    max_answer_bytes: int = 32 << 20
    max_error_bytes: int = 64 << 10
    trust_env: bool = False

    def __repr__(self) -> str:
        return f"EngineSettings({self.url})"
