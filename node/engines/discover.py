"""Which engines run here: asks the usual local ports, or what OPENAI_BASE_URL names, what they are and what they serve."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson

from node.domain.upstream_models import UpstreamModel, read_models
from node.engines.kinds import DEFAULT_URLS, FINGERPRINT_PATHS, EngineKind, identify, read_details
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.messages import Spec
from tallystick.protocol.sse import MalformedAnswer

TIMEOUT_SECONDS = 1.5
NAMED_TIMEOUT_SECONDS = 10.0
_MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class DiscoveredEngine:
    """An engine that answered. `version` is "unknown" where it does not say; `api_key` is what it was asked with.

    `slots`: requests that it says it runs at once; `specs`: what it says of its models.
    """

    url: str
    kind: EngineKind
    version: str
    models: tuple[UpstreamModel, ...]
    api_key: str | None = field(default=None, repr=False)
    slots: int | None = None
    specs: Mapping[str, Spec] = field(default_factory=dict)

    def spec(self, model: str) -> Spec:
        """What is known of a model: the engine, and what that says."""
        known = self.specs.get(model, Spec())
        return replace(known, engine=self.kind.value, engine_version=self.version)


async def discover(environment: Mapping[str, str], urls: tuple[str, ...] = DEFAULT_URLS) -> list[DiscoveredEngine]:
    """The engine that OPENAI_BASE_URL names, if that is set; otherwise all that answer on the usual ports and have a model.

    Raises Unavailable if OPENAI_BASE_URL is set and does not answer: nothing may quietly take the place of what was named.
    """
    named = environment.get("OPENAI_BASE_URL", "").strip()
    if named:
        return [await inspect_engine(named, environment.get("OPENAI_API_KEY") or None, seconds=NAMED_TIMEOUT_SECONDS)]
    found = await asyncio.gather(*(inspect_engine(url) for url in urls), return_exceptions=True)
    return [finding for finding in found if isinstance(finding, DiscoveredEngine) and finding.models]


async def inspect_engine(url: str, api_key: str | None = None, *, seconds: float = TIMEOUT_SECONDS) -> DiscoveredEngine:
    """What answers at `url` (with or without /v1), in at most `seconds` a question. Raises Unavailable if no list of models."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=seconds)) as session:
        try:
            models = read_models(await _get(session, base + "/v1/models") or b"")
        except MalformedAnswer as error:
            raise Unavailable(Code.ENGINE_UNAVAILABLE, f"{url}: {error}", fault=Fault.ENGINE) from None
        answers = await asyncio.gather(*(_object(session, base + path) for path in FINGERPRINT_PATHS))
    said = dict(zip(FINGERPRINT_PATHS, answers, strict=True))
    kind, version = identify(models, said)
    told = read_details(kind, models, said)
    models = tuple(replace(model, context_tokens=told.contexts.get(model.name, model.context_tokens)) for model in models)
    return DiscoveredEngine(url, kind, version, models, api_key, told.slots, told.specs)


async def _object(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none."""
    body = await _get(session, url)
    try:
        document = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


async def _get(session: aiohttp.ClientSession, url: str) -> bytes | None:
    try:
        async with session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                return None
            body = await response.content.read(_MAX_BYTES)
            return body if response.content.at_eof() else await _rest(response, body)
    except (aiohttp.ClientError, OSError):
        return None


async def _rest(response: aiohttp.ClientResponse, body: bytes) -> bytes | None:
    """The body to its end; None for one that is too long to be what was asked for."""
    while len(body) <= _MAX_BYTES:
        more = await response.content.readany()
        if not more:
            return body
        body += more
    return None
