"""Discovers the engines of this machine: probes their default ports, or the address in OPENAI_BASE_URL."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import orjson

from node.domain.upstream_models import UpstreamModel, read_models
from node.engines.addresses import BaseAddress, base_addresses
from node.engines.api_key import Key, auth_headers
from node.engines.kinds import DEFAULT_URLS, FINGERPRINT_PATHS, EngineKind, identify, read_details, read_ollama_spec
from tallystick.protocol.engine_errors import ANSWERED, BUSY
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.messages import Spec
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.routes import MODELS
from tallystick.protocol.sse import MalformedAnswer

TIMEOUT_SECONDS = 1.5
NAMED_TIMEOUT_SECONDS = 10.0
_MAX_BYTES = 4 << 20
MAX_SHOWN_MODELS = 64


@dataclass(frozen=True, slots=True)
class DiscoveredEngine:
    """An engine that answered. `version` is "unknown" if the engine does not tell it; `api_key` is the key that was used.

    `slots`: requests that the engine runs at a time, if it tells that; `specs`: its models' declared properties.
    """

    url: str
    kind: EngineKind
    version: str
    models: tuple[UpstreamModel, ...]
    api_key: Key = field(default=None, repr=False)
    slots: int | None = None
    specs: Mapping[str, Spec] = field(default_factory=dict)

    def spec(self, model: str) -> Spec:
        """A model's properties, completed with its engine and version."""
        declared = self.specs.get(model, Spec())
        return replace(declared, engine=self.kind.value, engine_version=self.version)


async def discover(environment: Mapping[str, str], urls: tuple[str, ...] = DEFAULT_URLS) -> list[DiscoveredEngine]:
    """The engine at OPENAI_BASE_URL if that is set, otherwise every engine on a default port that has a model.

    Raises Unavailable if OPENAI_BASE_URL is set and does not answer, because no other engine may silently take its place.
    """
    base_url = environment.get("OPENAI_BASE_URL", "").strip()
    if base_url:
        return [await inspect_engine(base_url, environment.get("OPENAI_API_KEY") or None, seconds=NAMED_TIMEOUT_SECONDS)]
    engines = await asyncio.gather(*(inspect_engine(url) for url in urls), return_exceptions=True)
    return [engine for engine in engines if isinstance(engine, DiscoveredEngine) and engine.models]


async def inspect_engine(url: str, api_key: Key = None, *, seconds: float = TIMEOUT_SECONDS) -> DiscoveredEngine:
    """Identifies the engine at `url`, its base URL with or without /v1, within `seconds` for each request.

    Raises NoModelList if it has no list of models, and Unavailable if it does not answer. The text says what is wrong with the
    address, the key or the engine.
    """
    headers = auth_headers(api_key)
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, trust_env=uses_proxy(url)) as session:
        base, models = await _list_models(session, base_addresses(url), seconds)
        answers = await asyncio.gather(*(_get_object(session, base.endpoint(path)) for path in FINGERPRINT_PATHS))
        by_path = dict(zip(FINGERPRINT_PATHS, answers, strict=True))
        kind, version = identify(models, by_path)
        shown = await _show_models(session, base, models) if kind is EngineKind.OLLAMA else {}
    details = read_details(kind, models, by_path)
    specs = {**details.specs, **{name: read_ollama_spec(answer) for name, answer in shown.items()}}
    models = tuple(replace(model, context_tokens=details.contexts.get(model.name, model.context_tokens)) for model in models)
    return DiscoveredEngine(url, kind, version, models, api_key, details.slots, specs)


class NoModelList(Unavailable):
    """The engine answers and has no list of models: the config must name them."""


async def _list_models(
    session: aiohttp.ClientSession, bases: tuple[BaseAddress, ...], seconds: float
) -> tuple[BaseAddress, tuple[UpstreamModel, ...]]:
    """The models at the first of these addresses that has a model list. Raises Unavailable."""
    faults: list[str] = []
    unlisted = 0
    for base in bases:
        address = base.route(MODELS)
        try:
            async with session.get(address, allow_redirects=False) as response:
                if response.status in ANSWERED:
                    return base, read_models(await _read_rest(response, b"") or b"")
                faults.append(_describe_status(address, response))
                unlisted += response.status in (404, 405)
                if response.status not in (404, 405):
                    break
        except MalformedAnswer as error:
            faults.append(f"no model list at {address}: {error}")
        except TimeoutError:
            faults.append(f"no answer from {address} within {seconds:g} s")
            break
        except (aiohttp.ClientError, OSError) as error:
            faults.append(f"nothing answers at {address} ({type(error).__name__}): start the engine, or correct the address")
            break
    text = faults[0] if len(bases) != len(faults) else "; ".join(faults)
    kind = NoModelList if unlisted == len(bases) else Unavailable
    raise kind(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE)


def _describe_status(address: str, response: aiohttp.ClientResponse) -> str:
    """What a status other than 200 says about an engine, and what to do."""
    status = response.status
    if status in (401, 403):
        return f"{address} answers {status}: it refuses the API key, or needs one; set OPENAI_API_KEY or api_key_env"
    if 300 <= status < 400:
        target = response.headers.get("location", "")[:200]
        return f"{address} answers {status}: it redirects to {target!r}; use that address, since redirects are not followed"
    if status in (404, 405):
        return f"{address} answers {status}: there is no model list; correct the base URL, or name the models in the config"
    if status in BUSY:
        return f"{address} answers {status}: the engine is busy or still loads its model; try again soon"
    return f"{address} answers {status} instead of a model list"


async def _show_models(
    session: aiohttp.ClientSession, base: BaseAddress, models: tuple[UpstreamModel, ...]
) -> dict[str, dict[str, Any]]:
    """Ollama's description of each model, of the first MAX_SHOWN_MODELS. It loads none."""
    shown = models[:MAX_SHOWN_MODELS]
    address = base.endpoint("/api/show")
    answers = await asyncio.gather(*(_get_object(session, address, {"model": model.name}) for model in shown))
    return {model.name: answer for model, answer in zip(shown, answers, strict=True)}


async def _get_object(session: aiohttp.ClientSession, url: str, posted: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object at `url`, to a POST if there is something to post; an empty one if there is none."""
    body = await _get(session, url, posted)
    try:
        document = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}


async def _get(session: aiohttp.ClientSession, url: str, posted: dict[str, Any] | None) -> bytes | None:
    method = "GET" if posted is None else "POST"
    try:
        async with session.request(method, url, json=posted, allow_redirects=False) as response:
            if response.status != 200:
                return None
            body = await response.content.read(_MAX_BYTES)
            return body if response.content.at_eof() else await _read_rest(response, body)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


async def _read_rest(response: aiohttp.ClientResponse, body: bytes) -> bytes | None:
    """Reads the body to its end; None if it is longer than any answer of an engine."""
    while len(body) <= _MAX_BYTES:
        more = await response.content.readany()
        if not more:
            return body
        body += more
    return None
