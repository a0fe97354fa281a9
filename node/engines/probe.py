"""Probes the capabilities of a model: sends the smallest request of each kind and checks the answer.

Routes that cost an engine real work (images, transcriptions) are not probed; providers declare them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from node.engines.addresses import BaseAddress, base_addresses, uses_proxy
from tallystick.protocol.openai_wire import choices_of, read_completion
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, MODELS, RESPONSES
from tallystick.protocol.sse import DONE, EventReader, MalformedAnswer, event_data

PROBE_SECONDS = 60.0
"""Timeout of one request, which may have to wait until the model is loaded."""
_MAX_BYTES = 4 << 20
_HI = [{"role": "user", "content": "Hi"}]
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}
_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "properties": {}}}}
RERANK, SPEECH = "/v1/rerank", "/v1/audio/speech"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a model can do. `streams`: "usage" if streams end with token counts, "yes" if not, "no" if it does not stream.

    `features`: the features, including routes, that an ask can declare. `output_limit_field`: the member that limits its
    output.
    """

    chat: bool
    completions: bool
    streams: str
    features: tuple[str, ...]
    output_limit_field: str = "max_tokens"


async def probe(url: str, model: str, api_key: str | None = None, *, seconds: float = PROBE_SECONDS) -> Capabilities:
    """Probes one model of the engine at `url` (with or without /v1). A capability whose request fails counts as absent."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=seconds)
    # Some engines silently close a connection after a stream, and the next request on it would fail.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector, trust_env=uses_proxy(url)) as session:
        base = await _choose_base(session, url)

        async def supports(path: str, check: Callable[[str, bytes], bool], **members: object) -> bool:
            return await _supports(session, base.route(path), {"model": model} | members, check)

        minimal: dict[str, Any] = {"messages": _HI, "max_tokens": 1}
        limit_field = "max_tokens"
        # In sequence: some engines run one request at a time, and a new one aborts the one before.
        chat = await supports(CHAT, _has("choices"), **minimal)
        if not chat:  # newer hosted models refuse max_tokens
            chat = await supports(CHAT, _has("choices"), messages=_HI, max_completion_tokens=16)
            limit_field = "max_completion_tokens" if chat else limit_field
            minimal = {"messages": _HI, limit_field: 16} if chat else minimal
        stream = minimal | {"stream": True}
        counts_usage = await supports(CHAT, _counts_usage, **stream, stream_options={"include_usage": True})
        streams = counts_usage or await supports(CHAT, _is_stream, **stream)
        completions = await supports(COMPLETIONS, _has("choices"), prompt="Hi", max_tokens=1)
        supported = {
            "tools": chat and await supports(CHAT, _has("choices"), **minimal, tools=[_TOOL]),
            "logprobs": chat and await supports(CHAT, _has_logprobs, **minimal, logprobs=True, top_logprobs=1),
            "json_schema": chat
            and await supports(CHAT, _has("choices"), **minimal | {limit_field: 16, "response_format": _SCHEMA}),
            "embeddings": await supports(EMBEDDINGS, _has("data"), input="Hi"),
            RESPONSES: await supports(RESPONSES, _has("output"), input="Hi", max_output_tokens=16, stream=False),
            MESSAGES: await supports(MESSAGES, _has("content"), messages=_HI, max_tokens=16, stream=False),
            RERANK: await supports(RERANK, _has("results"), query="a", documents=["a", "b"]),
            SPEECH: await supports(SPEECH, lambda kind, _: kind.startswith("audio/"), input="a", voice="alloy"),
        }
    features = tuple(name for name, present in supported.items() if present)
    return Capabilities(chat, completions, "usage" if counts_usage else "yes" if streams else "no", features, limit_field)


async def _choose_base(session: aiohttp.ClientSession, url: str) -> BaseAddress:
    """The meaning of a base URL under which the engine lists its models; the likelier one if none has a list."""
    bases = base_addresses(url)
    for base in bases if len(bases) > 1 else ():
        try:
            async with session.get(base.route(MODELS), allow_redirects=False) as response:
                if response.status == 200:
                    return base
        except (aiohttp.ClientError, TimeoutError, OSError):
            break
    return bases[0]


async def _supports(session: aiohttp.ClientSession, url: str, body: dict[str, Any], check: Callable[[str, bytes], bool]) -> bool:
    try:
        async with session.post(url, json=body, allow_redirects=False) as response:
            if response.status != 200:
                return False
            answer = bytearray()
            while part := await response.content.readany():
                answer += part
                if len(answer) > _MAX_BYTES:
                    return False
            return check(response.content_type, bytes(answer))
    except (aiohttp.ClientError, TimeoutError, OSError, MalformedAnswer, orjson.JSONDecodeError):
        return False


def _has(member: str) -> Callable[[str, bytes], bool]:
    """A check for a JSON object whose `member` is a list that is not empty."""

    def check(_kind: str, body: bytes) -> bool:
        document = orjson.loads(body)
        return isinstance(document, dict) and isinstance(document.get(member), list) and bool(document[member])

    return check


def _has_logprobs(_kind: str, body: bytes) -> bool:
    return any(choice.get("logprobs") for choice in choices_of(read_completion(body).members))


def _read_payloads(body: bytes) -> list[bytes]:
    payloads = [event_data(event) for event in EventReader(_MAX_BYTES).feed(body)]
    return [payload for payload in payloads if payload is not None and payload != DONE]


def _is_stream(_kind: str, body: bytes) -> bool:
    return any("choices" in read_completion(data).members for data in _read_payloads(body))


def _counts_usage(kind: str, body: bytes) -> bool:
    return _is_stream(kind, body) and any(read_completion(data).usage is not None for data in _read_payloads(body))
