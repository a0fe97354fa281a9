"""The control plane of the coordinator's HTTP API, in FastAPI. Jobs and node links have routes of their own."""

from __future__ import annotations

import base64
import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from coordinator.domain.ask_pages import ModelEntries, ask_entry, asks_page, explained_entry, models_page, rating_entry
from coordinator.domain.peer_errors import error_for_peers
from coordinator.domain.resource_bounds import DEFAULT_PAGE_ENTRIES
from coordinator.http.account_routes import Accounts, AccountViews, add_account_routes, read_token
from coordinator.http.cancels import cancel_job
from coordinator.http.job_views import job_view, queued_view, settlement_view
from coordinator.http.log_routes import add_log_routes
from coordinator.http.metrics import CoordinatorMetrics
from coordinator.http.operations_routes import add_operations_routes
from coordinator.http.pages import ABOUT, LINKS, PAGE_HEADERS, api_page, home_page
from coordinator.http.replica_view import Alone, ReplicaView
from coordinator.http.report_routes import add_report_routes
from coordinator.http.schemas import (
    AfterAsk,
    AfterModel,
    ErrorBody,
    FurtherOrders,
    Hex32,
    Info,
    Limit,
    ModelName,
    ProviderPath,
    Replica,
    ShortlistRequest,
    SignedInquiry,
    Token,
)
from coordinator.jobs.market import Market
from coordinator.ports import ClaimStore, JobStore, TabStore
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import read_signed
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable, retry_headers
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Inquiry
from tallystick.protocol.payer_rules import Payer
from tallystick.protocol.types import Address, Amount, parse_address, parse_job_id
from tallystick.protocol.wire import Candidate, dumps
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.version import __version__

TAB_RECEIPTS = 16
"""Receipts of a tab that its payer gets."""
_GATEWAY_ROUTES = ("/chat/", "/completions", "/embeddings", "/responses", "/messages", "/rerank", "/images/", "/audio/")
"""What clients of the gateway ask for, if they are given the coordinator's address."""
MAX_INQUIRY_AGE = 300
"""Seconds that a payer's clock may differ from this coordinator's clock in an inquiry."""


@dataclass(frozen=True)
class ApiContext:
    """The parts of the coordinator that the API serves."""

    market: Market
    connected: Callable[[], int]
    """Returns the number of connected nodes."""
    jobs: JobStore
    claims: ClaimStore
    tabs: TabStore
    info: Info
    health: HealthMonitor
    metrics: CoordinatorMetrics
    accounts: Accounts
    now: Callable[[], float] = time.time
    replicas: ReplicaView = field(default_factory=Alone)

    @functools.cached_property
    def views(self) -> AccountViews:
        """What single accounts may read: one object, so that the API and the page count in one limit."""
        return AccountViews(self.accounts, self.market, self.now)


def build_control_plane(context: ApiContext) -> FastAPI:
    """Returns the FastAPI app with all routes of the control plane."""
    api = FastAPI(
        title="Tallystick coordinator",
        docs_url=None,
        redoc_url=None,
        version=__version__,
        description="Matches signed orders to signed asks and relays ciphertext. Jobs themselves are posted to `/v1/jobs` as"
        " binary frames (see tallystick/protocol/wire.py), nodes connect to the WebSocket `/v1/node`.",
        responses={
            "4XX": {"model": ErrorBody, "description": "The request cannot be met; the error says why."},
            "5XX": {"model": ErrorBody, "description": "No provider, or this coordinator, can meet it now."},
        },
        # traces are of jobs (job_trace.py); FastAPI's own would be of lists, and its logs could quote requests
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    api.openapi = functools.partial(_document, api)  # type: ignore[method-assign]  # FastAPI documents this way of changing the document
    api.add_exception_handler(TallyError, _tally_error)
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _bug)
    _add_market_routes(api, context)
    _add_provider_routes(api, context)
    _add_job_routes(api, context)
    _add_tab_routes(api, context)
    add_log_routes(api, context.market.match_log)
    add_report_routes(api, context.market.audit_reports)
    add_account_routes(api, context.views)
    add_operations_routes(api, context.market, context.connected, context.health, context.metrics)
    context.metrics.watch_replicas(context.replicas)
    _add_pages(api, context)
    return api


def _document(api: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document without the 422 that FastAPI adds to every route: invalid input is a 400 here."""
    if not api.openapi_schema:
        document = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        api.openapi_schema = document
    return api.openapi_schema


def _add_market_routes(api: FastAPI, context: ApiContext) -> None:
    @api.get("/v1/info")
    async def info() -> Info:
        """Returns the identity of this coordinator, and the chain and contract for which every message must be signed."""
        listed = [Replica(id=replica.id, url=replica.url) for replica in context.replicas.listed]
        return context.info.model_copy(update={"replicas": listed})

    entries = ModelEntries()

    @api.get("/v1/models")
    async def models(after: AfterModel = "", limit: Limit = DEFAULT_PAGE_ENTRIES) -> Response:
        """Lists the models on offer in `data`, by name, with their lowest prices in base units per 1,000,000 tokens.

        `live`: the asks with a free slot; `waiting`: the jobs that wait for one. Of a model with 10,000 asks, all but `waiting`
        may be one second old, with more asks older.

        `next` is the `after` of the next page, or null on the last page. A page may have fewer entries than requested.
        """
        waiting = context.market.matchmaker.queue.count_waiting
        market, tick = context.market, time.monotonic()
        page = models_page(market.book, entries, waiting, after, limit, score=market.reputation.score, tick=tick)
        return _page("data", *page)

    @api.get("/v1/asks")
    async def asks(model: ModelName, after: AfterAsk = "", limit: Limit = DEFAULT_PAGE_ENTRIES) -> Response:
        """Lists the signed asks for a model in `asks`, cheapest first.

        Integrity, by `audits`, and availability are percentages. `next` is the `after` of the next page, or null on the last
        page. A page may have fewer entries than requested.
        """
        return _page("asks", *asks_page(context.market.book, model, after, limit, context.market.reputation.score))

    @api.post("/v1/explain")
    async def explain(request: ShortlistRequest) -> dict[str, Any]:
        """Returns every ask for the model, the lowest score first; `tally explain` shows this.

        `why` is the reason for which the ask would not be on the shortlist, or null if it would be. `score` has the terms by
        which asks are ranked for this request, and their `total`, in dollars; `expected` has the tokens that they are for.
        `tokensPerSecond` and `firstTokenMs` are this coordinator's measurements if `measured` is true, else the node's own word.
        `integrity`, by `audits`, and `availability`, by jobs, are percentages; `reputation` is another name of the latter.
        `tier` is the payer's access tier, with the `refusal` of this model, if any, and what would lift it; null without tiers.
        """
        demand, maker = await _demand(context, request), context.market.matchmaker
        explained, shape, tiers = maker.explain(demand), maker.shape_of(demand), context.accounts.tiers
        tier = None if tiers is None else await tiers.explain(parse_address(request.payer), demand.model)
        return {"asks": [explained_entry(ranked, reason, shape) for ranked, reason in explained], "tier": tier}

    @api.post("/v1/shortlist")
    async def shortlist(request: ShortlistRequest) -> dict[str, Any]:
        """Returns the best signed asks for a demand in `asks`, best first. If there is none, the error says why."""
        demand, score = await _demand(context, request), context.market.reputation.score
        if context.accounts.tiers is not None:
            await context.accounts.tiers.check_model(parse_address(request.payer), demand.model)
        return {"asks": [ask_entry(listed_ask, score) for listed_ask in context.market.matchmaker.shortlist(demand)]}


async def _demand(context: ApiContext, request: ShortlistRequest) -> Demand:
    """Returns the demand, after reading the stakes that it asks for, and what its payer settled if a price depends on that."""
    if request.minStake:
        await context.market.matchmaker.load_stakes(request.model)
    demand, index = request.demand(), context.market.book.index_of(request.model)
    if index is None or not index.payer_groups:
        return demand
    payer = parse_address(request.payer)
    settled: Mapping[Address, Amount] = {}
    with contextlib.suppress(Unavailable):  # the other asks are offered all the same
        settled = await context.accounts.settled.of(payer)
    return replace(demand, payer=Payer(payer, settled))


def _add_provider_routes(api: FastAPI, context: ApiContext) -> None:
    @api.get("/v1/providers/{provider}/why")
    async def why(
        provider: ProviderPath,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
        input_price: Annotated[int | None, Query(alias="inputPrice", ge=0, lt=1 << 64)] = None,
        output_price: Annotated[int | None, Query(alias="outputPrice", ge=0, lt=1 << 64)] = None,
    ) -> dict[str, Any]:
        """Returns the latest decisions about a provider, newest first: which jobs it got, and why it did not get others.

        `tally node why` shows them. `availability` (by jobs) and `integrity` (by `audits` of each product) are percentages.
        No decision names a payer. With `inputPrice` or `outputPrice`, in base units per 1,000,000 tokens, the answer is about
        the shortlists among these decisions: what each would have been for its present asks at these prices. It leaves out
        those of which that is not known, as of the time before the node connected.
        """
        address, market = parse_address(provider), context.market
        prices = None if input_price is None and output_price is None else (input_price, output_price)
        return {
            "provider": address,
            "connected": market.book.node(address) is not None,
            "availability": round(100 * market.reputation.score(address)),
            "ratings": [rating_entry(listed_ask) for listed_ask in market.book.of_provider(address)],
            "decisions": [asdict(verdict) for verdict in market.decision_log.verdicts(address, market.book, limit, prices)],
        }


def _add_job_routes(api: FastAPI, context: ApiContext) -> None:
    @api.get("/v1/jobs/{job}")
    async def show(request: Request, job: Hex32, token: Token = None) -> dict[str, Any]:
        """Returns a job's state, its attempts, its receipt and its settlement on chain.

        The payer reads everything. A provider of one of the attempts reads that attempt alone. `settlement` is null until the
        chain has paid the receipt; then it has the transaction (`tx`), the block, and what the tab has paid in all (base units).
        While the job waits for a free slot, `queue` has its `position`, 1 for the next, and the expected wait (`waitMs`).
        """
        caller, job_id, shared = await context.views.caller(request, token), parse_job_id(job), context.market.shared
        known, queued = await context.jobs.job(job_id), context.market.queued_job(job_id)
        if known is not None and known.replica and shared is not None and await shared.end_lost(job_id, known.replica):
            known = await context.jobs.job(job_id)
        if queued is not None and queued[0].payer == caller:
            return queued_view(known, *queued)
        if known is None:
            raise Refusal(Code.UNKNOWN_JOB, f"this coordinator does not know job {job}")
        only = None if caller == known.record.payer else caller
        if only is not None and known.record.attempt_of(only) is None:
            raise Refusal(
                Code.UNAUTHENTICATED, f"{caller} is neither the payer of job {job} nor a provider of one of its attempts"
            )
        return job_view(known, only) | {
            "settlement": await settlement_view(context.claims, known.receipts.get(only) if only else known.receipt)
        }

    @api.post("/v1/jobs/{job}/orders")
    async def orders(job: Hex32, further: FurtherOrders) -> dict[str, bool]:
        """Adds signed orders to a job that waits for a free slot, on asks that its response named in a BEAT frame.

        The job keeps its place. `added` is true if all orders are among the job's candidates now.
        """
        candidates = [_read_candidate(text, f"candidates[{i}]") for i, text in enumerate(further.candidates)]
        await context.market.add_orders(parse_job_id(job), candidates)
        return {"added": True}

    @api.post("/v1/jobs/{job}/cancel", status_code=202)
    async def cancel(job: Hex32, token: Token = None) -> dict[str, bool]:
        """Cancels a running job of the caller. The job's receipt still ends its stream, and charges for what was delivered.

        `cancelling` is false if no such job runs.
        """
        caller, job_id = read_token(token, context.market, context.now()), parse_job_id(job)
        return {"cancelling": await cancel_job(context.market, context.jobs, context.replicas, job_id, caller)}


def _read_candidate(text: str, where: str) -> Candidate:
    try:
        return Candidate.from_bytes(base64.b64decode(text, validate=True), where)
    except ValueError:
        raise BadMessage(f"{where}: expected base64") from None


def _add_tab_routes(api: FastAPI, context: ApiContext) -> None:
    @api.post("/v1/tabs")
    async def tab(question: SignedInquiry) -> dict[str, Any]:
        """Returns the payer's latest receipts from one provider, each with its order, for a client that lost its ledger.

        Receipts with the highest cumulative cost come first. The one whose order has the highest cap is always among them. The
        signed inquiry proves that the caller has the payer's key.
        """
        market = context.market
        inquiry = read_signed(Inquiry, question.model_dump()).verify(market.domain).message
        if inquiry.coordinator != market.address:
            raise Refusal(Code.ORDER_MISDIRECTED, f"inquiry.coordinator: {inquiry.coordinator}, but this is {market.address}")
        if abs(inquiry.asked_at - context.now()) > MAX_INQUIRY_AGE:
            text = f"inquiry.askedAt: more than {MAX_INQUIRY_AGE} s from this coordinator's clock; is the client's right?"
            raise Refusal(Code.UNAUTHENTICATED, text)
        # A payer with this many concurrent jobs ordered the last one that ended within as many of the last receipts.
        receipts = await context.tabs.receipts_of(inquiry.payer, inquiry.provider, market.limits.jobs_per_payer)
        return {"receipts": [late.to_json() for late in _excerpt(receipts)]}


def _excerpt(receipts: list[LateReceipt]) -> list[LateReceipt]:
    """Returns the first TAB_RECEIPTS receipts, and the one whose order has the highest ceiling."""
    highest = max(receipts, key=lambda late: late.order.message.ceiling, default=None)
    return [late for place, late in enumerate(receipts) if place < TAB_RECEIPTS or late is highest]


def _add_pages(api: FastAPI, context: ApiContext) -> None:
    @api.get("/", include_in_schema=False)
    async def home(request: Request) -> Response:
        """What this is: a page for browsers, JSON for others."""
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(home_page(context.info.name, __version__), headers=PAGE_HEADERS)
        links = {name: f"{request.base_url}{path}" for name, (path, _) in LINKS.items()}
        return JSONResponse({"message": ABOUT, "name": context.info.name, "version": __version__} | links)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """The OpenAPI document as a page."""
        return HTMLResponse(api_page(api.openapi()), headers=PAGE_HEADERS)


def _page(name: str, entries: list[dict[str, Any]], after: str | None) -> Response:
    return Response(dumps({name: entries, "next": after}), media_type="application/json")


async def _tally_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, TallyError):
        raise error
    error = error_for_peers(error)
    return JSONResponse(error.as_json(), error.status, retry_headers(error))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Handles what FastAPI itself refuses: unknown routes and methods, and bodies that it cannot decode."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == BadMessage("").status:
        return await _tally_error(request, BadMessage(f"body: {error.detail}"))
    text = f"{request.method} {request.url.path}: {error.detail}; /docs lists the routes"
    if request.url.path.removeprefix("/v1").startswith(_GATEWAY_ROUTES):
        text += ". This is a coordinator; OpenAI's and Anthropic's API are at your gateway (tally gateway, port 8421 by default)"
    refusal = Refusal(Code.UNKNOWN_ROUTE, text)
    return JSONResponse(refusal.as_json(), error.status_code, headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5])
    return await _tally_error(request, BadMessage(faults[:1000]))


async def _bug(_request: Request, _error: Exception) -> JSONResponse:
    """Answers a request that met a bug; the server logs the exception."""
    error = Unavailable(Code.COORDINATOR_UNAVAILABLE, "the coordinator failed on this request", fault=Fault.COORDINATOR)
    return JSONResponse(error.as_json(), 500)
