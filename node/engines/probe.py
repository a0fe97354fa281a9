"""What a model can do, found by asking it: the smallest request of each kind, and whether the answer has what was asked for.

What costs an engine real work (pictures, transcriptions) is not tried; a provider declares it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from tallystick.protocol.openai_wire import choices_of, read_completion
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from tallystick.protocol.sse import DONE, EVENT_STREAM, EventReader, MalformedAnswer, event_data

SECONDS = 60.0
"""A request may have to wait until the model is loaded."""
_MAX_BYTES = 4 << 20
_HI = [{"role": "user", "content": "Hi"}]
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}}}
RERANK, SPEECH = "/v1/rerank", "/v1/audio/speech"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model answered. `streams` is "usage" where its streams end with a count, "yes" where not, "no" where it has none.

    `features`: what an ask can declare, routes among them.
    """

    chat: bool
    completions: bool
    streams: str
    features: tuple[str, ...]


async def probe(url: str, model: str, api_key: str | None = None, *, seconds: float = SECONDS) -> Capabilities:
    """Asks an engine (its base address, with or without /v1) about one of its models. What fails is not there."""
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=seconds)
    # Some engines close a connection after a stream without a word, and the next request on it would fail.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:

        async def ask(path: str, good: Callable[[str, bytes], bool], **members: object) -> bool:
            return await _ask(session, base + path, {"model": model} | members, good)

        small = {"messages": _HI, "max_tokens": 1}
        stream = small | {"stream": True}
        # One after another: some engines take one request at a time, and a new one cuts off the one before.
        chat = await ask(CHAT, _has("choices"), **small)
        counted = await ask(CHAT, _counts, **stream, stream_options={"include_usage": True})
        streams = counted or await ask(CHAT, _streams, **stream)
        completes = await ask(COMPLETIONS, _has("choices"), prompt="Hi", max_tokens=1)
        found = {
            "tools": chat and await ask(CHAT, _has("choices"), **small, tools=[_TOOL]),
            "logprobs": chat and await ask(CHAT, _has_logprobs, **small, logprobs=True, top_logprobs=1),
            "json_schema": chat and await ask(CHAT, _has("choices"), **(small | {"max_tokens": 8}), response_format=_SCHEMA),
            "embeddings": await ask(EMBEDDINGS, _has("data"), input="Hi"),
            RESPONSES: await ask(RESPONSES, _has("output"), input="Hi", max_output_tokens=16, stream=False),
            RERANK: await ask(RERANK, _has("results"), query="a", documents=["a", "b"]),
            SPEECH: await ask(SPEECH, lambda kind, _: kind.startswith("audio/"), input="a", voice="alloy"),
        }
    features = tuple(name for name, there in found.items() if there)
    return Capabilities(chat, completes, "usage" if counted else "yes" if streams else "no", features)


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any], good: Callable[[str, bytes], bool]) -> bool:
    try:
        async with session.post(url, json=body, allow_redirects=False) as response:
            if response.status != 200:
                return False
            answer = bytearray()
            while part := await response.content.readany():
                answer += part
                if len(answer) > _MAX_BYTES:
                    return False
            return good(response.content_type, bytes(answer))
    except (aiohttp.ClientError, TimeoutError, OSError, MalformedAnswer, orjson.JSONDecodeError):
        return False


def _has(member: str) -> Callable[[str, bytes], bool]:
    """An object with a list that is not empty."""

    def good(_kind: str, body: bytes) -> bool:
        document = orjson.loads(body)
        return isinstance(document, dict) and isinstance(document.get(member), list) and bool(document[member])

    return good


def _has_logprobs(_kind: str, body: bytes) -> bool:
    return any(choice.get("logprobs") for choice in choices_of(read_completion(body).document))


def _events(body: bytes) -> list[bytes]:
    said = [event_data(event) for event in EventReader(_MAX_BYTES).feed(body)]
    return [data for data in said if data is not None and data != DONE]


def _streams(kind: str, body: bytes) -> bool:
    return kind == EVENT_STREAM and any("choices" in read_completion(data).document for data in _events(body))


def _counts(kind: str, body: bytes) -> bool:
    return _streams(kind, body) and any(read_completion(data).usage is not None for data in _events(body))
