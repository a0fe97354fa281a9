"""The gateway: serves OpenAI's API on this machine, paid from one wallet. Any OpenAI client works once its base URL points here.

Bodies pass through unchanged in both directions, and streams chunk by chunk. A client that disconnects cancels its job, whose
receipt is still recorded. Every request spends money; without an API key, the gateway therefore serves only programs on this
machine, and neither web pages nor foreign host names (see auth.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tallystick.client.batches.service import BatchService
from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.coordinator.model_offers import ModelOffer
from tallystick.client.dialects.messages_models import model_entry, models_page
from tallystick.client.dialects.registry import VERSION_HEADER
from tallystick.client.gateway.aliases import AliasRouter
from tallystick.client.gateway.auth import ANONYMOUS, CALLER_KEY, Authenticator, check_public_access
from tallystick.client.gateway.batch_answers import BatchAnswers
from tallystick.client.gateway.batch_routes import batch_routes
from tallystick.client.gateway.dispatcher import JOB_ROUTES, Dispatcher
from tallystick.client.gateway.file_routes import file_routes
from tallystick.client.gateway.handler import RequestHandler
from tallystick.client.gateway.operations import Operations
from tallystick.client.gateway.paths import allowed_methods, explain_unknown
from tallystick.client.gateway.request_bodies import SEND_TIMEOUT_SECONDS
from tallystick.client.gateway.response_routes import stored_response_routes
from tallystick.client.gateway.response_sender import ERROR_HEADERS, TALLY_HEADERS, error_response, send_error
from tallystick.client.jobs.export import job_json
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.client.pages.payer_pages import PayerPages
from tallystick.client.pages.wallet_login import make_sign_in
from tallystick.client.sdk.market import Market, audits_of, maintenance_of
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.routes import JSON
from tallystick.protocol.types import parse_job_id
from tallystick.protocol.wire import dumps
from tallystick.runtime.access_log import AccessLog
from tallystick.runtime.connection_limiter import ConnectionLimits
from tallystick.runtime.http_direct import DirectApp, DirectRoutes
from tallystick.runtime.serving import serving, wait_for_stop_signal
from tallystick.runtime.trusted_proxies import TrustedProxies
from tallystick.tracing.export import exporting
from tallystick.web.error_pages import ErrorPages

log = structlog.get_logger()


def build_app(
    market: Market,
    operations: Operations | None = None,
    handler: RequestHandler | None = None,
    batches: BatchService | None = None,
) -> DirectApp:
    """The gateway of an open market, as an ASGI app whose routes for jobs are served without ASGI.

    `operations`: its health and metrics, else those of this app alone. `batches`: its files and batches, which answer by
    `handler`; None if it has none.
    """
    operations, handler = operations or Operations(market), handler or RequestHandler(market)
    if batches is not None:
        operations.watch_batches(lambda: batches.open_batches, lambda: batches.running_lines)
    operations.watch_keys(handler.shares)
    models, authenticator = _ModelRoutes(market), Authenticator(market.config)
    authenticator.sign_in = make_sign_in(market)
    pages = PayerPages(market, may_see=_may_see_all, log_in=authenticator.log_in, sign_in=authenticator.sign_in)

    async def job(request: Request) -> Response:
        known = await market.find(parse_job_id(request.path_params["job"]))
        if known is None:
            raise Refusal(Code.UNKNOWN_JOB, f"this wallet's ledger has no job {request.path_params['job']}")
        return _json(job_json(known))

    routes = [
        *operations.routes(),
        Route("/v1/models", models.list_models),
        Route("/v1/models/{model:path}", models.get_model),
        Route("/tally/jobs/{job}", job),
        *pages.routes(),
        *stored_response_routes(handler.responses),
        *([] if batches is None else [*file_routes(batches, market.config), *batch_routes(batches)]),
        Route("/v1/{path:path}", _Sold(handler)),  # routes besides JOB_ROUTES that providers may sell
    ]
    handlers: dict[Any, Callable[..., Any]] = {TallyError: _show_error, 404: _no_route, 405: _no_route}
    router = Starlette(routes=routes, exception_handlers=handlers)
    router.router.redirect_slashes = False  # paths come without slashes at their end
    dispatcher, origins = Dispatcher(handler, router, authenticator, send_error), market.config.allow_origins
    app = ErrorPages(dispatcher, pages.pages)
    targets = frozenset(route.encode() for route in JOB_ROUTES)
    direct = DirectRoutes(targets, dispatcher.serve, bool(origins), operations.observe, SEND_TIMEOUT_SECONDS)
    return DirectApp(AccessLog(_with_cors(app, origins) if origins else app, operations.observe), direct)


def _may_see_all(request: Request) -> bool:
    """Whether the caller holds the gateway's own key, or none is needed. A key of [[api_keys]] opens no page."""
    return not request.scope.get(ANONYMOUS) and request.scope.get(CALLER_KEY) is None


def _with_cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """The app for web pages of these origins. Answers to all requests get the headers, errors and streams too.

    Browsers ask without an API key whether they may send one, also from public pages to this machine (Private Network Access).
    """
    return CORSMiddleware(
        app,
        allow_origins=[origin.lower() for origin in origins],
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=(*TALLY_HEADERS, *ERROR_HEADERS),
    )


class _ModelRoutes:
    """The routes that list models. Concurrent callers share one request to the coordinator, and its answer."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._request: asyncio.Task[list[ModelOffer]] | None = None

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models, in OpenAI's form, or in Anthropic's for its clients."""
        entries = await self._entries(request)
        if VERSION_HEADER in request.headers:
            return _json(models_page(entries, request.query_params))
        return _json({"object": "list", "data": entries})

    async def get_model(self, request: Request) -> Response:
        """GET /v1/models/MODEL."""
        wanted = request.path_params["model"]
        for entry in await self._entries(request):
            if entry["id"] == wanted:
                return _json(model_entry(entry) if VERSION_HEADER in request.headers else entry)
        raise Refusal(Code.UNKNOWN_MODEL, f"model: expected one that a provider offers (see GET /v1/models), got {wanted!r}")

    async def _entries(self, request: Request) -> list[dict[str, Any]]:
        """The models and aliases that the request's caller may use. Raises TallyError."""
        if self._request is None:
            self._request = asyncio.create_task(self._market.models(), name="models")
            self._request.add_done_callback(self._request_done)
        offers = await asyncio.shield(self._request)
        return _models(self._market, offers, request.scope.get(CALLER_KEY))

    def _request_done(self, task: asyncio.Task[list[ModelOffer]]) -> None:
        self._request = None
        if not task.cancelled():
            task.exception()  # marks the error as seen: all callers may have disconnected


def _models(market: Market, offers: list[ModelOffer], caller: ApiKey | None) -> list[dict[str, Any]]:
    """The models and aliases that a caller may use by their names."""
    allowed, aliases = () if caller is None else caller.models, AliasRouter(market.config.aliases, {})
    offered = [_model_entry(offer.id, offer.to_json()) for offer in offers if aliases.may_name(offer.id, allowed)]
    return offered + [_model_entry(name, _members(models)) for name, models in aliases.usable(allowed).items()]


def _members(models: Sequence[str]) -> dict[str, Any]:
    """The members of an alias, and those of them that are models of upstreams."""
    upstreams = [member for member in models if UpstreamTarget.parse(member) is not None]
    return {"models": list(models)} | ({"upstreams": upstreams} if upstreams else {})


def _model_entry(name: str, market: dict[str, Any]) -> dict[str, Any]:
    """A model as OpenAI's GET /v1/models lists it, with the market's members beside OpenAI's."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "tallystick"} | market


class _Sold:
    """Passes POST requests on to routes that a provider may sell, and refuses others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = explain_unknown(scope["method"], scope["path"])
        if reason is None:
            await self._app(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await _show_methods(scope["path"])(scope, receive, send)
        else:
            await send_error(scope, send, Refusal(Code.UNKNOWN_ROUTE, reason))


def _json(document: object) -> Response:
    return Response(dumps(document), media_type=JSON)


def _show_methods(path: str) -> Response:
    return Response(status_code=204, headers={"allow": ", ".join(allowed_methods(path))})


async def _show_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, TallyError):
        raise error
    response = error_response(request.scope, error)
    return Response(response.body, response.status, response.headers)


async def _no_route(request: Request, _error: Exception) -> Response:
    path = request.scope["path"]
    if request.method == "OPTIONS":
        return _show_methods(path)
    text = explain_unknown(request.method, path) or f"{request.method} {path}: no such route"
    return await _show_error(request, Refusal(Code.UNKNOWN_ROUTE, text))


async def _maintain(market: Market) -> None:
    """Warns at the start if no coordinator answers, and once a day of idle reservations."""
    try:
        await market.info()
    except TallyError as error:
        log.warning("coordinator not available", reason=str(error))
    audits_of(market).resume_pending()
    maintenance = maintenance_of(market)
    while True:
        try:
            await maintenance.warn_idle()
        except TallyError as error:
            log.info("reservations not checked", reason=str(error))
        await asyncio.sleep(DAY_SECONDS)


async def run_gateway(config: ClientConfig, signer: Signer, *, ready: Callable[[int], None] | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Then it waits up to `shutdown_seconds` for running jobs and cancels the rest.

    `ready` is called with the bound port, which is useful with port 0. Raises BadMessage for impossible settings and Unavailable
    for an unusable ledger file or port.
    """
    check_public_access(config)
    async with exporting(config.tracing, "tallystick-gateway") as export:
        tracer = None if export is None else export.tracer
        async with Market(config.coordinator, signer, config, tracer=tracer) as market:
            operations = Operations(market)
            if export is not None:
                operations.watch_traces(export.counts.by_outcome)
            await _serve(market, operations, ready)


@contextlib.asynccontextmanager
async def open_batches(
    market: Market, handler: RequestHandler, now: Callable[[], float] = time.time
) -> AsyncIterator[BatchService | None]:
    """The files and batches of a market, which run until the end of the block; None if `batches_mib` is 0.

    `now`: Unix time in seconds. Raises Unavailable for an unusable folder.
    """
    if not market.config.batches_mib:
        yield None
        return
    async with BatchService(market.config, market.wallet, BatchAnswers(market, handler), now=now) as batches:
        yield batches


async def _serve(market: Market, operations: Operations, ready: Callable[[int], None] | None) -> None:
    config, handler = market.config, RequestHandler(market)
    limits = ConnectionLimits(proxies=TrustedProxies.parse(config.trusted_proxies))
    async with (
        open_batches(market, handler) as batches,
        serving(
            *(build_app(market, operations, handler, batches), config.host, config.port), limits=limits, ws_max_size=None
        ) as port,
    ):
        host = f"[{config.host}]" if ":" in config.host else config.host
        log.info("gateway ready", url=f"http://{host}:{port}/v1", payer=market.address, coordinator=config.coordinator)
        if ready is not None:
            ready(port)
        maintaining = asyncio.create_task(_maintain(market), name="maintenance")
        watching = asyncio.create_task(operations.run(), name="health")
        await wait_for_stop_signal()
        maintaining.cancel()
        watching.cancel()
        log.info("gateway stopping", jobs=market.running)
        if batches is not None:
            await batches.stop(config.shutdown_seconds)
        await market.drain(config.shutdown_seconds)
