"""Finds the routes that an engine serves, with requests that cost nothing.

Each route gets a request whose main member is missing or of the wrong type. An engine that has the route refuses such a request
before it does any work, and hosted APIs charge nothing for a refusal. The status tells: 404, 405, 501 or a redirect means that
the route is missing, and any other refusal means that it exists. An engine that answers a route that cannot exist says nothing by
its statuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import aiohttp

from node.engines.addresses import BaseAddress
from tallystick.protocol.engine_errors import BUSY
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

ROUTE_SECONDS = 3.0
"""Timeout of one request. A refusal takes milliseconds."""
TOTAL_SECONDS = 10.0
RERANK, SCORE, CLASSIFY, MODERATIONS = "/v1/rerank", "/v1/score", "/v1/classify", "/v1/moderations"
SPEECH, TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/speech", "/v1/audio/transcriptions", "/v1/audio/translations"
IMAGES, IMAGE_EDITS, IMAGE_VARIATIONS = "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"
NO_ROUTE: Final = "/v1/tally-no-such-route"
INVALID: Final[Mapping[str, dict[str, Any]]] = {
    CHAT: {"messages": 7, "max_tokens": 1},
    COMPLETIONS: {"prompt": {}, "max_tokens": 1},
    EMBEDDINGS: {"input": {}},
    RESPONSES: {"input": 7, "max_output_tokens": 16},
    MESSAGES: {"max_tokens": 1},
    RERANK: {"query": 7, "documents": 7},
    SCORE: {"text_1": {}, "text_2": {}},
    CLASSIFY: {"input": {}},
    MODERATIONS: {"input": {}},
    SPEECH: {"input": {}},
    TRANSCRIPTIONS: {"file": 7},
    TRANSLATIONS: {"file": 7},
    IMAGES: {"prompt": {}},
    IMAGE_EDITS: {"image": 7, "prompt": {}},
    IMAGE_VARIATIONS: {"image": 7},
}
"""Every route that a probe looks for, with the members of an invalid request. Routes that manage an engine (its files, adapters,
batches) are never sold.
"""
_ABSENT = frozenset({404, 405, 501})
_STREAMED = frozenset({CHAT, COMPLETIONS, RESPONSES, MESSAGES})

Routes = Mapping[str, bool | None]
"""Whether an engine serves each route; None if that is not known."""


async def probe_routes(session: aiohttp.ClientSession, base: BaseAddress, model: str) -> tuple[Routes, bool]:
    """Probes the routes of an engine for one model, within TOTAL_SECONDS. Returns also whether the engine answered at all."""
    answered = False
    found: dict[str, bool | None] = dict.fromkeys((*INVALID, NO_ROUTE))

    async def look(path: str, members: dict[str, Any]) -> None:
        nonlocal answered
        body = {"model": model} | members
        status = await _status(session, base.route(path), body)
        if _means_served(status) is False and path in _STREAMED:  # some engines only stream
            status = await _status(session, base.route(path), body | {"stream": True})
        found[path], answered = _means_served(status), answered or status is not None

    requests = [look(path, members) for path, members in {**INVALID, NO_ROUTE: {}}.items()]
    try:
        async with asyncio.timeout(TOTAL_SECONDS):
            await asyncio.gather(*requests)
    except TimeoutError:
        pass
    answers_anything = found.pop(NO_ROUTE) is not False
    if not any(found.values()):  # without any route, the model was not found
        return dict.fromkeys(found), answered
    if answers_anything:
        return {path: False if served is False else None for path, served in found.items()}, answered
    return found, answered


async def _status(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> int | None:
    """The status of the answer; None if there is none in time."""
    timeout = aiohttp.ClientTimeout(total=ROUTE_SECONDS)
    try:
        async with session.post(url, json=body, allow_redirects=False, timeout=timeout) as response:
            return response.status
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def _means_served(status: int | None) -> bool | None:
    if status is None:
        return None
    if status in _ABSENT or 300 <= status < 400:
        return False
    return None if status in BUSY or status in (401, 402, 403) else True
