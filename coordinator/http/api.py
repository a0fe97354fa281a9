"""The control plane of the coordinator's HTTP API: FastAPI, with its docs. Jobs and node links have routes of their own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from coordinator.domain.ask_pages import CURSOR_PATTERN, MAX_MODEL_NAME, ask_entry, asks_page, models_page
from coordinator.domain.peer_errors import error_for_peers
from coordinator.domain.resource_bounds import DEFAULT_PAGE_ENTRIES, MAX_PAGE_ENTRIES
from coordinator.jobs.market import Market
from coordinator.ports import ClaimStore, JobStore, KnownJob, TabStore
from tallystick.protocol.access import load_access
from tallystick.protocol.demand import DEFAULT_LIMIT, MAX_ADDRESSES, Demand, Sort
from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.messages import Inquiry, Receipt
from tallystick.protocol.requirements import MAX_NAMES
from tallystick.protocol.types import Address, parse_address, parse_job_id
from tallystick.protocol.wire import MAX_CANDIDATES, dumps
from tallystick.version import __version__

Hex32 = Annotated[str, Path(pattern="^[0-9a-fA-F]{32}$", description="The job's id, 32 hex digits.")]
ProviderPath = Annotated[str, Path(pattern="^0x[0-9a-fA-F]{40}$", description="The provider's account.")]
Account = Annotated[str, Field(pattern="^0x[0-9a-fA-F]{40}$")]
Price = Annotated[int, Field(ge=0, le=10**18)]
ModelName = Annotated[str, Query(max_length=MAX_MODEL_NAME)]
_NEXT = "The `next` of a former page; empty for the first."
AfterModel = Annotated[str, Query(max_length=MAX_MODEL_NAME, description=_NEXT)]
AfterAsk = Annotated[str, Query(pattern=f"^({CURSOR_PATTERN})?$", description=_NEXT)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE_ENTRIES, description="Entries of a page, at most.")]
Token = Annotated[
    str | None,
    Security(
        APIKeyHeader(
            name="Authorization",
            scheme_name="Tally",
            description="`Tally TOKEN`: an Access message that the account's key signed for this coordinator, minutes old at"
            " most (see tallystick/protocol/access.py).",
            auto_error=False,
        )
    ),
]

TAB_RECEIPTS = 16
"""Receipts of a tab that its payer is shown."""
ASKED_SECONDS = 300
"""How far a payer's clock may be from this one when it asks for them."""


class Problem(BaseModel):
    """What was wrong, whose fault it is (`client`, `provider`, `coordinator` or `nobody`), and whether trying again may help."""

    message: str
    type: str
    param: str | None
    code: str
    fault: str
    retry: bool


class ErrorBody(BaseModel):
    """Every error of this API, in OpenAI's shape."""

    error: Problem


class Info(BaseModel):
    """Who this coordinator is and where it settles."""

    name: str
    version: str
    coordinator: str
    chainId: int
    contract: str
    token: str
    tokenDecimals: int
    feeBps: int


Names = Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=MAX_NAMES)]


class Required(BaseModel):
    """What an ask's spec must say: one of the regions, tiers, precisions and engines that are named, and all features."""

    model_config = ConfigDict(extra="forbid")

    precision: Names = []
    region: Names = []
    tier: Names = []
    engine: Names = []
    features: Names = []
    contextTokens: int = Field(default=0, ge=0, lt=1 << 32)


class ShortlistRequest(BaseModel):
    """What a client wants to buy. Prices are maxima in base units per 1,000,000 tokens, `minStake` is base units."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=MAX_MODEL_NAME)
    payer: Account
    maxInputPrice: Price | None = None
    maxOutputPrice: Price | None = None
    providers: list[Account] = Field(default_factory=list, max_length=MAX_ADDRESSES)
    exclude: list[Account] = Field(default_factory=list, max_length=MAX_ADDRESSES)
    route: str | None = Field(default=None, max_length=256)
    require: Required = Field(default_factory=Required)
    minReputation: int = Field(default=0, ge=0, le=100)
    minStake: Price = 0
    sort: Sort = "price"
    limit: int = Field(default=DEFAULT_LIMIT, ge=1, le=MAX_CANDIDATES)


class InquiryMembers(BaseModel):
    """A payer's question to this coordinator, and the Unix time at which it was asked."""

    model_config = ConfigDict(extra="forbid")

    payer: Account
    provider: Account
    coordinator: Account
    askedAt: str = Field(pattern="^(0|[1-9][0-9]{0,18})$")


class SignedInquiry(BaseModel):
    """The question and its payer's EIP-712 signature."""

    model_config = ConfigDict(extra="forbid")

    message: InquiryMembers
    signature: str = Field(pattern="^0x[0-9a-fA-F]{130}$")


@dataclass(frozen=True, slots=True)
class ApiContext:
    """What the API serves: the parts that the root composed."""

    market: Market
    connected: Callable[[], int]
    """How many nodes are connected."""
    jobs: JobStore
    claims: ClaimStore
    tabs: TabStore
    info: Info
    now: Callable[[], float] = time.time


def build_control_plane(context: ApiContext) -> FastAPI:
    """The control plane's routes."""
    api = FastAPI(
        title="Tallystick coordinator",
        version=__version__,
        description="Matches signed orders to signed asks and relays ciphertext. Jobs themselves are posted to `/v1/jobs` as"
        " binary frames (see tallystick/protocol/wire.py), nodes connect to the WebSocket `/v1/node`.",
        responses={
            "4XX": {"model": ErrorBody, "description": "The request cannot be met; the error says why."},
            "5XX": {"model": ErrorBody, "description": "No provider, or this coordinator, can meet it now."},
        },
    )
    api.openapi = functools.partial(_document, api)  # type: ignore[method-assign]  # FastAPI's own way of changing it
    api.add_exception_handler(TallyError, _tally_error)
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _bug)
    _describe_market(api, context)
    _describe_providers(api, context)
    _describe_jobs(api, context)
    _describe_tabs(api, context)
    _describe_operations(api, context)
    return api


def _document(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI adds to every route: what does not fit is a 400 here, as everywhere."""
    if not api.openapi_schema:
        made = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        api.openapi_schema = made
    return api.openapi_schema


def _describe_market(api: FastAPI, context: ApiContext) -> None:
    @api.get("/v1/info")
    async def info() -> Info:
        """Who this coordinator is, and the chain and contract that every signature must bind."""
        return context.info

    @api.get("/v1/models")
    async def models(after: AfterModel = "", limit: Limit = DEFAULT_PAGE_ENTRIES) -> Response:
        """The models on offer, with their lowest prices (base units per 1,000,000 tokens), by name. `next` is the `after` of the
        next page, null on the last. A page may have fewer entries than asked for.
        """
        return _page("data", *models_page(context.market.book, after, limit))

    @api.get("/v1/asks")
    async def asks(model: ModelName, after: AfterAsk = "", limit: Limit = DEFAULT_PAGE_ENTRIES) -> Response:
        """The signed asks for a model, cheapest first, by pages. `next` is the `after` of the next page, null on the last.
        A page may have fewer entries than asked for.
        """
        return _page("asks", *asks_page(context.market.book, model, after, limit))

    @api.post("/v1/explain")
    async def explain(request: ShortlistRequest) -> dict[str, Any]:
        """Every ask for the model, and why it would not be on the shortlist, in the order that the demand sorts by."""
        told = context.market.matchmaker.explain(await _learned(context, request))
        score = context.market.reputation.score
        return {
            "asks": [
                ask_entry(listed_ask)
                | {
                    "why": None if reason is None else reason.value,
                    "tokensPerSecond": listed_ask.node.capacity.tokens_per_second,
                    "firstTokenMs": listed_ask.node.capacity.first_token_ms,
                    "reputation": round(100 * score(listed_ask.node.provider)),
                }
                for listed_ask, reason in told
            ]
        }

    @api.post("/v1/shortlist")
    async def shortlist(request: ShortlistRequest) -> dict[str, Any]:
        """The best signed asks for a request, best first; the error tells why there is none."""
        demand = await _learned(context, request)
        return {"asks": [ask_entry(listed_ask) for listed_ask in context.market.matchmaker.shortlist(demand)]}


async def _learned(context: ApiContext, request: ShortlistRequest) -> Demand:
    """The demand, once all that it asks for is known."""
    if request.minStake:
        await context.market.matchmaker.load_stakes(request.model)
    return Demand.from_json(request.model_dump(exclude_unset=True))


def _describe_providers(api: FastAPI, context: ApiContext) -> None:
    @api.get("/v1/providers/{provider}/why")
    async def why(provider: ProviderPath, limit: Annotated[int, Query(ge=1, le=500)] = 50) -> dict[str, Any]:
        """Why a provider got work or did not: the last decisions that concerned it, newest first. They name no payer."""
        address, market = parse_address(provider), context.market
        return {
            "provider": address,
            "connected": market.book.node(address) is not None,
            "decisions": [asdict(verdict) for verdict in market.decision_log.verdicts(address, market.book, limit)],
        }


def _describe_jobs(api: FastAPI, context: ApiContext) -> None:
    @api.get("/v1/jobs/{job}")
    async def show(job: Hex32, token: Token = None) -> dict[str, Any]:
        """A job's state, its attempts, its receipt and what the chain paid. Its payer reads all of it; a provider of one of its
        attempts reads that attempt alone.
        """
        caller = _caller(context, token)
        known = await context.jobs.job(parse_job_id(job))
        if known is None:
            raise Refusal(Code.UNKNOWN_JOB, f"no job {job} here")
        mine = None if caller == known.record.payer else caller
        if mine is not None and known.record.attempt_of(mine) is None:
            raise Refusal(Code.UNAUTHENTICATED, f"{caller} is neither the payer of job {job} nor a provider that had it")
        return _job(job, known, mine) | {
            "settlement": await _settlement(context, known.receipts.get(mine) if mine else known.receipt)
        }

    @api.post("/v1/jobs/{job}/cancel", status_code=202)
    async def cancel(job: Hex32, token: Token = None) -> dict[str, bool]:
        """Stops a running job of the caller's; its receipt ends the job's stream. `cancelling` is false where none runs."""
        caller, number = _caller(context, token), parse_job_id(job)
        payer = context.market.payer_of(number)
        if payer not in {None, caller}:
            raise Refusal(Code.UNAUTHENTICATED, f"{caller} is not the payer of job {job}; only its payer cancels a job")
        return {"cancelling": context.market.cancel(number)}


def _caller(context: ApiContext, token: str | None) -> Address:
    """Whose key signed the token. Raises Refusal (unauthenticated) or BadSignature."""
    try:
        return load_access(token, context.market.domain, context.market.address, context.now())
    except BadMessage as error:
        raise Refusal(Code.UNAUTHENTICATED, str(error)) from error


def _describe_tabs(api: FastAPI, context: ApiContext) -> None:
    @api.post("/v1/tabs")
    async def tab(question: SignedInquiry) -> dict[str, Any]:
        """A payer's own last receipts of a provider, highest total first, each with the order behind it, for a client that lost
        its books. Those of the newest seqs are among them, and the one whose order has the highest ceiling. Who asks shows with
        a signed inquiry that the payer's key is theirs.
        """
        market = context.market
        asked = read_signed(Inquiry, question.model_dump()).verify(market.domain).message
        if asked.coordinator != market.address:
            raise Refusal(Code.ORDER_MISDIRECTED, f"inquiry.coordinator: {asked.coordinator}, but this is {market.address}")
        if abs(asked.asked_at - context.now()) > ASKED_SECONDS:
            text = f"inquiry.askedAt: more than {ASKED_SECONDS} s from this coordinator's clock; is the client's right?"
            raise Refusal(Code.UNAUTHENTICATED, text)
        # Who runs so many jobs at once ordered the last one that ended within as many of the last receipts.
        found = await context.tabs.receipts_of(asked.payer, asked.provider, market.limits.jobs_per_payer)
        return {"receipts": [late.to_json() for late in _telling(found)]}


def _telling(found: list[LateReceipt]) -> list[LateReceipt]:
    highest = max(found, key=lambda late: late.order.message.ceiling, default=None)
    return [late for place, late in enumerate(found) if place < TAB_RECEIPTS or late is highest]


def _describe_operations(api: FastAPI, context: ApiContext) -> None:
    registry = CollectorRegistry()
    gauges = {
        "tallystick_nodes_connected": ("Nodes connected.", context.connected),
        "tallystick_asks_standing": ("Asks in the book.", lambda: context.market.book.size),
        "tallystick_jobs_live": ("Jobs between order and terminal state.", lambda: context.market.live),
    }
    for name, (text, read) in gauges.items():
        Gauge(name, text, registry=registry).set_function(read)

    @api.get("/v1/health")
    async def health() -> dict[str, Any]:
        """Whether this process serves, and how many nodes and asks it has."""
        return {"status": "ok", "nodes": context.connected(), "asks": context.market.book.size, "jobs": context.market.live}

    @api.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _page(name: str, entries: list[dict[str, Any]], after: str | None) -> Response:
    return Response(dumps({name: entries, "next": after}), media_type="application/json")


def _job(job: str, known: KnownJob, mine: Address | None) -> dict[str, Any]:
    """What is told of a job; `mine`: only of this provider's attempt."""
    record = known.record
    attempts = []
    for number, attempt in enumerate(record.attempts):
        if mine not in {None, attempt.provider}:
            continue
        receipt = known.receipts.get(attempt.provider)
        told = {"attempt": number, "provider": attempt.provider, "state": attempt.state.value, "reason": attempt.reason}
        attempts.append(told | {"receipt": receipt.to_json() if receipt else None})
    return {
        "job": job,
        "state": record.state.value,
        "model": record.last.terms.model,
        "payer": record.payer,
        "createdAt": record.created_at,
        "finishedAt": record.finished_at,
        "attempts": attempts,
        "receipt": attempts[-1]["receipt"],
    }


async def _settlement(context: ApiContext, receipt: Signed[Receipt] | None) -> dict[str, Any] | None:
    if receipt is None:
        return None
    settled = await context.claims.settlement(receipt.message.payer, receipt.message.provider)
    if settled is None or settled.settled < receipt.message.cumulative_cost:
        return None
    return {"tx": settled.tx, "settled": str(int(settled.settled)), "block": settled.block}


async def _tally_error(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, TallyError):
        raise error
    error = error_for_peers(error)
    return JSONResponse(error.as_json(), error.status)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI refuses by itself: routes and methods that do not exist, and bodies that it cannot decode."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == BadMessage("").status:
        return await _tally_error(request, BadMessage(f"body: {error.detail}"))
    told = Refusal(Code.UNKNOWN_ROUTE, f"{request.method} {request.url.path}: {error.detail}; /docs lists the routes")
    return JSONResponse(told.as_json(), error.status_code, headers=error.headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:5])
    return await _tally_error(request, BadMessage(faults[:1000]))


async def _bug(_request: Request, _error: Exception) -> JSONResponse:
    """The client's part of a bug; the server logs the rest."""
    told = Unavailable(Code.COORDINATOR_UNAVAILABLE, "the coordinator failed on this request", fault=Fault.COORDINATOR)
    return JSONResponse(told.as_json(), 500)
