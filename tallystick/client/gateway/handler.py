"""The gateway's hot routes, raw ASGI: one request is one job, or one after another where a name stands for several models."""

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
from tallystick.client.ledger.idempotency import fingerprint
from tallystick.client.ledger.spending import CacheHit
from tallystick.client.openai.errors import render_error, render_error_event
from tallystick.client.recovery.lost_state import TabRecovered
from tallystick.client.sdk.market import Market, maintenance_of
from tallystick.client.selection.options import HEADER, Extras, Options, demand_of, least, read_options, under
from tallystick.protocol.errors import BadMessage, Code, TallyError
from tallystick.protocol.messages import Outcome, Terms
from tallystick.protocol.routes import FORM, JSON, media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.types import Amount, JobId
from tallystick.protocol.wire import RequestHead, ResponseHead, join_request

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
"""Headers of answers that are the gateway's own."""
RECEIPT_OUTSTANDING = "outstanding"
"""What x-tally-receipt says where the whole answer came and its receipt has not yet; x-tally-cost is then the most it may be."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One request of a caller: its route and body, and what its headers say."""

    path: str
    body: bytes = field(repr=False)
    content_type: str
    key: str | None
    options: Options
    extras: Extras
    caller: ApiKey | None

    @classmethod
    def of(cls, scope: Scope, body: bytes, config: ClientConfig) -> _Wanted:
        """Like OpenAI's own servers and engines, whatever does not say that it is a form is read as JSON. Raises BadMessage, or
        Refusal where the caller's key does not allow it.
        """
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "")
        caller: ApiKey | None = scope.get(CALLER_KEY)
        options, extras = read_options(headers.get(HEADER))
        return cls(
            scope["path"],
            body,
            kind if media_type(kind) == FORM else JSON,
            _own(caller, headers.get("idempotency-key")),
            under(config, caller, options),
            extras,
            caller,
        )


def _own(caller: ApiKey | None, key: str | None) -> str | None:
    """An idempotency key as one caller's own: another's stands for another job."""
    return key if caller is None or key is None else f"{caller.label}\N{SYMBOL FOR UNIT SEPARATOR}{key}"


class RequestHandler:
    """One request of a caller, from its body to the last byte of its answer."""

    def __init__(self, market: Market) -> None:
        """Raises BadMessage for rules that can't be loaded."""
        self._market = market
        aliases = market.config.aliases
        self._names = AliasRouter(aliases, {alias.name: load_rule(alias.rule) for alias in aliases if alias.rule is not None})
        self._cache = ResponseCache.of(market.config, market.wallet)
        self._bodies = RequestBodies(market.config.max_body_bytes, market.config.max_total_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the job until its answer is sent or its client is gone."""
        send = with_send_timeout(send)
        try:
            async with self._bodies.read(receive) as body:
                if body is None:
                    return
                await self._run(_Wanted.of(scope, body, self._market.config), receive, send)
        except TallyError as error:
            await send_error(send, error)
        except ClientStalled as error:
            log.info("a caller was given up", reason=str(error))

    async def _run(self, wanted: _Wanted, receive: Receive, send: Send) -> None:
        relay = asyncio.create_task(self._relay(wanted, send), name="relay")
        gone = asyncio.create_task(_until_gone(receive), name="client-gone")
        try:
            await asyncio.wait({relay, gone}, return_when=asyncio.FIRST_COMPLETED)
            if wanted.key is not None:  # its client may come back for it
                await asyncio.wait({relay}, timeout=self._market.config.linger_seconds)
        finally:
            gone.cancel()
            if not relay.done():
                relay.cancel()
            await asyncio.gather(relay, gone, return_exceptions=True)
        if not relay.cancelled():
            relay.result()

    async def _relay(self, wanted: _Wanted, send: Send) -> None:
        """Leaving this, also by cancellation, ends the job: `async with` waits, for a bounded time, for its receipt."""
        tried = Attempts()
        try:
            plan = await self._of_key(wanted, self._plan(wanted))
            name = self._cached_as(wanted, plan)
            kept = None if name is None or self._cache is None else await self._cache.get(name)
            if kept is None:
                await self._ask(wanted, plan, _Sending(send, self._cache, name, tried), tried)
                return
            hit = CacheHit(self._label(wanted), kept.model, kept.provider, kept.cost)
            await maintenance_of(self._market).record_cache_hit(hit)
            await _send_kept(send, kept)
        except TallyError as error:
            retry = tried.may_retry(error, keyed=wanted.key is not None)
            await send_error(send, error, tried.headers(), retry=retry)

    def _cached_as(self, wanted: _Wanted, plan: RoutingPlan) -> str | None:
        """By the whole plan: what any of its models answers is the answer, and another plan's is not."""
        if self._cache is None or wanted.key is not None or wanted.content_type != JSON or wanted.extras.cache is False:
            return None
        demand = demand_of(self._market.config, "", wanted.path, wanted.options)
        caller = "" if wanted.caller is None else wanted.caller.label
        return self._cache.name(wanted.path, plan.bodies, demand, caller, asked=wanted.extras.cache)

    def _label(self, wanted: _Wanted) -> str:
        return wanted.options.get("label", self._market.config.label)

    def _plan(self, wanted: _Wanted) -> RoutingPlan:
        if wanted.content_type != JSON:
            return RoutingPlan([wanted.body])
        return self._names.plan(wanted.body, wanted.extras.fallbacks, weight_draw(wanted.key or secrets.token_hex()))

    async def _of_key(self, wanted: _Wanted, plan: RoutingPlan) -> RoutingPlan:
        """What is left of a plan for a request with an idempotency key, which stands for one job: the body that this job
        has, once there is one; until then any, without a second after an answer.
        """
        if wanted.key is None or len(plan.bodies) == 1:
            return plan
        head = RequestHead(wanted.path, wanted.content_type)
        known = await maintenance_of(self._market).find_key(wanted.key)
        mine = [body for body in plan.bodies if known is not None and fingerprint(join_request(head, body)) == known.fingerprint]
        return RoutingPlan((mine or plan.bodies[:1]) if known is not None else plan.bodies)

    async def _ask(self, wanted: _Wanted, plan: RoutingPlan, sending: _Sending, tried: Attempts) -> None:
        """One model after another, until one answers and its answer will do. Raises TallyError as long as nothing was sent: the
        first one where max_cost leaves nothing for another model.
        """
        failed: TallyError | None = None
        for left, body in zip(range(len(plan.bodies) - 1, -1, -1), plan.bodies, strict=True):
            try:
                result = await self._answer(wanted, body, sending, tried)
            except TallyError as error:
                sending.name = None  # the next model may answer, but not for the one that was to
                placed = wanted.key is not None and await maintenance_of(self._market).find_key(wanted.key) is not None
                if placed or not left or not tried.may_fall_back(error):
                    if not tried.results:
                        raise (failed if failed is not None and error.code is Code.COST_ABOVE_CAP else error) from None
                    break
                log.info("falling back to another model", code=error.code.value, reason=str(error), at_stake=int(tried.stake))
                failed = failed or error
                continue
            if result is None:
                return
            if not left or _will_do(plan, result):
                await sending.result(result, tried.results)
                return
            log.info("an answer will not do: asking the next model", job=result.job.hex(), cost=int(result.cost))
            tried.results.append(result)
        if tried.results:  # better than nothing, and paid for
            await sending.result(tried.results[-1], tried.results[:-1])

    async def _answer(self, wanted: _Wanted, body: bytes, sending: _Sending, tried: Attempts) -> Result | None:
        """The answer of one model; None if it was a stream, which then was sent. What earlier attempts cost, or may cost, is
        taken off max_cost.
        """
        market, options = self._market, wanted.options
        limit, spent = least(market.config.max_cost, options.get("max_cost")), tried.stake + _sum(tried.results)
        if spent and limit is not None:
            options = Options(**options)
            options["max_cost"] = Amount(max(limit - spent, 0))
        for again in (wanted.key is None, False):
            job = await market.submit(wanted.path, body, key=wanted.key, content_type=wanted.content_type, **options)
            async with job:
                try:
                    head = await job.start()
                    if media_type(head.content_type) != EVENT_STREAM:
                        return await job.result()
                except TallyError as error:
                    stake = await maintenance_of(market).possible_cost(job.id)
                    tried.note(job, error, stake)
                    if again and not stake and job.head is None and await self._mended(error, job):
                        continue
                    raise
                await sending.stream(job, head, keyed=wanted.key is not None, stake=maintenance_of(market).possible_cost)
                return None
        raise RuntimeError("a job that is not asked for again has an end")

    async def _mended(self, error: TallyError, job: Job) -> bool:
        """Whether what was in the job's way is not any more: too little reserved, or books that lacked something."""
        if isinstance(error, TabRecovered):
            return True
        return error.code is Code.UNSECURED and await maintenance_of(self._market).top_up(job)


def _will_do(plan: RoutingPlan, result: Result) -> bool:
    if result.head.status != 200:
        return True  # an engine's own error is for the caller to see
    try:
        return plan.good(result.json())
    except BadMessage:
        return True


class _Sending:
    """An answer on its way to the caller, and into the cache where it has a name there."""

    def __init__(self, send: Send, cache: ResponseCache | None, name: str | None, tried: Attempts) -> None:
        self._send, self._cache, self.name, self._tried = send, cache, name, tried

    async def result(self, result: Result, before: Sequence[Result]) -> None:
        """A whole answer; those `before` were other models', which would not do, and are paid for too."""
        headers = {
            "content-type": result.head.content_type,
            "x-request-id": result.job.hex(),
            "x-tally-job": result.job.hex(),
            "x-tally-provider": result.provider,
            "x-tally-cost": str(_sum([result, *before])),
            "x-tally-receipt": RECEIPT_OUTSTANDING if result.receipt is None else "0x" + result.receipt.digest.hex(),
            "x-tally-prices": _prices(result.terms),
        }
        if before:
            told = (f"{one.terms.model}; job={one.job.hex()}; cost={int(one.highest_cost)}" for one in before)
            headers["x-tally-escalated"] = ", ".join(told)
        headers |= self._tried.headers()
        await self._keep(result, result.body)  # first: whoever has the answer may ask again
        await _send_whole(self._send, result.head.status, headers | self._missed(), result.body)

    async def stream(self, job: Job, head: ResponseHead, *, keyed: bool, stake: Callable[[JobId], Awaitable[Amount]]) -> None:
        """An event stream, chunk by chunk; an error in its midst is its last event. `stake`: what a job may still cost."""
        headers = {"content-type": head.content_type, "cache-control": "no-store", **_job_headers(job), **self._missed()}
        headers |= self._tried.headers()
        await _send_head(self._send, head.status, headers)
        tail, parts, size = b"\n\n", list[bytes](), 0
        try:
            async for chunk in job:
                tail = (tail + chunk)[-2:]
                size += len(chunk)
                if self.name is not None and size <= MAX_CACHED_BYTES:
                    parts.append(chunk)
                await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TallyError as error:
            log.warning("a stream ended with an error", job=job.id.hex(), code=error.code.value, reason=str(error))
            self._tried.note(job, error, await stake(job.id))
            told = render_error_event(error, retry=self._tried.may_retry(error, keyed=keyed))
            gap = b"" if tail == b"\n\n" else b"\n\n"
            await self._send({"type": "http.response.body", "body": gap + told, "more_body": True})
        if self.name is not None and job.receipt_accepted and size <= MAX_CACHED_BYTES:
            await self._keep(await job.result(), b"".join(parts))
        await self._send({"type": "http.response.body", "body": b""})

    def _missed(self) -> dict[str, str]:
        return {} if self.name is None else {"x-tally-cache": "miss"}

    async def _keep(self, result: Result, body: bytes) -> None:
        if self._cache is None or self.name is None or result.head.status != 200:
            return
        if result.receipt is not None and result.outcome in (Outcome.COMPLETED, Outcome.LENGTH):
            kept = CachedResponse(
                content_type=result.head.content_type,
                body=body,
                job=result.job.hex(),
                provider=result.provider,
                model=result.terms.model,
                cost=result.cost,
                receipt="0x" + result.receipt.digest.hex(),
            )
            await self._cache.put(self.name, kept)


def _sum(results: Sequence[Result]) -> Amount:
    return Amount(sum(one.highest_cost for one in results))


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _job_headers(job: Job) -> dict[str, str]:
    headers = {"x-request-id": job.id.hex(), "x-tally-job": job.id.hex(), "x-tally-provider": job.provider or ""}
    terms = next((one.terms for one in job.candidates if one.provider == job.provider), None)
    return headers if terms is None else headers | {"x-tally-prices": _prices(terms)}


def _prices(terms: Terms) -> str:
    """Base units per 1,000,000 tokens."""
    return f"input={terms.input_price}, cached={terms.cached_input_price}, output={terms.output_price}"


async def _send_head(send: Send, status: int, headers: Mapping[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def _send_whole(send: Send, status: int, headers: Mapping[str, str], body: bytes) -> None:
    await _send_head(send, status, {**headers, "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body})


async def _send_kept(send: Send, kept: CachedResponse) -> None:
    headers = {
        "content-type": kept.content_type,
        "x-request-id": kept.job,
        "x-tally-job": kept.job,
        "x-tally-provider": kept.provider,
        "x-tally-cost": "0",
        "x-tally-receipt": kept.receipt,
        "x-tally-cache": "hit",
    }
    await _send_whole(send, 200, headers, kept.body)


async def send_error(
    send: Send, error: TallyError, headers: Mapping[str, str] | None = None, *, retry: bool | None = None
) -> None:
    """An error in OpenAI's shape. `retry`: see render_error."""
    shown = render_error(error, retry=retry)
    log.info("request refused", status=shown.status, code=error.code.value, reason=str(error))
    await _send_whole(send, shown.status, {"content-type": JSON} | shown.headers | dict(headers or {}), shown.body)
