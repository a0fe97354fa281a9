"""Sends the gateway's answers: whole ones, streams, cached ones and errors, in the form that the caller's API has."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog
from starlette.types import Scope, Send

from tallystick.client.dialects.dialect import ErrorFormat, Translation
from tallystick.client.dialects.registry import errors_of
from tallystick.client.gateway.attempts import Attempts
from tallystick.client.gateway.early_stream import STREAM_HEADERS, EarlyStream, telling_place
from tallystick.client.gateway.request_headers import headers_of
from tallystick.client.gateway.response_cache import MAX_CACHED_BYTES, CachedResponse, ResponseCache
from tallystick.client.jobs.job import Job, arrivals_of
from tallystick.client.jobs.result import Result
from tallystick.client.jobs.running_job import Outlet
from tallystick.client.ledger.upstream_spending import UPSTREAM_PREFIX
from tallystick.client.openai.errors import ErrorResponse
from tallystick.client.upstreams.caller import UpstreamAnswer
from tallystick.protocol.errors import TallyError
from tallystick.protocol.messages import Outcome, Terms
from tallystick.protocol.plaintext_heads import ResponseHead
from tallystick.protocol.pricing import usage_of
from tallystick.protocol.routes import JSON
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.types import Address, Amount, JobId, format_amount
from tallystick.runtime.access_log import record
from tallystick.runtime.http_direct import DirectRequest

log = structlog.get_logger()
TALLY_HEADERS = (
    "x-request-id",
    "x-tally-job",
    "x-tally-provider",
    "x-tally-upstream",
    "x-tally-cost",
    "x-tally-prices",
    "x-tally-receipt",
    "x-tally-cache",
    "x-tally-escalated",
    "x-tally-at-stake",
    "x-tally-queue-position",
    "x-tally-queue-wait",
)
"""The headers that the gateway adds to answers."""
ERROR_HEADERS = ("retry-after", "x-should-retry", "request-id", "accept-encoding")
"""Further headers that clients read: of errors, and Anthropic's id of a request."""
NO_RECEIPT = "none"
"""Value of x-tally-receipt for an answer of an upstream."""
RECEIPT_OUTSTANDING = "outstanding"
"""Value of x-tally-receipt if the whole answer came before its receipt. x-tally-cost is then the most that it may cost."""


class ResponseSender:
    """Sends an answer to the caller, and caches it under `cache_name` if it has one.

    `errors`: the form of errors in the caller's API. `translations`: for each job that was submitted, what its answer has to be
    translated with; None if its request was sent as it came.
    """

    def __init__(
        self, send: EarlyStream, errors: ErrorFormat, cache: ResponseCache | None, cache_name: str | None, attempts: Attempts
    ) -> None:
        self._send, self._errors, self._cache, self.cache_name, self.attempts = send, errors, cache, cache_name, attempts
        self.translations: dict[JobId, Translation | None] = {}
        self._rejected: tuple[UpstreamAnswer, bytes, Translation | None] | None = None

    def telling_place(self, job: Job) -> contextlib.AbstractAsyncContextManager[None]:
        """Tells a caller that wants a stream the place of its job, while the job waits for a free slot."""
        if not job.streams:
            return contextlib.nullcontext()
        headers = dict(STREAM_HEADERS) | _id_headers(self._errors, job.id)
        return telling_place(self._send, job, lambda: headers | self._cache_headers() | self.attempts.headers())

    async def send_result(self, result: Result, rejected: Sequence[Result]) -> None:
        """Sends a whole answer. `rejected`: earlier answers of other models, which are paid for too.

        Raises BadMessage, the engine's fault, for an answer that cannot be translated.
        """
        content_type, body = self._translated(result)
        cost = total_cost([result, *rejected]) if rejected else result.highest_cost
        headers = {
            "content-type": content_type,
            **_id_headers(self._errors, result.job),
            "x-tally-provider": result.provider,
            "x-tally-cost": str(cost),
            "x-tally-receipt": RECEIPT_OUTSTANDING if result.receipt is None else "0x" + result.receipt.digest.hex(),
            "x-tally-prices": _prices(result.terms),
        }
        _record_job(result.job, result.provider, result.terms.model, cost, result.outcome)
        if rejected:
            entries = (f"{r.terms.model}; job={r.job.hex()}; cost={int(r.highest_cost)}" for r in rejected)
            headers["x-tally-escalated"] = ", ".join(entries)
        headers |= self.attempts.headers()
        await self._store(result, content_type, body)  # before sending: a caller that has the answer may ask again at once
        await _send_whole(self._send, result.head.status, headers | self._cache_headers(), body)

    def _translated(self, result: Result) -> tuple[str, bytes]:
        """The content type and the body of a result as the caller's API has them."""
        translation, job = self.translations.get(result.job), result.job.hex()
        if result.head.status >= 400:
            body = self._errors.engine_error(result.head.status, result.body, request_id=job)
            return result.head.content_type if body == result.body else JSON, body
        if translation is None:
            return result.head.content_type, result.body
        billed = None if result.receipt is None else result.usage
        if translation.stream:  # an engine that does not stream
            stream = translation.open_stream(job=job)
            return EVENT_STREAM, stream.feed(_as_event(result.body)) + stream.finish(billed)
        return JSON, translation.answer(result.body, job=job, billed=billed)

    async def send_stream(
        self, job: Job, head: ResponseHead, *, keyed: bool, possible_cost: Callable[[JobId], Awaitable[Amount]]
    ) -> None:
        """Sends an event stream chunk by chunk. If the job fails on the way, the last event is its error."""
        headers = {"content-type": head.content_type, **STREAM_HEADERS}
        headers |= _id_headers(self._errors, job.id) | _job_headers(job) | self._cache_headers() | self.attempts.headers()
        await _send_head(self._send, head.status, headers)
        translation = self.translations.get(job.id)
        stream = None if translation is None else translation.open_stream(job=job.id.hex())
        sent = _SentBytes(self._send.begun, keep=self.cache_name is not None)
        try:
            async for chunk in arrivals_of(job, sent.outlet if stream is None else None):
                await sent.add(chunk if stream is None else stream.feed(chunk))
            if stream is not None:
                await sent.add(stream.finish(usage_of(job.receipt.message) if job.receipt is not None else None))
        except TallyError as error:
            log.warning("stream ended with an error", job=job.id.hex(), code=error.code.value, reason=error.public_text)
            self.attempts.record_failure(job, error, await possible_cost(job.id))
            retry = self.attempts.may_retry(error, keyed=keyed)
            event = self._errors.render_error_event(error, request_id=job.id.hex(), retry=retry)
            record(fault=error.fault.value)
            if stream is None or not stream.failed:  # one error ends a stream
                await sent.add(sent.gap + event)
        receipt = None if job.receipt is None else job.receipt.message
        terms = next((candidate.terms for candidate in job.candidates if candidate.provider == job.provider), None)
        model, outcome = "" if terms is None else terms.model, None if receipt is None else Outcome(receipt.outcome)
        _record_job(job.id, job.provider or "", model, None if receipt is None else receipt.cost, outcome)
        if job.receipt_accepted and sent.kept is not None and not (stream is not None and stream.failed):
            await self._store(await job.result(), head.content_type, sent.kept)
        await self.end_stream()

    async def send_upstream(self, answer: UpstreamAnswer, body: bytes, translation: Translation | None) -> None:
        """Sends a whole answer of an upstream, which nobody sealed or signed. Raises BadMessage if it cannot be translated."""
        content_type, cost = answer.content_type, answer.cost + total_cost(self.attempts.results) + self.attempts.upstream_cost
        if answer.status >= 400:
            body = self._errors.engine_error(answer.status, body, request_id=answer.id)
        elif translation is not None and translation.stream:  # an API that does not stream
            stream = translation.open_stream(job=answer.id)
            content_type, body = EVENT_STREAM, stream.feed(_as_event(body)) + stream.finish(answer.usage)
        elif translation is not None:
            content_type, body = JSON, translation.answer(body, job=answer.id, billed=answer.usage)
        headers = {"content-type": content_type, **self._upstream_headers(answer), "x-tally-cost": str(int(cost))}
        if self._cache is not None and self.cache_name is not None and answer.complete and answer.status == 200:
            provider = Address(UPSTREAM_PREFIX + answer.target.upstream)
            cached = CachedResponse(content_type, body, answer.id, provider, str(answer.target), answer.cost, NO_RECEIPT)
            await self._cache.put(self.cache_name, cached)
        await _send_whole(self._send, answer.status, headers | self._cache_headers(), body)

    @property
    def has_rejected(self) -> bool:
        """Whether there is an answer that was paid for and not accepted."""
        return bool(self.attempts.results) or self._rejected is not None

    def keep_rejected(self, answer: UpstreamAnswer, body: bytes, translation: Translation | None) -> None:
        """Keeps an answer of an upstream that was not accepted, in case that no other model answers."""
        self._rejected, self.cache_name = (answer, body, translation), None

    async def send_rejected(self) -> None:
        """Sends the last answer that was not accepted, if there is one."""
        results = self.attempts.results
        if results:
            await self.send_result(results[-1], results[:-1])
        elif self._rejected is not None:
            answer, body, translation = self._rejected
            self.attempts.upstream_cost = Amount(self.attempts.upstream_cost - answer.cost)
            await self.send_upstream(answer, body, translation)

    async def send_upstream_stream(self, answer: UpstreamAnswer, translation: Translation | None) -> None:
        """Sends the event stream of an upstream. If it fails on the way, the last event is its error. `end_stream` follows."""
        headers = {"content-type": answer.content_type, **STREAM_HEADERS, **self._upstream_headers(answer)}
        await _send_head(self._send, answer.status, headers)
        stream = None if translation is None else translation.open_stream(job=answer.id)
        sent = _SentBytes(self._send.begun, keep=False)
        try:
            async for event in answer.events():
                await sent.add(event if stream is None else stream.feed(event))
            if stream is not None:
                await sent.add(stream.finish(answer.usage))
        except TallyError as error:
            log.warning("stream of an upstream ended with an error", upstream=str(answer.target), reason=error.public_text)
            if stream is None or not stream.failed:
                await sent.add(sent.gap + self._errors.render_error_event(error, request_id=answer.id, retry=False))

    async def end_stream(self) -> None:
        """Tells the caller that nothing follows."""
        await self._send({"type": "http.response.body", "body": b""})

    def _upstream_headers(self, answer: UpstreamAnswer) -> dict[str, str]:
        ids = {self._errors.id_header: answer.id, "x-request-id": answer.id}
        return ids | {"x-tally-upstream": answer.target.upstream, "x-tally-receipt": NO_RECEIPT} | self.attempts.headers()

    def _cache_headers(self) -> dict[str, str]:
        return {} if self.cache_name is None else {"x-tally-cache": "miss"}

    async def _store(self, result: Result, content_type: str, body: bytes) -> None:
        if self._cache is None or self.cache_name is None or result.head.status != 200:
            return
        if result.receipt is not None and result.outcome in (Outcome.COMPLETED, Outcome.LENGTH):
            response = CachedResponse(
                content_type=content_type,
                body=body,
                job=result.job.hex(),
                provider=result.provider,
                model=result.terms.model,
                cost=result.cost,
                receipt="0x" + result.receipt.digest.hex(),
            )
            await self._cache.put(self.cache_name, response)


class _SentBytes:
    """Sends the bytes of a stream, and keeps them for the cache while they are few enough. `kept` is None for too many."""

    def __init__(self, send: Send, *, keep: bool) -> None:
        self._send, self._parts, self._size, self._keep, self._tail = send, list[bytes](), 0, keep, b"\n\n"
        self._direct = send if isinstance(send, DirectRequest) else None

    @property
    def gap(self) -> bytes:
        """What has to come before a further event."""
        return b"" if self._tail == b"\n\n" else b"\n\n"

    @property
    def kept(self) -> bytes | None:
        return b"".join(self._parts) if self._keep and self._size <= MAX_CACHED_BYTES else None

    @property
    def outlet(self) -> Outlet | None:
        """What sends parts without a turn of the event loop; None if the answer goes by ASGI."""
        direct = self._direct
        return None if direct is None else Outlet(lambda: direct.ready, self._put)

    def _put(self, data: bytes) -> None:
        self._note(data)
        if self._direct is not None:
            self._direct.send_now(data)

    def _note(self, data: bytes) -> None:
        self._tail = data[-2:] if len(data) > 1 else (self._tail + data)[-2:]
        self._size += len(data)
        if self._keep and self._size <= MAX_CACHED_BYTES:
            self._parts.append(data)

    async def add(self, data: bytes) -> None:
        if not data:
            return
        self._note(data)
        if self._direct is not None:
            await self._direct.send(data)
        else:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})


def _as_event(document: bytes) -> bytes:
    """A JSON document as the only event of a stream."""
    return b"data: " + b" ".join(document.splitlines()) + b"\n\n"


def total_cost(results: Sequence[Result]) -> Amount:
    """The most that these results cost together, in base units."""
    return Amount(sum(result.highest_cost for result in results))


def error_format(scope: Scope) -> ErrorFormat:
    """The form of errors in the API of a request: by its route, or by the header that only one API's clients send."""
    return errors_of(scope["path"], headers_of(scope))


def _id_headers(errors: ErrorFormat, job: JobId) -> dict[str, str]:
    return {errors.id_header: job.hex(), "x-request-id": job.hex(), "x-tally-job": job.hex()}


def _job_headers(job: Job) -> dict[str, str]:
    headers = {"x-tally-provider": job.provider or ""}
    terms = next((candidate.terms for candidate in job.candidates if candidate.provider == job.provider), None)
    return headers if terms is None else headers | {"x-tally-prices": _prices(terms)}


def _record_job(job: JobId, provider: str, model: str, cost: Amount | None, outcome: Outcome | None) -> None:
    """Adds a job to the request's line in the log; without a receipt, cost and outcome are not known."""
    fields = {"job": job.hex(), "model": model, "provider": provider}
    if cost is not None:
        fields["cost"] = format_amount(cost)
    if outcome is not None:
        fields["outcome"] = outcome.name.lower()
    record(**fields)


def _prices(terms: Terms) -> str:
    """The prices of an order, in base units per 1,000,000 tokens."""
    return f"input={terms.input_price}, cached={terms.cached_input_price}, output={terms.output_price}"


async def _send_head(send: Send, status: int, headers: Mapping[str, str]) -> None:
    target = send.begun if isinstance(send, EarlyStream) else send
    if isinstance(target, DirectRequest):
        await target.begin(status, headers)
        return
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send_whole(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    target = send.begun if isinstance(send, EarlyStream) else send
    if isinstance(target, DirectRequest):
        await target.respond(status, headers, body)
        return
    await _send_head(send, status, {**headers, "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body})


async def send_cached(scope: Scope, send: Send, cached: CachedResponse) -> None:
    """Sends an answer from the cache."""
    record(job=cached.job, model=cached.model, provider=cached.provider, cost="0", outcome="cached")
    headers = {
        "content-type": cached.content_type,
        error_format(scope).id_header: cached.job,
        "x-request-id": cached.job,
        "x-tally-job": cached.job,
        "x-tally-provider": cached.provider,
        "x-tally-cost": "0",
        "x-tally-receipt": cached.receipt,
        "x-tally-cache": "hit",
    }
    await _send_whole(send, 200, headers, cached.body)


async def send_json(send: Send, body: bytes) -> None:
    """Sends an answer that the gateway gives by itself."""
    await _send_whole(send, 200, {"content-type": JSON}, body)


async def send_error(
    scope: Scope, send: Send, error: TallyError, headers: Mapping[str, str] | None = None, *, retry: bool | None = None
) -> None:
    """Sends an error in the form of the caller's API. `retry`: see `render_error`."""
    response = error_response(scope, error, retry=retry)
    await _send_whole(send, response.status, response.headers | dict(headers or {}), response.body)


def error_response(scope: Scope, error: TallyError, *, retry: bool | None = None) -> ErrorResponse:
    """An error in the form of the caller's API, with an id by which the log has it too. `retry`: see `render_error`."""
    errors, request_id = error_format(scope), f"req_{secrets.token_hex(12)}"
    response = errors.render_error(error, request_id=request_id, retry=retry)
    record(outcome=error.code.value, fault=error.fault.value)
    log.info("request refused", status=response.status, code=error.code.value, reason=error.public_text, request=request_id)
    headers = {"content-type": JSON, errors.id_header: request_id, "x-request-id": request_id} | response.headers
    return ErrorResponse(response.status, response.body, headers)
