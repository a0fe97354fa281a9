"""An engine behind an OpenAI-compatible HTTP endpoint: vLLM, SGLang, llama.cpp, Ollama, a hosted API.

Redirects are never followed, so that the provider's API key reaches only the configured address. Faults have three classes:
*deterministic* (the client's request is wrong, and gets the engine's answer), *busy* (another provider may answer now) and
*broken* (down, misconfigured, or violating the protocol). Error texts quote nothing of requests and answers, because they travel
unsealed.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import structlog

from node.domain.requests import EngineRequest
from node.domain.upstream_models import UpstreamModel, read_models
from node.engines.addresses import base_addresses
from node.engines.api_key import auth_headers
from node.engines.bodies import read_on, read_start
from node.engines.engine_settings import EngineSettings
from node.engines.error_words import Censor, describe_type, error_body, read_document, words_of
from node.engines.framing import answer_form, as_document, as_stream
from node.engines.http_client import EngineClient
from node.engines.http_connection import EngineResponse, MalformedResponse
from node.engines.kinds import read_load
from node.engines.logprobs import rewrite, take_logprobs
from node.engines.scoring import ScoringRoute
from node.engines.streams import EngineBroken, StreamReader, rename_model
from node.ports import EngineEvent, EngineLoad, ResponseEnd, ResponsePart, ResponseStart
from tallystick.protocol.engine_errors import ANSWERED, BUSY, CLIENT_FAULTS, error_status
from tallystick.protocol.errors import Code, Fault, Unavailable, read_retry_after
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.openai_wire import EngineError, read_completion, read_other_answer
from tallystick.protocol.routes import EMBEDDINGS, JSON, MESSAGES, MODELS, RESPONSES, SCORES
from tallystick.protocol.sse import DONE, EVENT_STREAM, EventReader, MalformedAnswer, event_data

log = structlog.get_logger()
_DRAIN_SECONDS = 0.5
"""How long a stream that has ended may take to end its HTTP body. Nobody waits for it."""
_REFUSALS = CLIENT_FAULTS | {500}
"""Statuses with which engines refuse log-probabilities. llama.cpp answered 500 before 2025."""
_MAX_SHAPES = 256
_REFUSAL_SECONDS = 600.0
"""For how long a refusal of log-probabilities is remembered: it may have been another fault that passed meanwhile."""
_LOGPROBS_GROWTH = 4
"""How many times larger an answer with log-probabilities may be than one without: 500 bytes a token with llama.cpp."""


class OpenAIEngine:
    """One HTTP endpoint. Call `close` at the end. `clock` is monotonic, in seconds."""

    def __init__(self, settings: EngineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._settings = settings
        self._base, *self._other_bases = base_addresses(settings.url)
        self._censor = Censor.of(settings.url, settings.api_key)
        self._client = EngineClient(settings)
        self._has_metrics = True
        self._without_logprobs: dict[tuple[object, ...], float] = {}
        """Shapes of requests that the engine answers only without log-probabilities, and until when that is believed."""
        self._scoring = ScoringRoute(settings)

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()
        await self._scoring.close()

    async def models(self) -> tuple[UpstreamModel, ...]:
        """The models that the engine serves now; empty if it has no model list. Raises Unavailable."""
        settings = self._settings
        with self._faults():
            async with asyncio.timeout(settings.check_seconds):
                for base in (self._base, *self._other_bases):
                    with await self._get(base.route(MODELS)) as response:
                        if response.status in (404, 405):
                            continue
                        self._check_status(response.status)
                        models = read_models(await self._read_all(response, settings.max_answer_bytes))
                        self._base, self._other_bases = base, []
                        return models
        return ()

    async def load(self) -> EngineLoad | None:
        """See ports.Engine. Stops asking once the engine turns out to have no metrics."""
        settings = self._settings
        if not self._has_metrics:
            return None
        try:
            async with asyncio.timeout(settings.check_seconds):
                with await self._get(self._base.endpoint("/metrics")) as response:
                    return await self._read_load(response)
        except (EngineBroken, Unavailable, aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def _read_load(self, response: EngineResponse) -> EngineLoad | None:
        if response.status in (401, 403, 404, 405, 501):
            self._has_metrics = False
        if response.status != 200 or response.content_type != "text/plain":
            return None
        return read_load(await self._read_all(response, self._settings.max_answer_bytes))

    def answer(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        """See ports.Engine."""
        return self._score(request) if request.path == SCORES else self._ask(request)

    async def _score(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        with self._faults():
            async with aclosing(self._scoring.answer(request, self._base)) as events:
                async for event in events:
                    yield event

    async def _ask(self, request: EngineRequest) -> AsyncGenerator[EngineEvent, None]:
        accept = EVENT_STREAM if request.stream else JSON if request.is_completion or request.path == EMBEDDINGS else "*/*"
        headers = {"content-type": request.content_type, "accept": accept}
        if request.traceparent:
            headers["traceparent"] = request.traceparent
        with self._faults():
            request, posted = await self._post_with_logprobs(request, headers)
        with self._faults(), posted as response:
            if response.status not in ANSWERED:
                for event in await self._read_error(response):
                    yield event
                return
            start = await read_start(response)
            form = answer_form(response.content_type, start, request)
            if form is None:
                expected = EVENT_STREAM if request.stream else JSON
                raise EngineBroken(f"{describe_type(response.content_type)} instead of {expected}")
            if form == JSON:
                body = start + await self._read_all(response, self._settings.max_answer_bytes * _growth(request))
                for event in self._read_whole(body, request):
                    yield event
            elif form == EVENT_STREAM and not request.stream and _is_text(request):
                for event in await self._assemble(response, start, request):
                    yield event
            else:
                read = self._read_stream if form == EVENT_STREAM else self._read_bytes
                yield ResponseStart(200, _bounded_type(form))
                async with aclosing(read(response, start, request)) as events:
                    async for event in events:
                        yield event

    async def _read_error(self, response: EngineResponse) -> tuple[EngineEvent, ...]:
        """The engine's own error if it blames the request. Raises Unavailable if the engine is busy, and EngineBroken."""
        status, wait = response.status, read_wait(response.header("retry-after"))
        if status < 400:
            self._check_status(status, wait)
        try:
            body = await self._read_all(response, self._settings.max_error_bytes)
        except EngineBroken:
            if status in CLIENT_FAULTS:
                raise
            body = b""
        document = read_document(body)
        if status in CLIENT_FAULTS:
            # A status from 500 on would make clients send the same request again.
            return self._refusal(400 if status >= 500 else status, document, body)
        blamed = error_status(document) if status >= 500 and status not in BUSY else None
        if blamed is None or blamed in BUSY:
            self._check_status(blamed or status, wait, document)
        return self._refusal(400, document, body)

    def _refusal(self, status: int, document: Mapping[str, Any], body: bytes) -> tuple[EngineEvent, ...]:
        """The engine's refusal of a request, in its own words."""
        return ResponseStart(status, JSON), ResponseEnd(error_body(document, status, self._censor, body))

    def _own_error(self, error: EngineError) -> tuple[EngineEvent, ...]:
        """The engine's own error, which came instead of an answer. Raises it if it is a failure of the engine."""
        if error.blamed_status is None:
            raise error
        if error.blamed_status in BUSY:
            self._check_status(error.blamed_status, document=error.document)
        return self._refusal(error.blamed_status, error.document, b"")

    async def _read_bytes(
        self, response: EngineResponse, start: bytes, _request: EngineRequest
    ) -> AsyncGenerator[EngineEvent, None]:
        """Passes on a body that is neither JSON nor an event stream (speech, an image) as it comes."""
        size = 0
        async for data in read_on(response, start):
            size += len(data)
            if size > self._settings.max_answer_bytes:
                raise EngineBroken(f"an answer of more than {self._settings.max_answer_bytes} bytes")
            yield ResponsePart(data, has_output=True)
        yield ResponseEnd()

    async def _post_with_logprobs(self, request: EngineRequest, headers: dict[str, str]) -> tuple[EngineRequest, EngineResponse]:
        """Posts a request. An engine that refuses it with log-probabilities is asked without them, and later requests of the same
        shape as well. Returns also the request that was answered.
        """
        if request.logprobs is None or not request.logprobs.adds:
            return request, await self._post(request, headers)
        plain = request.without_logprobs()
        if self._without_logprobs.get(request.shape, 0.0) > self._clock():
            return plain, await self._post(plain, headers)
        response = await self._post(request, headers)
        if response.status not in _REFUSALS:
            return request, response
        response.release()
        response = await self._post(plain, headers)
        if response.status in ANSWERED and (len(self._without_logprobs) < _MAX_SHAPES or request.shape in self._without_logprobs):
            self._without_logprobs[request.shape] = self._clock() + _REFUSAL_SECONDS
            log.info("the engine refuses log-probabilities; such requests go without", url=self._settings.url, route=request.path)
        return plain, response

    async def _post(self, request: EngineRequest, headers: dict[str, str]) -> EngineResponse:
        """Posts a request to the first meaning of the base URL that has its route, until one is known to be meant."""
        for base in (bases := (self._base, *self._other_bases)):
            address, auth = base.route(request.path), auth_headers(self._settings.api_key)
            response = await self._client.send("POST", address, headers | auth, request.body, request.on_sent)
            if response.status < 400:
                self._base, self._other_bases = base, []
            if response.status not in (404, 405) or base is bases[-1]:
                break
            response.release()
        return response

    async def _read_stream(
        self, response: EngineResponse, start: bytes, request: EngineRequest
    ) -> AsyncGenerator[EngineEvent, None]:
        """Yields one ResponsePart for the events that each read completed. The last event is part of ResponseEnd.

        An error of the engine before any output yields a new ResponseStart.
        """
        stream = StreamReader(request, self._settings.max_event_bytes * _growth(request))
        try:
            data = start
            while data or (data := await response.readany()):
                part, data = stream.feed(data), b""
                if part is not None:
                    yield part
                if stream.ended:
                    response.finish_soon(_DRAIN_SECONDS)
                    break
            for last in stream.finish():
                yield last
        except EngineError as error:
            if stream.has_output:
                raise
            for own in self._own_error(error):
                yield own

    async def _assemble(self, response: EngineResponse, start: bytes, request: EngineRequest) -> tuple[EngineEvent, ...]:
        """Reads an event stream to its end, and returns it as the one document that the client asked for."""
        body, text_bytes, end, head = bytearray(), 0, ResponseEnd(), ResponseStart(200, JSON)
        async with aclosing(self._read_stream(response, start, request)) as events:
            async for event in events:
                if isinstance(event, ResponseStart):
                    head, body = event, bytearray()
                    continue
                body += event.data if isinstance(event, ResponsePart) else event.tail
                text_bytes += event.text_bytes
                end = event if isinstance(event, ResponseEnd) else end
                if len(body) > self._settings.max_answer_bytes:
                    raise EngineBroken(f"an answer of more than {self._settings.max_answer_bytes} bytes")
        if head.status != 200:
            return head, end
        payloads = map(event_data, EventReader(len(body)).feed(bytes(body)))
        documents = (load_lenient(payload) for payload in payloads if payload and payload != DONE)
        document = as_document((entry for entry in documents if isinstance(entry, dict)), request)
        if document is None:
            raise EngineBroken("an event stream instead of a document")
        rename_model(document, request)
        return head, ResponseEnd(dump_lenient(document), text_bytes, end.usage, truncated=end.truncated)

    def _read_whole(self, body: bytes, request: EngineRequest) -> tuple[EngineEvent, ...]:
        try:
            document = read_completion(body) if request.is_completion or request.path == EMBEDDINGS else read_other_answer(body)
        except EngineError as error:
            return self._own_error(error)
        finished = not request.is_completion or document.finish_reason or (document.finish_reason is None and document.has_output)
        if not finished:
            raise EngineBroken("an answer without any choice that ended")
        changes = take_logprobs(document.members, request.logprobs, request.rows) if request.logprobs else ()
        renamed = rename_model(document.members, request)
        body = dump_lenient(document.members) if renamed else rewrite(body, document.members, changes)
        kind = JSON
        if request.stream:
            body, kind = as_stream(document.members, request), EVENT_STREAM
        end = ResponseEnd(body, document.text_bytes, document.usage, truncated=document.finish_reason == "length")
        return ResponseStart(200, kind), end

    async def _read_all(self, response: EngineResponse, limit: int) -> bytes:
        body = bytearray()
        while data := await response.readany():
            body += data
            if len(body) > limit:
                raise EngineBroken(f"an answer of more than {limit} bytes")
        return bytes(body)

    def _check_status(self, status: int, wait: int | None = None, document: Mapping[str, Any] | None = None) -> None:
        """Raises Unavailable if the engine is busy, EngineBroken for other statuses than 200, with the words of `document`."""
        words = words_of(document, self._censor) if document is not None else ""
        if status in BUSY:
            busy = Unavailable(Code.NODE_BUSY, f"the engine is busy ({status})", fault=Fault.ENGINE)
            busy.retry_after, busy.private_reason = wait, words or None
            raise busy
        if 300 <= status < 400:
            raise EngineBroken(f"a redirect ({status}), which is never followed")
        if status in (401, 402, 403):  # its words may quote the key
            reason = "it refuses to serve the provider's account" if status == 402 else "it refuses the provider's API key"
            raise EngineBroken(f"the status {status}: {reason}", permanent=True)
        if status in (404, 410):
            text = f"the status {status}: it does not have this model or this route"
            raise EngineBroken(text, words, permanent=True)
        if status not in ANSWERED:
            raise EngineBroken(f"the status {status}", words)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Raises Unavailable, with the engine's fault, for everything that goes wrong with the engine.

        Its text quotes nothing. The engine's own words are its `private_reason`.
        """
        words, permanent = "", False
        try:
            yield
        except EngineBroken as error:
            text, words, permanent = f"the engine answered with {error}", error.words, error.permanent
        except EngineError as error:
            text, words = "the engine reported a failure instead of an answer", words_of(error.document, self._censor)
        except MalformedAnswer as error:
            text = f"the engine's answer is malformed: {error}"
        except MalformedResponse as error:
            text = f"the engine answered with {error}"
        except aiohttp.ClientPayloadError:
            text = "the engine's answer broke off"
        except (aiohttp.ClientError, OSError) as error:
            text = f"the engine cannot be reached: {_cause(error)}"
        else:
            return
        log.warning("engine fault", engine=self._settings.url, fault=text)
        unavailable = Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.ENGINE)
        unavailable.retry, unavailable.private_reason = not permanent, words or None
        raise unavailable

    async def _get(self, address: str) -> EngineResponse:
        """Sends a GET request with the API key. Raises Unavailable if the key cannot be read."""
        return await self._client.send("GET", address, auth_headers(self._settings.api_key))


def read_wait(header: str) -> int | None:
    """The seconds in a Retry-After header (RFC 9110, section 10.2.3), which is a number or a date; None if it says neither."""
    try:
        return read_retry_after(math.ceil(float(header)))
    except (ValueError, OverflowError):
        pass
    try:
        return read_retry_after(math.ceil(parsedate_to_datetime(header).timestamp() - time.time()))
    except (ValueError, TypeError, OverflowError):
        return None


def _cause(error: Exception) -> str:
    """Why a connection failed, without its address, which only the provider may see."""
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, socket.gaierror):
        return "its host name has no address"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not trusted"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return "it closed the connection" if isinstance(error, aiohttp.ServerDisconnectedError) else type(error).__name__


def _growth(request: EngineRequest) -> int:
    return 1 if request.logprobs is None else _LOGPROBS_GROWTH


def _is_text(request: EngineRequest) -> bool:
    return request.is_completion or request.path in (RESPONSES, MESSAGES)


def _bounded_type(content_type: str) -> str:
    return content_type if len(content_type) <= 100 else "application/octet-stream"
