"""An engine behind an OpenAI-compatible HTTP endpoint: vLLM, SGLang, llama.cpp, Ollama, a hosted API.

Redirects are never followed: a provider's key goes to the address that the provider wrote down, and nowhere else. Faults are
classified: *deterministic* (the client's request is wrong; the engine's answer goes to the client), *busy* (try elsewhere now)
and *broken* (down, misconfigured, or not speaking the protocol). Error texts carry no content, since they travel unsealed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import structlog

from node.domain.requests import EngineRequest
from node.domain.upstream_models import UpstreamModel, read_models
from node.engines.kinds import read_load
from node.ports import EngineEvent, EngineLoad, ResponseEnd, ResponsePart, ResponseStart
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.openai_wire import AnswerDocument, ReportedUsage, read_completion, read_other_answer
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, JSON, RESPONSES
from tallystick.protocol.sse import DONE, EVENT_STREAM, EventReader, MalformedAnswer, event_data

log = structlog.get_logger()
DETERMINISTIC = frozenset({400, 405, 406, 411, 413, 414, 415, 422, 431, 451})
"""The client's own fault: any provider would say the same."""
BUSY = frozenset({408, 409, 425, 429, 503, 529})
_DRAIN_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Where an engine is. `url` is its base with or without /v1; sizes are bytes, times seconds. The key is never printed.

    `trust_env`: honour HTTP_PROXY and its kin.
    """

    url: str
    api_key: str | None = None
    connect_seconds: float = 5.0
    check_seconds: float = 5.0
    max_event_bytes: int = 1 << 20
    max_answer_bytes: int = 32 << 20
    max_error_bytes: int = 64 << 10
    trust_env: bool = False

    def __repr__(self) -> str:
        return f"EngineSettings({self.url})"

    def at(self, path: str) -> str:
        """The full address of a route such as /v1/models."""
        return self.url.rstrip("/").removesuffix("/v1") + path


class _Broken(Exception):
    """What the engine did wrong, in words without content."""


class OpenAIEngine:
    """One endpoint. `await close()` when done with it."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._has_metrics = True

    async def close(self) -> None:
        """Closes all its connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def models(self) -> tuple[UpstreamModel, ...]:
        """The models that it serves now; none from an endpoint without such a list. Raises Unavailable."""
        settings = self._settings
        async with (
            self._faults(),
            asyncio.timeout(settings.check_seconds),
            self._open().get(settings.at("/v1/models"), allow_redirects=False) as response,
        ):
            if response.status in (404, 405):
                return ()
            self._check_status(response.status)
            return read_models(await self._read_all(response, settings.max_answer_bytes))
        raise AssertionError  # the fault handler either passes or raises

    async def load(self) -> EngineLoad | None:
        """See ports.Engine. Asked until it turns out that there are no such figures."""
        settings = self._settings
        if not self._has_metrics:
            return None
        try:
            async with (
                asyncio.timeout(settings.check_seconds),
                self._open().get(settings.at("/metrics"), allow_redirects=False) as response,
            ):
                if response.status in (401, 403, 404, 405, 501):
                    self._has_metrics = False
                if response.status != 200 or response.content_type != "text/plain":
                    return None
                return read_load(await self._read_all(response, settings.max_answer_bytes))
        except (_Broken, aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def answer(self, call: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """See ports.Engine."""
        accept = EVENT_STREAM if call.stream else JSON if call.is_completion or call.path == EMBEDDINGS else "*/*"
        headers = {"content-type": call.content_type, "accept": accept}
        address = self._settings.at(call.path)
        async with self._faults(), self._post(address, call, headers) as response:
            if response.status in DETERMINISTIC:
                body = await self._read_all(response, self._settings.max_error_bytes)
                yield ResponseStart(response.status, _plain_type(response.content_type))
                yield ResponseEnd(body)
                return
            self._check_status(response.status)
            expected = EVENT_STREAM if call.stream else JSON
            kind = response.content_type
            if kind != expected and (call.is_completion or call.path == EMBEDDINGS or call.stream or kind == EVENT_STREAM):
                raise _Broken(f"the content type {kind[:60]!r} instead of {expected}")
            yield ResponseStart(200, _plain_type(kind))
            if kind == JSON:
                yield self._whole(await self._read_all(response, self._settings.max_answer_bytes), call)
                return
            async with aclosing(self._stream(response, call) if call.stream else self._bytes(response)) as events:
                async for event in events:
                    yield event

    async def _bytes(self, response: aiohttp.ClientResponse) -> AsyncGenerator[EngineEvent, None]:
        """What is neither JSON nor a stream of events (speech, a picture), as it comes."""
        size = 0
        while data := await response.content.readany():
            size += len(data)
            if size > self._settings.max_answer_bytes:
                raise _Broken(f"an answer of more than {self._settings.max_answer_bytes} bytes")
            yield ResponsePart(data, has_output=True)
        yield ResponseEnd()

    @asynccontextmanager
    async def _post(self, address: str, call: EngineRequest, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Some engines close a connection after a stream without a word. A request that met such a one was not heard, and is
        asked again, until it went over a connection of its own.
        """
        while True:
            trace = _Trace(call)
            request = self._open().post(address, data=call.body, headers=headers, allow_redirects=False, trace_request_ctx=trace)
            try:
                response = await request
                break
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not trace.kept:
                    raise
        async with response:
            yield response

    async def _stream(self, response: aiohttp.ClientResponse, call: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """Pieces as they come, each all the events that one read completed; the end of the stream is held back for the End."""
        reader = EventReader(self._settings.max_event_bytes)
        read = read_completion if call.is_completion else read_other_answer
        finish: str | None = None
        counted: ReportedUsage | None = None
        answered = False
        while data := await response.content.readany():
            batch = _Batch()
            for event in reader.feed(data):
                payload = event_data(event)
                if payload == DONE:
                    if finish is None and not (answered or batch.output):
                        raise _Broken("a stream without an answer")
                    if batch.data:
                        yield batch.piece()
                    await self._drain(response)
                    yield ResponseEnd(event, usage=counted, truncated=finish == "length")
                    return
                if payload is None:
                    batch.data += event
                    continue
                reading = read(payload)
                finish, counted = reading.finish_reason or finish, reading.usage or counted
                if not (reading.usage_only and call.strip_usage):
                    batch.add(_render(event, reading, call), reading)
                batch.counted = counted
            answered = answered or batch.output
            if batch.data:
                yield batch.piece()
        ended = finish is not None or (answered and call.path not in (CHAT, COMPLETIONS, RESPONSES))
        if not ended or reader.rest.strip():
            raise _Broken("a stream that was cut off")
        yield ResponseEnd(usage=counted, truncated=finish == "length")

    async def _drain(self, response: aiohttp.ClientResponse) -> None:
        """A connection that was read to its end can serve the next request."""
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await response.content.readany()

    def _whole(self, body: bytes, call: EngineRequest) -> ResponseEnd:
        reading = read_completion(body) if call.is_completion or call.path == EMBEDDINGS else read_other_answer(body)
        finished = not call.is_completion or reading.finish_reason is not None or reading.has_output
        if not finished:
            raise _Broken("an answer without any choice")
        if _renamed(reading.document, call):
            body = orjson.dumps(reading.document)
        return ResponseEnd(body, reading.text_bytes, reading.usage, truncated=reading.finish_reason == "length")

    async def _read_all(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        body = bytearray()
        while data := await response.content.readany():
            body += data
            if len(body) > limit:
                raise _Broken(f"an answer of more than {limit} bytes")
        return bytes(body)

    def _check_status(self, status: int) -> None:
        if status in BUSY:
            raise Unavailable(Code.NODE_BUSY, f"the engine is busy ({status})", fault=Fault.ENGINE)
        if 300 <= status < 400:
            raise _Broken(f"a redirect ({status}), which is never followed")
        if status != 200:
            raise _Broken(f"the status {status}")

    @asynccontextmanager
    async def _faults(self) -> AsyncIterator[None]:
        """Turns what goes wrong with an engine into Unavailable, with the engine's fault."""
        try:
            yield
        except _Broken as error:
            said = f"the engine answered with {error}"
        except MalformedAnswer as error:
            said = f"the engine's answer is malformed: {error}"
        except aiohttp.ClientPayloadError:
            said = "the engine's answer broke off"
        except (aiohttp.ClientError, OSError) as error:
            said = f"the engine cannot be reached: {type(error).__name__}"
        else:
            return
        log.warning("engine fault", engine=self._settings.url, fault=said)
        raise Unavailable(Code.ENGINE_UNAVAILABLE, said, fault=Fault.ENGINE)

    def _open(self) -> aiohttp.ClientSession:
        """The session, made inside the running loop."""
        if self._session is None:
            settings = self._settings
            headers = {"accept-encoding": "identity"}
            if settings.api_key:
                headers["authorization"] = f"Bearer {settings.api_key}"
            traces = aiohttp.TraceConfig()
            traces.on_connection_reuseconn.append(_note_kept)
            traces.on_request_chunk_sent.append(_note_sent)
            self._session = aiohttp.ClientSession(
                headers=headers,
                trace_configs=[traces],
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                # The runner's deadlines bound each phase of an answer; here, only what comes before it.
                timeout=aiohttp.ClientTimeout(
                    total=None, connect=settings.connect_seconds, sock_connect=settings.connect_seconds
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=settings.trust_env,
            )
        return self._session


@dataclass(slots=True)
class _Trace:
    """One try at a request. `kept`: it went over a connection that had served another before."""

    call: EngineRequest
    kept: bool = False


async def _note_kept(_session: aiohttp.ClientSession, context: Any, _params: aiohttp.TraceConnectionReuseconnParams) -> None:
    """The request goes over a connection that was kept."""
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.kept = True


async def _note_sent(_session: aiohttp.ClientSession, context: Any, _params: aiohttp.TraceRequestChunkSentParams) -> None:
    """The body goes out, which is one chunk."""
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.call.on_sent()


class _Batch:
    """The events of one read, on their way to be one piece."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.output = False
        self.text = 0
        self.counted: ReportedUsage | None = None

    def add(self, event: bytes, reading: AnswerDocument) -> None:
        self.data += event
        self.output = self.output or reading.has_output or reading.finish_reason is not None
        self.text += reading.text_bytes

    def piece(self) -> ResponsePart:
        return ResponsePart(bytes(self.data), self.output, self.text, self.counted)


def _render(event: bytes, reading: AnswerDocument, call: EngineRequest) -> bytes:
    """The event as the client gets it: as it came, unless the model has another name here."""
    if not _renamed(reading.document, call):
        return event
    named = b"".join(line + b"\n" for line in event.splitlines() if line.startswith(b"event:"))
    return named + b"data: " + orjson.dumps(reading.document) + b"\n\n"


def _renamed(document: dict[str, Any], call: EngineRequest) -> bool:
    """Gives the model the name that it is sold by, wherever the document names it; whether anything changed."""
    changed = False
    for part in (document, document.get("response")):
        named = isinstance(part, dict) and ("model" in part or (part is document and call.is_completion))
        if call.rename is not None and isinstance(part, dict) and named and part.get("model") != call.rename[1]:
            part["model"] = call.rename[1]
            changed = True
    return changed


def _plain_type(content_type: str) -> str:
    return content_type if len(content_type) <= 100 else "application/octet-stream"
