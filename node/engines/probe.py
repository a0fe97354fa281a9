"""Probes what a model can do: its routes, and the features of each.

The routes are found by requests that cost nothing (`route_probe`). An engine that the provider runs itself also gets the smallest
valid request of each kind, because some engines have a route for every model and refuse it for most. Images and transcriptions
are never tried out, because they cost real work.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import orjson

from node.engines.addresses import BaseAddress, base_addresses
from node.engines.api_key import Key, auth_headers
from node.engines.capabilities import Capabilities
from node.engines.discover import DiscoveredEngine
from node.engines.evidence_probe import STREAM, EvidenceProbe
from node.engines.kinds import EngineKind
from node.engines.route_probe import CLASSIFY, MODERATIONS, RERANK, SCORE, SPEECH, Routes, probe_routes
from node.engines.scoring import scoring_api
from tallystick.protocol.engine_errors import ANSWERED, BUSY
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.features import EMBEDDINGS_FEATURE, JSON_SCHEMA, LOGPROBS, TOOLS, VISION, absent
from tallystick.protocol.openai_wire import choices_of, read_completion
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.routes import ALWAYS, CHAT, COMPLETIONS, EMBEDDINGS, MODELS, SCORES
from tallystick.protocol.sse import DONE, EventReader, MalformedAnswer, event_data
from tallystick.scoring.detect import find_scorer

PROBE_SECONDS = 60.0
"""Timeout of one request, which may have to wait until the model is loaded."""
UNKNOWN_MODEL = "tallystick-probe"
_MAX_BYTES = 4 << 20
_HI = [{"role": "user", "content": "Hi"}]
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}}}
_PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAS0lEQVR42u3PMQ0AAAwDoPo33UrYvQQckD4XAQEBAQEBAQEB"
    "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAYHLAMpT0sIcNbcEAAAAAElFTkSuQmCC"
)
_IMAGE = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image_url", "image_url": {"url": _PNG}}]}]
_LOADS_ON_DEMAND = frozenset({EngineKind.OLLAMA, EngineKind.LM_STUDIO, EngineKind.LOCALAI})
"""Engines that load a model for its first request, and unload another for it."""


def may_generate(engine: DiscoveredEngine) -> bool:
    """Whether a probe may send valid requests unasked: the engine is the provider's own, and runs its models all the time.

    Hosted APIs charge for every request, and so may the API behind a proxy.
    """
    if engine.kind in _LOADS_ON_DEMAND or engine.kind is EngineKind.LITELLM:
        return False
    return is_own_machine(engine.url) and (engine.kind is not EngineKind.OTHER or engine.api_key is None)


def is_own_machine(url: str) -> bool:
    """Whether a URL names this machine, or one of a private network."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan", ".home.arpa", ".localhost"))


def model_for_routes(engine: DiscoveredEngine, model: str) -> str:
    """Returns the model that invalid requests name to find out the routes of an engine.

    LiteLLM pauses a model for seconds after a request that failed behind it. It refuses a model that it does not know by itself.
    """
    return UNKNOWN_MODEL if engine.kind is EngineKind.LITELLM else model


async def probe(
    url: str,
    model: str,
    api_key: Key = None,
    *,
    seconds: float = PROBE_SECONDS,
    generate: bool = True,
    routes_of: str | None = None,
) -> Capabilities:
    """Probes one model of the engine at `url` (with or without /v1).

    `routes_of`: see `model_for_routes`. Without `generate`, no valid request is sent. What cannot be found out, because the
    engine is busy or does not answer, is declared neither present nor absent.
    """
    headers = auth_headers(api_key)
    timeout = aiohttp.ClientTimeout(total=seconds)
    # Some engines silently close a connection after a stream, and the next request on it would fail.
    connector = aiohttp.TCPConnector(force_close=True, limit=8)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector, trust_env=uses_proxy(url)) as session:
        base = await _choose_base(session, url)
        routes, answered = await probe_routes(session, base, routes_of or model)
        if generate and answered:
            return await _Trial(session, base, model, routes).run()
    return Capabilities(routes[CHAT] is not False, routes[COMPLETIONS] is not False, "unknown", _declare(routes, {}))


def _declare(routes: Routes, abilities: Mapping[str, bool | None]) -> tuple[str, ...]:
    """The features that state these findings. Every ask sells the routes in ALWAYS unless it says otherwise."""
    found = [path for path, served in routes.items() if served and path not in ALWAYS]
    lacking = [absent(path) for path in ALWAYS if routes[path] is False]
    stated = [name if present else absent(name) for name, present in abilities.items() if present is not None]
    return (*stated, *found, *lacking)


class _Trial:
    """Tries out one model with the smallest valid requests.

    They are sent in sequence: some engines run one request at a time, and a new one aborts the one before.
    """

    def __init__(self, session: aiohttp.ClientSession, base: BaseAddress, model: str, routes: Routes) -> None:
        self._session, self._base, self._model, self._routes = session, base, model, dict(routes)
        self._minimal: dict[str, Any] = {"messages": _HI, "max_tokens": 1}
        self._limit_field = "max_tokens"
        self._evidence = EvidenceProbe()
        self._input_tokens: int | None = None
        """What the engine counts for the smallest chat."""

    async def run(self) -> Capabilities:
        chat = await self._try_chat()
        streams, abilities = "no", dict[str, bool | None]()
        if chat is None:  # too slow or too busy to be tried out now
            return Capabilities(True, self._routes[COMPLETIONS] is not False, "unknown", _declare(self._routes, {}))
        if chat:
            streams = await self._try_streams()
            abilities = await self._try_abilities()
        completed = self._evidence.noting(COMPLETIONS, _has("choices"), lambda body: [body])
        completions = await self._try(COMPLETIONS, completed, prompt="Hi", max_tokens=1)
        if completions:
            await self._evidence.try_completions(self._try)
        if chat or completions:
            self._routes[SCORES] = await self._try_scores()
        embeddings = await self._try(EMBEDDINGS, _has("data"), input="Hi")
        await self._try_others(chat=chat)
        if chat or completions or embeddings:
            self._routes |= {CHAT: chat, COMPLETIONS: completions, EMBEDDINGS: embeddings}
        if embeddings:
            abilities[EMBEDDINGS_FEATURE] = True
        features = _declare(self._routes, abilities)
        support = self._evidence.support()
        return Capabilities(bool(chat), bool(completions), streams, features, self._limit_field, support)

    async def _try(self, path: str, check: _Check, **members: object) -> bool | None:
        if self._routes[path] is False:
            return False
        return await _supports(self._session, self._base.route(path), {"model": self._model} | members, check)

    async def _try_chat(self) -> bool | None:
        chat = await self._try(CHAT, self._is_chat, **self._minimal)
        if chat is False:  # newer hosted models refuse max_tokens
            chat = await self._try(CHAT, self._is_chat, messages=_HI, max_completion_tokens=16)
            if chat:
                self._limit_field = "max_completion_tokens"
                self._minimal = {"messages": _HI, self._limit_field: 16}
        return chat

    async def _try_scores(self) -> bool | None:
        """Whether the engine can score a text for an audit, by whatever endpoints it has."""
        try:
            return await find_scorer(scoring_api(self._session, self._base, None), self._model) is not None
        except Unavailable:
            return None

    async def _try_streams(self) -> str:
        stream = self._minimal | {"stream": True}
        counts_usage = self._evidence.noting(STREAM, _counts_usage, _read_payloads)
        if await self._try(CHAT, counts_usage, **stream, stream_options={"include_usage": True}):
            return "usage"
        is_stream = self._evidence.noting(STREAM, _is_stream, _read_payloads)
        return "yes" if await self._try(CHAT, is_stream, **stream) else "no"

    async def _try_abilities(self) -> dict[str, bool | None]:
        minimal = self._minimal
        return {
            TOOLS: await self._try(CHAT, self._reads_more, **minimal, tools=[_TOOL]),
            LOGPROBS: await self._evidence.try_chat(self._try, minimal),
            JSON_SCHEMA: await self._try(CHAT, _begins_as_json, **minimal, response_format=_SCHEMA),
            VISION: await self._try(CHAT, self._reads_more, **minimal | {"messages": _IMAGE}),
        }

    def _is_chat(self, kind: str, body: bytes) -> bool:
        answer = read_completion(body)
        self._input_tokens = None if answer.usage is None else answer.usage.input
        self._evidence.note_plain(CHAT, answer.members)
        return _has("choices")(kind, body)

    def _reads_more(self, kind: str, body: bytes) -> bool | None:
        """Whether the engine read more than the smallest chat; None if it answered and ignored what was added."""
        usage = read_completion(body).usage
        ignored = usage is not None and self._input_tokens is not None and (usage.input or 0) <= self._input_tokens
        return None if ignored else _has("choices")(kind, body)

    async def _try_others(self, *, chat: bool) -> None:
        """Tries the routes that engines have for every model and serve for a few.

        A server of speech alone is not tried: its voices have names of its own, and it may refuse any other.
        """
        for path, (check, members) in _SPECIAL.items():
            if self._routes[path] is not False and (chat or path != SPEECH):
                served = await self._try(path, check, **members)
                self._routes[path] = self._routes[path] if served is None else served


async def _choose_base(session: aiohttp.ClientSession, url: str) -> BaseAddress:
    """The meaning of a base URL under which the engine lists its models; without a list, the one under which it has chats."""
    bases = base_addresses(url)
    try:
        for base in bases if len(bases) > 1 else ():
            async with session.get(base.route(MODELS), allow_redirects=False) as response:
                if response.status == 200:
                    return base
        for base in bases if len(bases) > 1 else ():
            async with session.post(base.route(CHAT), json={}, allow_redirects=False) as response:
                if response.status not in (404, 405):
                    return base
    except (aiohttp.ClientError, TimeoutError, OSError):
        pass
    return bases[0]


async def _supports(session: aiohttp.ClientSession, url: str, body: dict[str, Any], check: _Check) -> bool | None:
    """Whether a request is answered as `check` wants; None if the engine is busy, too slow or gone."""
    try:
        async with session.post(url, json=body, allow_redirects=False) as response:
            if response.status not in ANSWERED:
                return None if response.status in BUSY else False
            answer = bytearray()
            while part := await response.content.readany():
                answer += part
                if len(answer) > _MAX_BYTES:
                    return False
            return check(response.content_type, bytes(answer))
    except (MalformedAnswer, orjson.JSONDecodeError):
        return False
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def _has(member: str) -> Callable[[str, bytes], bool]:
    """A check for a JSON object whose `member` is a list that is not empty."""

    def check(_kind: str, body: bytes) -> bool:
        document = orjson.loads(body)
        return isinstance(document, dict) and isinstance(document.get(member), list) and bool(document[member])

    return check


def _read_payloads(body: bytes) -> list[bytes]:
    payloads = [event_data(event) for event in EventReader(_MAX_BYTES).feed(body)]
    return [payload for payload in payloads if payload is not None and payload != DONE]


def _is_stream(_kind: str, body: bytes) -> bool:
    return any("choices" in read_completion(data).members for data in _read_payloads(body))


def _counts_usage(kind: str, body: bytes) -> bool:
    return _is_stream(kind, body) and any(read_completion(data).usage is not None for data in _read_payloads(body))


def _begins_as_json(kind: str, body: bytes) -> bool | None:
    """Whether an answer to a request for JSON begins as JSON does; None if the engine ignored the request."""
    messages = [choice.get("message") for choice in choices_of(read_completion(body).members)]
    texts = [message.get("content") or "" for message in messages if isinstance(message, dict)]
    begins = all(isinstance(text, str) and text.strip()[:1] in ("", "{") for text in texts)
    return (_has("choices")(kind, body) and begins) or None


def _has_results(kind: str, body: bytes) -> bool:
    return any(_has(member)(kind, body) for member in ("results", "data"))


_Check = Callable[[str, bytes], bool | None]
"""Judges an answer by its content type and its body; None if it says neither yes nor no."""
_SPECIAL: Final[Mapping[str, tuple[_Check, dict[str, Any]]]] = {
    RERANK: (_has_results, {"query": "a", "documents": ["a", "b"]}),
    SCORE: (_has_results, {"text_1": "a", "text_2": "b"}),
    CLASSIFY: (_has_results, {"input": "a"}),
    MODERATIONS: (_has_results, {"input": "a"}),
    SPEECH: (lambda kind, _: kind.startswith("audio/"), {"input": "a", "voice": "alloy"}),
}
