"""The gateway's OpenAI routes, by ASGI or without it.

One request is one job, or several in turn if an alias stands for several models.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import structlog
from starlette.types import Receive, Scope, Send

from tallystick.client.config import ApiKey
from tallystick.client.dialects.dialect import Dialect
from tallystick.client.dialects.messages_tokens import COUNT_TOKENS, count_tokens
from tallystick.client.dialects.registry import DIALECTS
from tallystick.client.gateway.aliases import AliasRouter, RoutingPlan, weight_draw
from tallystick.client.gateway.attempts import Attempts
from tallystick.client.gateway.auth import CALLER_KEY, caller_label
from tallystick.client.gateway.disconnects import DisconnectWatch, Watch, watch_by_task
from tallystick.client.gateway.dispatcher import PATH_MODEL
from tallystick.client.gateway.early_stream import EarlyStream
from tallystick.client.gateway.forms import Form, translated_after
from tallystick.client.gateway.key_shares import OWN_KEY_LABEL, KeyShares
from tallystick.client.gateway.request_bodies import RequestBodies, with_send_timeout
from tallystick.client.gateway.request_headers import headers_of
from tallystick.client.gateway.request_trace import served_request
from tallystick.client.gateway.response_cache import CachedResponse, ResponseCache
from tallystick.client.gateway.response_recorder import ResponseRecorder
from tallystick.client.gateway.response_sender import ResponseSender, error_format, send_cached, send_error, send_json
from tallystick.client.gateway.response_state import ResponseState, ResponseStore
from tallystick.client.gateway.routing_rules import load_rule
from tallystick.client.gateway.upstream_router import UpstreamRouter
from tallystick.client.jobs.job import Job, run_of
from tallystick.client.jobs.result import Result
from tallystick.client.ledger.idempotency import IdempotencyKey, fingerprint, scope_key
from tallystick.client.ledger.spending import CacheHit
from tallystick.client.openai.requests import strip_bom, with_model
from tallystick.client.recovery.lost_state import TabRecovered
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.sdk.market import Market, maintenance_of, tracer_of
from tallystick.client.selection.options import (
    HEADER,
    GatewayOptions,
    RequestOptions,
    demand_of,
    read_options,
    restrict_to_key,
    smallest_limit,
)
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.protocol.errors import BadMessage, Code, TallyError
from tallystick.protocol.plaintext_heads import RequestHead, join_request
from tallystick.protocol.routes import FORM, JSON, RESPONSES, media_type
from tallystick.protocol.sse import EVENT_STREAM
from tallystick.protocol.types import Amount
from tallystick.runtime.access_log import record
from tallystick.runtime.content_encoding import read_codings
from tallystick.runtime.http_direct import ClientStalled, DirectRequest

log = structlog.get_logger()
OWN_KEY = "tally.key"
"""Scope member with the idempotency key of a request that the gateway makes by itself."""
RUNS_ON = "tally.runs_on"
"""Scope member beside it: a function that says whether the request's job is to run on if the request is cancelled."""


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
    runs_on: Callable[[], bool] | None = None

    @property
    def dialect(self) -> Dialect | None:
        """The dialect by which it can be translated to a chat completion; None if it is sold as it is or not at all."""
        return DIALECTS.get(self.path) if self.content_type == JSON else None

    @property
    def requires_market(self) -> bool:
        """Whether only the market can answer it: its caller says so, or its idempotency key stands for a job."""
        return self.extras.market or self.key is not None

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> _GatewayRequest:
        """Reads the headers. Every body that is not declared as a form counts as JSON, as with OpenAI's own servers.

        Raises BadMessage, or Refusal if the caller's key does not allow the request.
        """
        headers = headers_of(scope)
        content_type = headers.get("content-type")
        content_type = content_type if media_type(content_type) == FORM else JSON
        caller: ApiKey | None = scope.get(CALLER_KEY)
        key, own_key = headers.find("idempotency-key"), scope.get(OWN_KEY)
        if own_key is None and key is not None:
            own_key = key if caller is None else scope_key(caller.label, key)
        options, extras = read_options(headers.find(HEADER))
        body = with_model(strip_bom(body) if content_type == JSON else body, content_type, scope.get(PATH_MODEL))
        return cls(
            scope["path"],
            body,
            content_type,
            own_key,
            restrict_to_key(caller, options),
            extras,
            caller,
            scope.get(RUNS_ON),
        )


class RequestHandler:
    """Answers requests to OpenAI's routes, from the body to the last byte of the answer.

    It is an ASGI app; `serve` takes a request that comes without ASGI.
    """

    def __init__(self, market: Market) -> None:
        """Raises BadMessage for routing rules that cannot be loaded."""
        self._market, self._tracer = market, tracer_of(market)
        aliases = market.config.aliases
        self._aliases = AliasRouter(aliases, {alias.name: load_rule(alias.rule) for alias in aliases if alias.rule is not None})
        self._upstreams = UpstreamRouter(market)
        self._cache = ResponseCache.of(market.config, market.wallet)
        self.responses = ResponseState(ResponseStore.of(market.config, market.wallet), market.config.max_body_bytes)
        self.shares = KeyShares.of(market.config)
        self._bodies = RequestBodies(market.config.max_body_bytes, market.config.max_total_body_bytes)

    @property
    def _maintenance(self) -> Maintenance:
        return maintenance_of(self._market)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the job until its answer is sent or its caller has disconnected."""
        await self._serve(scope, receive, with_send_timeout(send), watch_by_task(receive))

    async def serve(self, request: DirectRequest) -> None:
        """Does the same for a request that comes without ASGI."""
        await self._serve(request.scope, request.receive, request, request.watch, request.take_body)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, watch: Watch, take: Callable[[], bytes | None] | None = None
    ) -> None:
        """`take`: gives the whole body if it is here already."""
        if self._tracer is None:
            await self._serve_request(scope, receive, send, watch, take)
            return
        with served_request(self._tracer, scope, send) as observed:
            await self._serve_request(scope, receive, observed, watch, take)

    async def _serve_request(
        self, scope: Scope, receive: Receive, send: Send, watch: Watch, take: Callable[[], bytes | None] | None
    ) -> None:
        try:
            codings = read_codings(headers_of(scope).all("content-encoding"))
            async with self._bodies.read(receive, codings, take) as body:
                if body is None:
                    return
                if scope["path"] == COUNT_TOKENS:
                    await send_json(send, count_tokens(body))
                    return
                request = _GatewayRequest.of(scope, body)
                if request.path == RESPONSES and request.content_type == JSON:
                    turn = await self.responses.open_turn(request.body, caller_label(scope))
                    request, send = replace(request, body=turn.body), ResponseRecorder(send, self.responses, turn)
                await self._run(scope, request, watch, send)
        except TallyError as error:
            await send_error(scope, send, error)
        except ClientStalled as error:
            log.info("caller disconnected", reason=str(error))

    async def _run(self, scope: Scope, request: _GatewayRequest, watch: Watch, send: Send) -> None:
        """Answers a request until its caller disconnects; with an idempotency key for a while longer: it may come back for it."""
        linger = 0 if request.key is None else self._market.config.linger_seconds
        await DisconnectWatch(watch, linger).run(self._answer_or_error(scope, request, send))

    async def _answer_or_error(self, scope: Scope, request: _GatewayRequest, send: Send) -> None:
        """Answers from the cache or from a job. Cancelling it ends the job, which waits for its receipt for a bounded time."""
        errors = error_format(scope)
        attempts, stream = Attempts(), EarlyStream(send, errors)
        try:
            plan = self._upstreams.restrict(self._plan(request), request.options, market=request.requires_market)
            plan = await self._plan_for_key(request, plan)
            name, cached = await self._find_cached(request, plan.bodies)
            if cached is None:
                sender = ResponseSender(stream, errors, self._cache, name, attempts)
                cached = await self._try_models(request, plan, sender, attempts)
            if cached is not None:
                await send_cached(scope, stream, cached)
        except TallyError as error:
            retry = attempts.may_retry(error, keyed=request.key is not None)
            if stream.early:
                await stream.fail(error, retry=retry)
            else:
                await send_error(scope, send, error, attempts.headers(), retry=retry)

    async def _find_cached(self, request: _GatewayRequest, bodies: Sequence[bytes]) -> tuple[str | None, CachedResponse | None]:
        """The name in the cache of the answer to any of `bodies`, None if it must not be cached, and the cached answer."""
        if self._cache is None or request.key is not None or request.content_type != JSON or request.extras.cache is False:
            return None, None
        demand = demand_of(self._market.config, "", request.path, request.options)
        caller = "" if request.caller is None else request.caller.label
        name = self._cache.name(request.path, bodies, demand, caller, requested=request.extras.cache)
        cached = None if name is None else await self._cache.get(name)
        if cached is not None:
            label = request.options.get("label", self._market.config.label)
            await self._maintenance.record_cache_hit(CacheHit(label, cached.model, cached.provider, cached.cost))
        return name, cached

    def _plan(self, request: _GatewayRequest) -> RoutingPlan:
        allowed = () if request.caller is None else request.caller.models
        draw, fallbacks = weight_draw(request.key or secrets.token_hex()) if self._aliases else 0.0, request.extras.fallbacks
        if request.content_type != JSON:
            return self._aliases.plan_form(request.content_type, request.body, fallbacks, draw, allowed)
        return self._aliases.plan(request.body, fallbacks, draw, allowed)

    async def _plan_for_key(self, request: _GatewayRequest, plan: RoutingPlan) -> RoutingPlan:
        """The plan of a request with an idempotency key, which stands for one job.

        If that job exists, only its body is left of the plan. Otherwise all bodies are, and every answer is accepted.
        """
        keyed = None if request.key is None else await self._maintenance.find_key(request.key)
        if request.key is None or keyed is None:
            return plan if len(plan.bodies) == 1 or request.key is None else RoutingPlan(plan.bodies)
        same = [body for body in plan.bodies if _form_of_key(request, body, keyed) is not None]
        return RoutingPlan(same or plan.bodies[:1])

    async def _try_models(
        self, request: _GatewayRequest, plan: RoutingPlan, sender: ResponseSender, attempts: Attempts
    ) -> CachedResponse | None:
        """Tries one model after another until one answers and its answer is accepted.

        Once a model is not available, an answer is cached as one of the models after it. Returns such an answer if it is cached
        already. Raises TallyError if nothing was sent; of several errors, the one that `Attempts.decisive_error` selects.
        """
        first_error: TallyError | None = None
        for number, body in enumerate(plan.bodies):
            remaining, target = plan.bodies[number + 1 :], plan.upstreams.get(body)
            record(**_retries(number))
            try:
                is_sent, result = await self._run_model(request, body, target, sender, plan if remaining else None)
            except TallyError as error:
                sender.cache_name = None  # the answer of another model is not cached in place of this one's
                to_upstream = bool(remaining) and remaining[0] in plan.upstreams
                submitted = request.key is not None and await self._maintenance.find_key(request.key) is not None
                if submitted or not remaining or not attempts.may_fall_back(error, to_upstream=to_upstream):
                    if sender.has_rejected:
                        break
                    raise attempts.decisive_error(first_error, error) from None
                log.info(
                    "falling back to another model",
                    code=error.code.value,
                    reason=error.public_text,
                    possible_cost=int(attempts.possible_cost),
                )
                first_error = first_error or error
                if not (attempts.possible_cost or sender.has_rejected):
                    sender.cache_name, cached = await self._find_cached(request, remaining)
                    if cached is not None:
                        return cached
                continue
            if is_sent:
                return None
            if result is None:  # an answer of an upstream that was not accepted
                continue
            if not remaining or _is_accepted(plan, result):
                await sender.send_result(result, attempts.results)
                return None
            log.info("answer not accepted, trying the next model", job=result.job.hex(), cost=int(result.cost))
            attempts.results.append(result)
        await sender.send_rejected()  # better than none, and paid for
        return None

    async def _run_model(
        self,
        request: _GatewayRequest,
        body: bytes,
        target: UpstreamTarget | None,
        sender: ResponseSender,
        judge: RoutingPlan | None,
    ) -> tuple[bool, Result | None]:
        """Asks an upstream, in OpenAI's dialect, or runs a job. Returns whether an answer was sent, else the job's result.

        `judge`: accepts an upstream's answer or not; None accepts every answer.
        """
        if target is None:
            wait = request.options.get("wait", self._market.config.wait_seconds)
            async with self.shares.slot(OWN_KEY_LABEL if request.caller is None else request.caller.label, wait) as left:
                if left != wait:
                    request = replace(request, options=RequestOptions(**{**request.options, "wait": left}))
                result = await self._run_job(request, body, sender, sender.attempts)
            return result is None, result
        form = Form(request.path, body) if request.dialect is None else Form.translated(request.dialect, body)
        accepts = None if judge is None else judge.accepts
        return await self._upstreams.answer(target, form, request.options, sender, accepts=accepts), None

    async def _run_job(self, request: _GatewayRequest, body: bytes, sender: ResponseSender, attempts: Attempts) -> Result | None:
        """Runs a job for one model and returns its result; None if it was a stream, which has been sent.

        What earlier attempts cost, or may still cost, is deducted from max_cost.
        """
        options = request.options
        limit = smallest_limit(self._market.config.max_cost, options.get("max_cost"))
        spent = attempts.spent
        if spent and limit is not None:
            options = RequestOptions(**options)
            options["max_cost"] = Amount(max(limit - spent, 0))
        for may_repeat in (request.key is None, False):
            job, form = await self._submit(request, body, options)
            job.runs_on = request.runs_on or job.runs_on
            sender.translations[job.id], run_of(job).reads_whole = form.translation, not job.streams
            async with job:
                try:
                    async with sender.telling_place(job):
                        head = await job.start()
                    sender.translations[job.id] = form.translation  # the job may be another one now (Job.resubmit)
                    if media_type(head.content_type) != EVENT_STREAM:
                        result = await job.result()
                        sender.translations[job.id] = form.translation
                        return result
                except TallyError as error:
                    possible_cost = await self._maintenance.possible_cost(job.id)
                    attempts.record_failure(job, error, possible_cost)
                    if may_repeat and not possible_cost and job.head is None and await self._is_repaired(error, job):
                        continue
                    raise
                keyed = request.key is not None
                costs = self._maintenance.possible_cost
                await sender.send_stream(job, head, keyed=keyed, possible_cost=costs)
                return None
        raise RuntimeError("the last attempt neither returned nor raised")

    async def _submit(self, request: _GatewayRequest, body: bytes, options: RequestOptions) -> tuple[Job, Form]:
        """Submits a request as it came, or translated if no provider serves its route, with the form that was submitted."""
        form = Form(request.path, body)
        if request.key is not None and (keyed := await self._maintenance.find_key(request.key)) is not None:
            form = _form_of_key(request, body, keyed) or form
        try:
            return await self._submit_form(request, form, options), form
        except TallyError as error:
            if form.translation is not None:
                raise
            form = translated_after(request.dialect, body, error)
        return await self._submit_form(request, form, options), form

    async def _submit_form(self, request: _GatewayRequest, form: Form, options: RequestOptions) -> Job:
        less = form.translation is not None and form.translation.accepts_less
        return await self._market.submit(
            form.path, form.body, key=request.key, content_type=request.content_type, accepts_less=less, **options
        )

    async def _is_repaired(self, error: TallyError, job: Job) -> bool:
        """Whether the cause of the failure is gone: the ledger was repaired, or more was reserved for the provider."""
        if isinstance(error, TabRecovered):
            return True
        return error.code is Code.UNSECURED and await self._maintenance.top_up(job)


def _retries(number: int) -> dict[str, object]:
    """What the line of the request says of models that were tried before."""
    return {"retries": number} if number else {}


def _form_of_key(request: _GatewayRequest, body: bytes, keyed: IdempotencyKey) -> Form | None:
    """The form of a request for which the job of an idempotency key was submitted; None if that job is of another request."""
    forms = [Form(request.path, body)]
    if request.dialect is not None:
        with contextlib.suppress(BadMessage):
            forms.append(Form.translated(request.dialect, body))
    for form in forms:
        if fingerprint(join_request(RequestHead(form.path, request.content_type), form.body)) == keyed.fingerprint:
            return form
    return None


def _is_accepted(plan: RoutingPlan, result: Result) -> bool:
    if result.head.status != 200:
        return True  # the caller gets to see an engine's own error
    try:
        return plan.accepts(result.json())
    except BadMessage:
        return True
