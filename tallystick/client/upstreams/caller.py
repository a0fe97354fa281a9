"""Calls an upstream: books the request, sends it, meters the answer, and books what it cost."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import aiohttp
import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.upstream_spending import UpstreamBooking
from tallystick.client.openai.errors import error_words
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.client.upstreams.metering import AnswerMeter
from tallystick.client.upstreams.requests import UpstreamRequest
from tallystick.protocol.engine_errors import BUSY
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable, read_retry_after
from tallystick.protocol.pricing import Usage
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.routes import JSON, media_type
from tallystick.protocol.sse import EVENT_STREAM, EventReader, MalformedAnswer, event_data
from tallystick.protocol.types import Amount

log = structlog.get_logger()
MAX_EVENT_BYTES = 16 << 20
_MAX_ERROR_BYTES = 64 << 10
_OF_THE_REQUEST = frozenset({400, 404, 405, 409, 411, 413, 414, 415, 422, 451})
"""Statuses with which an upstream blames the request. Its answer then reaches the caller."""


@dataclass(slots=True)
class UpstreamAnswer:
    """An answer of an upstream. `id`: names it in logs and headers, since no receipt does."""

    request: UpstreamRequest
    status: int
    content_type: str
    meter: AnswerMeter
    _response: aiohttp.ClientResponse = field(repr=False)
    _limit: int
    _key: str | None = field(default=None, repr=False)
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    complete: bool = False
    _reader: EventReader = field(default_factory=lambda: EventReader(MAX_EVENT_BYTES), repr=False)
    _first: list[bytes] = field(default_factory=list, repr=False)
    _whole: bytes | None = field(default=None, repr=False)

    @property
    def target(self) -> UpstreamTarget:
        """The upstream and the model that answered."""
        return self.request.target

    @property
    def is_stream(self) -> bool:
        """Whether it comes as events."""
        return media_type(self.content_type) == EVENT_STREAM

    @property
    def cost(self) -> Amount:
        """What it costs by the prices of the config, in base units."""
        return Amount(0) if self.status >= 400 else self.meter.cost(self.request.model)

    @property
    def usage(self) -> Usage:
        """Its tokens so far."""
        return Usage(0, 0, 0) if self.status >= 400 else self.meter.usage

    async def body(self) -> bytes:
        """The whole body. Raises Unavailable, also for a failure with status 200 and for too many bytes (max_answer_bytes)."""
        data = b"".join([part async for part in self._parts()]) if self._whole is None else self._whole
        if media_type(self.content_type) == JSON:
            self.meter.add(data)
            self._check_error(data)
        self.complete = not self.meter.failed
        return data if self.status < 400 else _without_key(data, self._key)

    async def open_stream(self) -> None:
        """Reads the first events of a stream. Raises Unavailable if they report a failure, or if there are none."""
        async for part in self._parts():
            self._first += self._read(part)
            if self._first:
                break
        for event in self._first:
            payload = event_data(event)
            if payload:
                self._check_error(payload, AnswerMeter(self.request.path, 0))
            if payload and self.status >= 400:
                self.content_type, self._whole = JSON, payload
                return

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream, without a usage event that the caller did not ask for. Raises Unavailable if it breaks off."""
        for event in self._first:
            if self._passes(event):
                yield event
        async for part in self._parts():
            for event in self._read(part):
                if self._passes(event):
                    yield event
        last = self._reader.finish()
        if last is not None and self._passes(last):
            yield last
        self.complete = self.meter.finished and not self.meter.failed
        if not (self.meter.finished or self.meter.failed):
            raise _unavailable(self.target, "ended its stream before the answer was complete")

    def _read(self, part: bytes) -> list[bytes]:
        try:
            return list(self._reader.feed(part))
        except MalformedAnswer as error:
            raise _unavailable(self.target, f"sent a malformed stream: {error}") from None

    def _check_error(self, data: bytes, meter: AnswerMeter | None = None) -> None:
        """Raises Unavailable for a document that reports a failure; an error of the request becomes the answer's status."""
        if meter is not None:
            meter.add(data)
        error = (meter or self.meter).error
        if error is None or self.status >= 400:
            return
        if error.blamed_status is None or error.blamed_status in BUSY:
            raise _unavailable(self.target, "reported a failure", error_words(_without_key(data, self._key)))
        self.status = error.blamed_status

    def _passes(self, event: bytes) -> bool:
        payload = event_data(event)
        return not (payload and self.meter.add(payload) and self.request.strip_usage)

    async def _parts(self) -> AsyncIterator[bytes]:
        size = 0
        try:
            while part := await self._response.content.readany():
                size += len(part)
                if size > self._limit and not self.is_stream:
                    raise _unavailable(self.target, f"sent more than {self._limit} bytes (max_answer_bytes)")
                yield part
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unavailable(self.target, f"broke off its answer: {type(error).__name__}") from None


class UpstreamCaller:
    """Calls the upstreams of a config, for one wallet's ledger. `now` is Unix time in seconds."""

    def __init__(self, config: ClientConfig, ledger: Ledger, now: Callable[[], int]) -> None:
        self._config, self._ledger, self._now = config, ledger, now
        self._upstreams = {upstream.name: upstream for upstream in config.upstreams}

    def prepare(self, target: UpstreamTarget, path: str, body: bytes, max_cost: Amount | None) -> UpstreamRequest:
        """Prepares a JSON request. `max_cost`: in base units. Raises BadMessage and Refusal; see `UpstreamRequest.of`."""
        upstream = self._upstreams.get(target.upstream)
        if upstream is None:
            raise BadMessage(f"{target}: expected an upstream of the config")
        return UpstreamRequest.of(upstream, target, path, body, max_cost)

    @contextlib.asynccontextmanager
    async def call(self, request: UpstreamRequest, label: str) -> AsyncIterator[UpstreamAnswer]:
        """Sends a request; the answer is to be read inside the block. Afterwards its cost is booked, whatever happened.

        Raises Refusal (over_budget), and Unavailable (upstream_unavailable) if there is no answer.
        """
        key = _read_key(request)
        booking = UpstreamBooking(request.target, label, self._now(), request.most)
        await self._ledger.reserve_upstream(booking, self._config.budgets)
        answer: UpstreamAnswer | None = None
        try:
            async with self._post(request, key) as answer:
                yield answer
        finally:
            await asyncio.shield(self._settle(booking, answer))

    async def _settle(self, booking: UpstreamBooking, answer: UpstreamAnswer | None) -> None:
        usage = Usage(0, 0, 0) if answer is None else answer.usage
        cost = Amount(0) if answer is None else answer.cost
        failed = answer is None or answer.status >= 400 or not answer.complete
        await self._ledger.settle_upstream(booking, cost, usage, failed=failed)
        log.info(
            "upstream request ended",
            upstream=str(booking.target),
            status=None if answer is None else answer.status,
            cost=int(cost),
            failed=failed,
        )

    @contextlib.asynccontextmanager
    async def _post(self, request: UpstreamRequest, key: str | None) -> AsyncIterator[UpstreamAnswer]:
        timeout = aiohttp.ClientTimeout(total=request.upstream.timeout_seconds, sock_connect=self._config.connect_seconds)
        headers = {"content-type": JSON, "accept": EVENT_STREAM if request.summary.stream else "*/*"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        session = aiohttp.ClientSession(
            timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), trust_env=uses_proxy(request.upstream.url)
        )
        async with session:
            try:
                posting = session.post(request.url, data=request.body, headers=headers, allow_redirects=False)
                response = await posting
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise _unavailable(request.target, f"cannot be reached: {type(error).__name__}") from None
            async with response:
                if response.status != 200 and response.status not in _OF_THE_REQUEST:
                    raise await _failure(request, response, key)
                kind = response.headers.get("content-type", JSON)[:100]
                meter = AnswerMeter(request.path, len(request.body))
                answer = UpstreamAnswer(request, response.status, kind, meter, response, self._config.max_answer_bytes, key)
                if answer.is_stream:
                    await answer.open_stream()
                yield answer


def _read_key(request: UpstreamRequest) -> str | None:
    try:
        return request.upstream.read_key()
    except BadMessage as error:
        raise Refusal(Code.UPSTREAM_UNAVAILABLE, str(error), fault=Fault.CLIENT) from None


async def _failure(request: UpstreamRequest, response: aiohttp.ClientResponse, key: str | None) -> Unavailable:
    """The error for an answer that says that the upstream cannot serve now, in its own words."""
    status = response.status
    if 300 <= status < 400:
        error = _unavailable(request.target, f"redirects ({status}), which is never followed")
        error.retry = False
        return error
    if status in (401, 402, 403):
        error = _unavailable(request.target, f"refuses its API key or account ({status}); check key_env or key_file")
        error.retry = False
        return error
    try:
        body = await response.content.read(_MAX_ERROR_BYTES)
    except (aiohttp.ClientError, TimeoutError, OSError):
        body = b""
    error = _unavailable(request.target, f"answered {status}", error_words(_without_key(body, key)))
    error.retry_after = _read_wait(response.headers.get("retry-after", ""))
    return error


def _without_key(words: bytes, key: str | None) -> bytes:
    """An upstream's words without the API key, which callers of the gateway must not learn."""
    return words if key is None else words.replace(key.encode(), b"[redacted]")


def _read_wait(header: str) -> int | None:
    try:
        return read_retry_after(math.ceil(float(header)))
    except (ValueError, OverflowError):
        return None


def _unavailable(target: UpstreamTarget, text: str, words: str = "") -> Unavailable:
    error = Unavailable(Code.UPSTREAM_UNAVAILABLE, f"{target} {text}", fault=Fault.ENGINE)
    error.opened_reason = words or None  # may quote the request, so it is not logged
    return error
