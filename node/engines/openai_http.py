"""An engine behind an OpenAI-compatible HTTP endpoint: vLLM, SGLang, llama.cpp, Ollama, a hosted API.

Redirects are never followed, so that the provider's API key reaches only the configured address. Faults have three classes:
*deterministic* (the client's request is wrong, and gets the engine's answer), *busy* (another provider may answer now) and
*broken* (down, misconfigured, or violating the protocol). Error texts quote nothing of requests and answers, because they travel
unsealed.
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
CLIENT_FAULTS = frozenset({400, 405, 406, 411, 413, 414, 415, 422, 431, 451})
"""Statuses that are the client's fault: every provider would answer the same."""
BUSY = frozenset({408, 409, 425, 429, 503, 529})
"""Statuses of an engine that may answer the same request later."""
_DRAIN_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to reach an engine. `url` is its base address, with or without /v1. The API key is never printed.

    `trust_env`: use the proxies in HTTP_PROXY and related environment variables.
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

    def address(self, path: str) -> str:
        """The address of a route such as /v1/models."""
        return self.url.rstrip("/").removesuffix("/v1") + path


class _EngineBroken(Exception):
    """A fault of the engine. The text completes "the engine answered with" and quotes nothing of the answer."""


class OpenAIEngine:
    """One HTTP endpoint. Call `close` at the end."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None
        self._has_metrics = True

    async def close(self) -> None:
        """Closes all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def models(self) -> tuple[UpstreamModel, ...]:
        """The models that the engine serves now; empty if it has no model list. Raises Unavailable."""
        settings = self._settings
        async with (
            self._faults(),
            asyncio.timeout(settings.check_seconds),
            self._open().get(settings.address("/v1/models"), allow_redirects=False) as response,
        ):
            if response.status in (404, 405):
                return ()
            self._check_status(response.status)
            return read_models(await self._read_all(response, settings.max_answer_bytes))
        raise AssertionError  # not reached: the fault handler returns or raises

    async def load(self) -> EngineLoad | None:
        """See ports.Engine. Stops asking once the engine turns out to have no metrics."""
        settings = self._settings
        if not self._has_metrics:
            return None
        try:
            async with (
                asyncio.timeout(settings.check_seconds),
                self._open().get(settings.address("/metrics"), allow_redirects=False) as response,
            ):
                if response.status in (401, 403, 404, 405, 501):
                    self._has_metrics = False
                if response.status != 200 or response.content_type != "text/plain":
                    return None
                return read_load(await self._read_all(response, settings.max_answer_bytes))
        except (_EngineBroken, aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def answer(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """See ports.Engine."""
        accept = EVENT_STREAM if request.stream else JSON if request.is_completion or request.path == EMBEDDINGS else "*/*"
        headers = {"content-type": request.content_type, "accept": accept}
        address = self._settings.address(request.path)
        async with self._faults(), self._post(address, request, headers) as response:
            if response.status in CLIENT_FAULTS:
                body = await self._read_all(response, self._settings.max_error_bytes)
                yield ResponseStart(response.status, _bounded_type(response.content_type))
                yield ResponseEnd(body)
                return
            self._check_status(response.status)
            expected = EVENT_STREAM if request.stream else JSON
            content_type = response.content_type
            strict = request.is_completion or request.path == EMBEDDINGS or request.stream or content_type == EVENT_STREAM
            if strict and content_type != expected:
                raise _EngineBroken(f"the content type {content_type[:60]!r} instead of {expected}")
            yield ResponseStart(200, _bounded_type(content_type))
            if content_type == JSON:
                yield self._read_whole(await self._read_all(response, self._settings.max_answer_bytes), request)
                return
            async with aclosing(self._read_stream(response, request) if request.stream else self._read_bytes(response)) as events:
                async for event in events:
                    yield event

    async def _read_bytes(self, response: aiohttp.ClientResponse) -> AsyncGenerator[EngineEvent, None]:
        """Passes on a body that is neither JSON nor an event stream (speech, an image) as it comes."""
        size = 0
        while data := await response.content.readany():
            size += len(data)
            if size > self._settings.max_answer_bytes:
                raise _EngineBroken(f"an answer of more than {self._settings.max_answer_bytes} bytes")
            yield ResponsePart(data, has_output=True)
        yield ResponseEnd()

    @asynccontextmanager
    async def _post(self, address: str, request: EngineRequest, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Posts a request. If it fails on a reused connection, it is sent again, until a new connection was used.

        Some engines silently close a connection after a stream. A request on such a connection never reached them.
        """
        while True:
            trace = _Trace(request)
            posting = self._open().post(
                address, data=request.body, headers=headers, allow_redirects=False, trace_request_ctx=trace
            )
            try:
                response = await posting
                break
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not trace.reused_connection:
                    raise
        async with response:
            yield response

    async def _read_stream(self, response: aiohttp.ClientResponse, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yields one ResponsePart for the events that each read completed. The last event is part of ResponseEnd."""
        reader = EventReader(self._settings.max_event_bytes)
        read = read_completion if request.is_completion else read_other_answer
        finish: str | None = None
        usage: ReportedUsage | None = None
        has_output = False
        while data := await response.content.readany():
            batch = _EventBatch()
            for event in reader.feed(data):
                payload = event_data(event)
                if payload == DONE:
                    if finish is None and not (has_output or batch.has_output):
                        raise _EngineBroken("a stream without an answer")
                    if batch.data:
                        yield batch.piece()
                    await self._drain(response)
                    yield ResponseEnd(event, usage=usage, truncated=finish == "length")
                    return
                if payload is None:
                    batch.data += event
                    continue
                document = read(payload)
                finish, usage = document.finish_reason or finish, document.usage or usage
                if not (document.usage_only and request.strip_usage):
                    batch.add(_render(event, document, request), document)
                batch.usage = usage
            has_output = has_output or batch.has_output
            if batch.data:
                yield batch.piece()
        complete = finish is not None or (has_output and request.path not in (CHAT, COMPLETIONS, RESPONSES))
        if not complete or reader.rest.strip():
            raise _EngineBroken("a stream that was cut off")
        yield ResponseEnd(usage=usage, truncated=finish == "length")

    async def _drain(self, response: aiohttp.ClientResponse) -> None:
        """Reads the response to its end, so that its connection can be reused."""
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                await response.content.readany()

    def _read_whole(self, body: bytes, request: EngineRequest) -> ResponseEnd:
        document = read_completion(body) if request.is_completion or request.path == EMBEDDINGS else read_other_answer(body)
        finished = not request.is_completion or document.finish_reason is not None or document.has_output
        if not finished:
            raise _EngineBroken("an answer without any choice")
        if _renamed(document.members, request):
            body = orjson.dumps(document.members)
        return ResponseEnd(body, document.text_bytes, document.usage, truncated=document.finish_reason == "length")

    async def _read_all(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        body = bytearray()
        while data := await response.content.readany():
            body += data
            if len(body) > limit:
                raise _EngineBroken(f"an answer of more than {limit} bytes")
        return bytes(body)

    def _check_status(self, status: int) -> None:
        if status in BUSY:
            raise Unavailable(Code.NODE_BUSY, f"the engine is busy ({status})", fault=Fault.ENGINE)
        if 300 <= status < 400:
            raise _EngineBroken(f"a redirect ({status}), which is never followed")
        if status != 200:
            raise _EngineBroken(f"the status {status}")

    @asynccontextmanager
    async def _faults(self) -> AsyncIterator[None]:
        """Raises Unavailable, with the engine's fault, for everything that goes wrong with the engine."""
        try:
            yield
        except _EngineBroken as error:
            text = f"the engine answered with {error}"
        except MalformedAnswer as error:
            text = f"the engine's answer is malformed: {error}"
        except aiohttp.ClientPayloadError:
            text = "the engine's answer broke off"
        except (aiohttp.ClientError, OSError) as error:
            text = f"the engine cannot be reached: {type(error).__name__}"
        else:
            return
        log.warning("engine fault", engine=self._settings.url, fault=text)
        raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE)

    def _open(self) -> aiohttp.ClientSession:
        """The HTTP session, created inside the running event loop."""
        if self._session is None:
            settings = self._settings
            headers = {"accept-encoding": "identity"}
            if settings.api_key:
                headers["authorization"] = f"Bearer {settings.api_key}"
            traces = aiohttp.TraceConfig()
            traces.on_connection_reuseconn.append(_mark_reused)
            traces.on_request_chunk_sent.append(_mark_sent)
            self._session = aiohttp.ClientSession(
                headers=headers,
                trace_configs=[traces],
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                # The runner's deadlines bound the answer; this bounds only the time before it.
                timeout=aiohttp.ClientTimeout(
                    total=None, connect=settings.connect_seconds, sock_connect=settings.connect_seconds
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=settings.trust_env,
            )
        return self._session


@dataclass(slots=True)
class _Trace:
    """One attempt at a request, and whether it used a connection that had served another request."""

    request: EngineRequest
    reused_connection: bool = False


async def _mark_reused(_session: aiohttp.ClientSession, context: Any, _params: aiohttp.TraceConnectionReuseconnParams) -> None:
    """Called when the request uses a kept connection."""
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.reused_connection = True


async def _mark_sent(_session: aiohttp.ClientSession, context: Any, _params: aiohttp.TraceRequestChunkSentParams) -> None:
    """Called when the body, which is one chunk, was sent."""
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.request.on_sent()


class _EventBatch:
    """Collects the events of one read into one ResponsePart."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.has_output = False
        self.text = 0
        self.usage: ReportedUsage | None = None

    def add(self, event: bytes, document: AnswerDocument) -> None:
        self.data += event
        self.has_output = self.has_output or document.has_output or document.finish_reason is not None
        self.text += document.text_bytes

    def piece(self) -> ResponsePart:
        return ResponsePart(bytes(self.data), self.has_output, self.text, self.usage)


def _render(event: bytes, document: AnswerDocument, request: EngineRequest) -> bytes:
    """The event as the client gets it: unchanged, unless the model is sold under another name."""
    if not _renamed(document.members, request):
        return event
    named = b"".join(line + b"\n" for line in event.splitlines() if line.startswith(b"event:"))
    return named + b"data: " + orjson.dumps(document.members) + b"\n\n"


def _renamed(document: dict[str, Any], request: EngineRequest) -> bool:
    """Replaces the engine's name of the model by the name that it is sold under. Returns whether the document changed."""
    changed = False
    for part in (document, document.get("response")):
        named = isinstance(part, dict) and ("model" in part or (part is document and request.is_completion))
        if request.rename is not None and isinstance(part, dict) and named and part.get("model") != request.rename[1]:
            part["model"] = request.rename[1]
            changed = True
    return changed


def _bounded_type(content_type: str) -> str:
    return content_type if len(content_type) <= 100 else "application/octet-stream"
