"""The gateway's OpenAI routes, as raw ASGI: one request is one job, or several in turn if an alias stands for several models."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.gateway.aliases import AliasRouter, RoutingPlan, weight_draw
from tallystick.client.gateway.attempts import Attempts
from tallystick.client.gateway.auth import CALLER_KEY
from tallystick.client.gateway.request_bodies import ClientStalled, RequestBodies, with_send_timeout
from tallystick.client.gateway.response_cache import MAX_CACHED_BYTES, CachedResponse, ResponseCache
from tallystick.client.gateway.routing_rules import load_rule
from tallystick.client.jobs.job import Job
from tallystick.client.jobs.result import Result
from tallystick.client.ledger.idempotency import fingerprint, scope_key
from tallystick.client.ledger.spending import CacheHit
from tallystick.client.openai.errors import render_error, render_error_event
from tallystick.client.openai.requests import strip_bom
from tallystick.client.recovery.lost_state import TabRecovered
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.sdk.market import Market, maintenance_of
from tallystick.client.selection.options import (
    HEADER,
    GatewayOptions,
    RequestOptions,
    demand_of,
    read_options,
    restrict_to_key,
    smallest_limit,
)
from tallystick.protocol.errors import BadMessage, Code, TallyError
from tallystick.protocol.messages import Outcome, Terms
from tallystick.protocol.routes import FORM, JSON, media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.types import Amount, JobId
from tallystick.protocol.wire import RequestHead, ResponseHead, join_request
from tallystick.runtime.content_encoding import read_codings

log = structlog.get_logger()
TALLY_HEADERS = (
    "x-request-id",
    "x-tally-job",
    "x-tally-provider",
    "x-tally-cost",
    "x-tally-prices",
    "x-tally-receipt",
    "x-tally-cache",
    "x-tally-escalated",
    "x-tally-at-stake",
)
"""The headers that the gateway adds to answers."""
RECEIPT_OUTSTANDING = "outstanding"
"""Value of x-tally-receipt if the whole answer came before its receipt. x-tally-cost is then the most that it may cost."""


@dataclass(frozen=True, slots=True)
class _GatewayRequest:
    """One request of a caller: its route, its body, and what its headers say."""

    path: str
    body: bytes = field(repr=False)
    content_type: str
    key: str | None
    options: RequestOptions
    extras: GatewayOptions
    caller: ApiKey | None

    @classmethod
    def of(cls, scope: Scope, body: bytes, config: ClientConfig) -> _GatewayRequest:
        """Reads the headers. Every body that is not declared as a form counts as JSON, as with OpenAI's own servers.

        Raises BadMessage, or Refusal if the caller's key does not allow the request.
        """
        headers = Headers(scope=scope)
        content_type = headers.get("content-type", "")
        content_type = content_type if media_type(content_type) == FORM else JSON
        caller: ApiKey | None = scope.get(CALLER_KEY)
        key = headers.get("idempotency-key")
        options, extras = read_options(headers.get(HEADER))
        return cls(
            scope["path"],
            strip_bom(body) if content_type == JSON else body,
            content_type,
            key if caller is None or key is None else scope_key(caller.label, key),
            restrict_to_key(config, caller, options),
            extras,
            caller,
        )


class RequestHandler:
    """ASGI app that answers requests to OpenAI's routes, from the body to the last byte of the answer."""

    def __init__(self, market: Market) -> None:
        """Raises BadMessage for routing rules that cannot be loaded."""
        self._market = market
        aliases = market.config.aliases
        self._aliases = AliasRouter(aliases, {alias.name: load_rule(alias.rule) for alias in aliases if alias.rule is not None})
        self._cache = ResponseCache.of(market.config, market.wallet)
        self._bodies = RequestBodies(market.config.max_body_bytes, market.config.max_total_body_bytes)

    @property
    def _maintenance(self) -> Maintenance:
        return maintenance_of(self._market)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the job until its answer is sent or its caller has disconnected."""
        send = with_send_timeout(send)
        try:
            codings = read_codings(Headers(scope=scope).getlist("content-encoding"))
            async with self._bodies.read(receive, codings) as body:
                if body is None:
                    return
                await self._run(_GatewayRequest.of(scope, body, self._market.config), receive, send)
        except TallyError as error:
            await send_error(send, error)
        except ClientStalled as error:
            log.info("caller disconnected", reason=str(error))

    async def _run(self, request: _GatewayRequest, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer_or_error(request, send), name="answer")
        disconnected = asyncio.create_task(_wait_for_disconnect(receive), name="client-disconnect")
        try:
            await asyncio.wait({answering, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if request.key is not None:  # the caller may come back for it
                await asyncio.wait({answering}, timeout=self._market.config.linger_seconds)
        finally:
            disconnected.cancel()
            if not answering.done():
                answering.cancel()
            await asyncio.gather(answering, disconnected, return_exceptions=True)
        if not answering.cancelled():
            answering.result()

    async def _answer_or_error(self, request: _GatewayRequest, send: Send) -> None:
        """Answers from the cache or from a job. Cancelling it ends the job, which waits for its receipt for a bounded time."""
        attempts = Attempts()
        try:
            plan = await self._plan_for_key(request, self._plan(request))
            name = self._cache_name(request, plan)
            cached = None if name is None or self._cache is None else await self._cache.get(name)
            if cached is None:
                await self._try_models(request, plan, _ResponseSender(send, self._cache, name, attempts), attempts)
                return
            label = request.options.get("label", self._market.config.label)
            await self._maintenance.record_cache_hit(CacheHit(label, cached.model, cached.provider, cached.cost))
            await _send_cached(send, cached)
        except TallyError as error:
            retry = attempts.may_retry(error, keyed=request.key is not None)
            await send_error(send, error, attempts.headers(), retry=retry)

    def _cache_name(self, request: _GatewayRequest, plan: RoutingPlan) -> str | None:
        """The answer's name in the cache. It depends on the whole plan, because any of its models may answer."""
        if self._cache is None or request.key is not None or request.content_type != JSON or request.extras.cache is False:
            return None
        demand = demand_of(self._market.config, "", request.path, request.options)
        caller = "" if request.caller is None else request.caller.label
        return self._cache.name(request.path, plan.bodies, demand, caller, requested=request.extras.cache)

    def _plan(self, request: _GatewayRequest) -> RoutingPlan:
        if request.content_type != JSON:
            return RoutingPlan([request.body])
        return self._aliases.plan(request.body, request.extras.fallbacks, weight_draw(request.key or secrets.token_hex()))

    async def _plan_for_key(self, request: _GatewayRequest, plan: RoutingPlan) -> RoutingPlan:
        """The plan of a request with an idempotency key, which stands for one job.

        If that job exists, only its body is left of the plan. Otherwise all bodies are, and every answer is accepted.
        """
        if request.key is None or len(plan.bodies) == 1:
            return plan
        head = RequestHead(request.path, request.content_type)
        keyed = await self._maintenance.find_key(request.key)
        if keyed is None:
            return RoutingPlan(plan.bodies)
        same = [body for body in plan.bodies if fingerprint(join_request(head, body)) == keyed.fingerprint]
        return RoutingPlan(same or plan.bodies[:1])

    async def _try_models(self, request: _GatewayRequest, plan: RoutingPlan, sender: _ResponseSender, attempts: Attempts) -> None:
        """Tries one model after another until one answers and its answer is accepted.

        Raises TallyError if nothing was sent; of several errors, the one that `Attempts.decisive_error` selects.
        """
        first_error: TallyError | None = None
        for remaining, body in zip(range(len(plan.bodies) - 1, -1, -1), plan.bodies, strict=True):
            try:
                result = await self._run_job(request, body, sender, attempts)
            except TallyError as error:
                sender.cache_name = None  # the answer of another model is not cached in place of this one's
                submitted = request.key is not None and await self._maintenance.find_key(request.key) is not None
                if submitted or not remaining or not attempts.may_fall_back(error):
                    if attempts.results:
                        break
                    raise (error if first_error is None else attempts.decisive_error(first_error, error)) from None
                log.info(
                    "falling back to another model",
                    code=error.code.value,
                    reason=str(error),
                    possible_cost=int(attempts.possible_cost),
                )
                first_error = first_error or error
                continue
            if result is None:
                return
            if not remaining or _is_accepted(plan, result):
                await sender.send_result(result, attempts.results)
                return
            log.info("answer not accepted, trying the next model", job=result.job.hex(), cost=int(result.cost))
            attempts.results.append(result)
        if attempts.results:  # a rejected answer is better than none, and it is paid for
            await sender.send_result(attempts.results[-1], attempts.results[:-1])

    async def _run_job(self, request: _GatewayRequest, body: bytes, sender: _ResponseSender, attempts: Attempts) -> Result | None:
        """Runs a job for one model and returns its result; None if it was a stream, which has been sent.

        What earlier attempts cost, or may still cost, is deducted from max_cost.
        """
        market, options = self._market, request.options
        limit = smallest_limit(market.config.max_cost, options.get("max_cost"))
        spent = attempts.possible_cost + _total_cost(attempts.results)
        if spent and limit is not None:
            options = RequestOptions(**options)
            options["max_cost"] = Amount(max(limit - spent, 0))
        for may_repeat in (request.key is None, False):
            job = await market.submit(request.path, body, key=request.key, content_type=request.content_type, **options)
            async with job:
                try:
                    head = await job.start()
                    if media_type(head.content_type) != EVENT_STREAM:
                        return await job.result()
                except TallyError as error:
                    possible_cost = await self._maintenance.possible_cost(job.id)
                    attempts.record_failure(job, error, possible_cost)
                    if may_repeat and not possible_cost and job.head is None and await self._is_repaired(error, job):
                        continue
                    raise
                keyed = request.key is not None
                costs = self._maintenance.possible_cost
                await sender.send_stream(job, head, path=request.path, keyed=keyed, possible_cost=costs)
                return None
        raise RuntimeError("the last attempt neither returned nor raised")

    async def _is_repaired(self, error: TallyError, job: Job) -> bool:
        """Whether the cause of the failure is gone: the ledger was repaired, or more was reserved for the provider."""
        if isinstance(error, TabRecovered):
            return True
        return error.code is Code.UNSECURED and await self._maintenance.top_up(job)


def _is_accepted(plan: RoutingPlan, result: Result) -> bool:
    if result.head.status != 200:
        return True  # the caller gets to see an engine's own error
    try:
        return plan.accepts(result.json())
    except BadMessage:
        return True


class _ResponseSender:
    """Sends an answer to the caller, and caches it under `cache_name` if it has one."""

    def __init__(self, send: Send, cache: ResponseCache | None, cache_name: str | None, attempts: Attempts) -> None:
        self._send, self._cache, self.cache_name, self._attempts = send, cache, cache_name, attempts

    async def send_result(self, result: Result, rejected: Sequence[Result]) -> None:
        """Sends a whole answer. `rejected`: earlier answers of other models, which are paid for too."""
        headers = {
            "content-type": result.head.content_type,
            "x-request-id": result.job.hex(),
            "x-tally-job": result.job.hex(),
            "x-tally-provider": result.provider,
            "x-tally-cost": str(_total_cost([result, *rejected])),
            "x-tally-receipt": RECEIPT_OUTSTANDING if result.receipt is None else "0x" + result.receipt.digest.hex(),
            "x-tally-prices": _prices(result.terms),
        }
        if rejected:
            entries = (f"{r.terms.model}; job={r.job.hex()}; cost={int(r.highest_cost)}" for r in rejected)
            headers["x-tally-escalated"] = ", ".join(entries)
        headers |= self._attempts.headers()
        await self._store(result, result.body)  # before sending: a caller that has the answer may ask again at once
        await _send_whole(self._send, result.head.status, headers | self._cache_headers(), result.body)

    async def send_stream(
        self, job: Job, head: ResponseHead, *, path: str, keyed: bool, possible_cost: Callable[[JobId], Awaitable[Amount]]
    ) -> None:
        """Sends an event stream chunk by chunk. If the job fails on the way, the last event is its error, as `path` has it."""
        headers = {"content-type": head.content_type, "cache-control": "no-store", **_job_headers(job), **self._cache_headers()}
        headers |= self._attempts.headers()
        await _send_head(self._send, head.status, headers)
        tail, parts, size = b"\n\n", list[bytes](), 0
        try:
            async for chunk in job:
                tail = (tail + chunk)[-2:]
                size += len(chunk)
                if self.cache_name is not None and size <= MAX_CACHED_BYTES:
                    parts.append(chunk)
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TallyError as error:
            log.warning("stream ended with an error", job=job.id.hex(), code=error.code.value, reason=str(error))
            self._attempts.record_failure(job, error, await possible_cost(job.id))
            event = render_error_event(error, path=path, retry=self._attempts.may_retry(error, keyed=keyed))
            gap = b"" if tail == b"\n\n" else b"\n\n"
            await self._send({"type": "http.response.body", "body": gap + event, "more_body": True})
        if self.cache_name is not None and job.receipt_accepted and size <= MAX_CACHED_BYTES:
            await self._store(await job.result(), b"".join(parts))
        await self._send({"type": "http.response.body", "body": b""})

    def _cache_headers(self) -> dict[str, str]:
        return {} if self.cache_name is None else {"x-tally-cache": "miss"}

    async def _store(self, result: Result, body: bytes) -> None:
        if self._cache is None or self.cache_name is None or result.head.status != 200:
            return
        if result.receipt is not None and result.outcome in (Outcome.COMPLETED, Outcome.LENGTH):
            response = CachedResponse(
                content_type=result.head.content_type,
                body=body,
                job=result.job.hex(),
                provider=result.provider,
                model=result.terms.model,
                cost=result.cost,
                receipt="0x" + result.receipt.digest.hex(),
            )
            await self._cache.put(self.cache_name, response)


def _total_cost(results: Sequence[Result]) -> Amount:
    """The most that these results cost together, in base units."""
    return Amount(sum(result.highest_cost for result in results))


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _job_headers(job: Job) -> dict[str, str]:
    headers = {"x-request-id": job.id.hex(), "x-tally-job": job.id.hex(), "x-tally-provider": job.provider or ""}
    terms = next((candidate.terms for candidate in job.candidates if candidate.provider == job.provider), None)
    return headers if terms is None else headers | {"x-tally-prices": _prices(terms)}


def _prices(terms: Terms) -> str:
    """The prices of an order, in base units per 1,000,000 tokens."""
    return f"input={terms.input_price}, cached={terms.cached_input_price}, output={terms.output_price}"


async def _send_head(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send_whole(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    await _send_head(send, status, {**headers, "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body})


async def _send_cached(send: Send, cached: CachedResponse) -> None:
    headers = {
        "content-type": cached.content_type,
        "x-request-id": cached.job,
        "x-tally-job": cached.job,
        "x-tally-provider": cached.provider,
        "x-tally-cost": "0",
        "x-tally-receipt": cached.receipt,
        "x-tally-cache": "hit",
    }
    await _send_whole(send, 200, headers, cached.body)


async def send_error(
    send: Send, error: TallyError, headers: Mapping[str, str] | None = None, *, retry: bool | None = None
) -> None:
    """Sends an error in OpenAI's format. `retry`: see `render_error`."""
    response = render_error(error, retry=retry)
    log.info("request refused", status=response.status, code=error.code.value, reason=str(error))
    await _send_whole(send, response.status, {"content-type": JSON} | response.headers | dict(headers or {}), response.body)
