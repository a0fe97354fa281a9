"""The composition root: builds the coordinator's parts from the config, starts them in order and stops them in reverse.

At a stop, live jobs have `drain_seconds` to end. If a background task fails, the whole coordinator stops with its error. Either
way, the nodes of jobs that are left are told to stop, and have DISMISS_SECONDS to say how those ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import structlog
from starlette.types import Receive, Scope, Send

from coordinator.bus.in_process import InProcessBus
from coordinator.chain.escrow_cache import EscrowCache
from coordinator.chain.fee_check import FeeCheck
from coordinator.chain.settler import Settler
from coordinator.config import CoordinatorConfig
from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.resource_bounds import MAX_LINK_FRAME
from coordinator.health_checks import HealthChecks, health_checks
from coordinator.http.account_routes import Accounts
from coordinator.http.api import ApiContext, build_control_plane
from coordinator.http.client_hub import METHOD as LINK_METHOD
from coordinator.http.client_hub import ClientHub
from coordinator.http.job_service import JobService
from coordinator.http.jobs_route import PATH as JOBS_PATH
from coordinator.http.jobs_route import JobsRoute
from coordinator.http.log_proof_route import LogProofRoute
from coordinator.http.metrics import PREFIX, CoordinatorMetrics
from coordinator.http.node_hub import NodeHub
from coordinator.http.request_bodies import RequestBodies
from coordinator.http.request_limiter import RequestLimiter
from coordinator.http.response_buffer import Retention
from coordinator.http.schemas import Info
from coordinator.jobs.accounts import AccessTiers, SettledAmounts
from coordinator.jobs.job_retention import JobRetention
from coordinator.jobs.market import Market
from coordinator.jobs.market_load import MarketLoad
from coordinator.pages.market_pages import WALLET_PATH, MarketPages
from coordinator.ports import ResponseStore
from coordinator.replication import Replication
from coordinator.storage.store import Store
from tallystick.chain.contract_signature import is_contract_signature
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc, Sender
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.job_link import LINK_PATH
from tallystick.runtime import logs
from tallystick.runtime.access_log import Access, AccessLog
from tallystick.runtime.plaintext import is_loopback
from tallystick.runtime.serving import SharedPort, serving, wait_for_stop_signal
from tallystick.tracing.export import SpanExport, exporting
from tallystick.tracing.metrics import SpanCollector
from tallystick.tracing.spans import Tracer
from tallystick.version import __version__
from tallystick.web.error_pages import ErrorPages
from tallystick.web.wallet_page import WalletPage
from tallystick.web.wallet_sign_in import WalletSignIn

log = structlog.get_logger()
Loop = Callable[[], Coroutine[Any, Any, None]]
SWEEP_SECONDS = 1
DISMISS_SECONDS = 2
"""A node that is told to stop answers at once. One that does not answer is cut off."""
SIGN_IN_STATEMENT = "Sign in to this Tallystick coordinator. This sends no transaction and spends nothing."
NODE_PATH = "/v1/node"
_JOBS = frozenset({(JOBS_PATH, "POST"), (LINK_PATH, LINK_METHOD)})
"""Path and method of jobs in the access log."""


class App:
    """The ASGI app: raw routes for jobs, for the links of clients and for those of nodes, and FastAPI for everything else."""

    def __init__(
        self,
        context: ApiContext,
        hub: NodeHub,
        responses: ResponseStore,
        *,
        retention: Retention | None = None,
        intake: IntakeLimits | None = None,
        rate_limiter: RateLimiter | None = None,
        wallet: WalletPage | None = None,
        load: MarketLoad | None = None,
    ) -> None:
        """`rate_limiter`: the limits per address, shared with the node hub. `load`: the jobs of all replicas."""
        limits = intake or IntakeLimits()
        shared, bodies = rate_limiter or RateLimiter(limits, time.monotonic), RequestBodies(limits)
        service = JobService(
            *(context.market, responses),
            intake=limits,
            retention=retention,
            rate_limiter=shared,
            bodies=bodies,
            tiers=context.accounts.tiers,
            refusals=context.accounts.refusals,
        )
        self._jobs, self.clients = JobsRoute(service), ClientHub(service, self._observe)
        self._hub = hub
        api = build_control_plane(context)
        name, connected = context.info.name, context.connected
        self.pages = MarketPages(
            *(context.market, context.health),
            name=name,
            connected=connected,
            views=context.views,
            wallet=wallet,
            load=load,
            now=context.now,
        )
        self.pages.add_to(api)
        control_plane = LogProofRoute(api, context.market.match_log)
        self._limiter = RequestLimiter(control_plane, shared, bodies)
        self._control = ErrorPages(self._limiter, self.pages.pages)
        self._metrics, self._logged = context.metrics, AccessLog(self._route, self._observe)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serves one connection, and logs it if it is a request. Thousands may be open, so only what serves it is a coroutine."""
        return self._logged(scope, receive, send)

    def _observe(self, access: Access) -> None:
        if (access.path, access.method) in _JOBS:
            self._metrics.job_ended(access.outcome, access.seconds, access.first_seconds, access.sent_bytes)

    def _route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and scope["path"] == JOBS_PATH and scope["method"] == "POST":
            return self._jobs(scope, receive, send)
        if scope["type"] == "websocket" and scope["path"] == LINK_PATH:
            return self.clients.serve(scope, receive, send)
        if scope["type"] == "websocket" and scope["path"] == NODE_PATH:
            return self._hub.serve(scope, receive, send)
        return self._control(scope, receive, send)


async def run(config: CoordinatorConfig, signer: Signer, shared: SharedPort | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Raises TallyError if the coordinator cannot start."""
    logs.configure(json=config.log_json, level=config.log_level)
    async with running(config, signer, shared) as port:
        log.info("coordinator ready", address=signer.address, url=f"http://{config.host}:{port}")
        await wait_for_stop_signal()
        log.info("stopping")


@contextlib.asynccontextmanager
async def running(config: CoordinatorConfig, signer: Signer, shared: SharedPort | None = None) -> AsyncIterator[int]:
    """Runs the whole coordinator while the context lasts. Yields the bound port.

    `shared`: a second port, on which other replicas on this machine listen too.
    """
    async with (
        exporting(config.tracing, "tallystick-coordinator", trusts_parent=False) as export,
        _serving(config, signer, shared, export) as port,
    ):
        yield port


@contextlib.asynccontextmanager
async def _serving(
    config: CoordinatorConfig, signer: Signer, shared: SharedPort | None, export: SpanExport | None
) -> AsyncIterator[int]:
    """Runs the coordinator, whose spans go to `export`."""
    deployment = _deployment(config)
    rpc = Rpc(config.rpc or deployment.rpc)
    store = Store(config.db, replica=secrets.token_hex(8) if config.bus else "")
    try:
        await store.start()
        parts = await _build(config, deployment, signer, rpc, store, export=export)
        try:
            server = serving(
                *(parts.app, config.host, config.port),
                limits=config.connection_limits,
                ws_max_size=MAX_LINK_FRAME,
                shared=shared,
            )
            async with server as port, _background(*parts.loops):
                try:
                    await parts.replication.join(parts.hub, port)
                    yield port
                    await parts.replication.leave()
                    if shared is not None:
                        shared.leave()
                    await parts.market.drain(config.drain_seconds)
                finally:
                    await parts.market.dismiss_nodes(DISMISS_SECONDS)
                    await parts.hub.close()
                    await parts.app.clients.close()
        finally:
            await parts.replication.close()
            await parts.funds.close()
            await parts.health.close()
    finally:
        await store.close()
        await rpc.close()


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a coordinator consists of besides its store and its connection to the chain. `loops` run while it serves."""

    market: Market
    hub: NodeHub
    app: App
    replication: Replication
    funds: EscrowCache
    health: HealthChecks
    loops: Sequence[Loop]


async def _build(
    config: CoordinatorConfig, deployment: Deployment, signer: Signer, rpc: Rpc, store: Store, *, export: SpanExport | None
) -> _Parts:
    """Makes and wires the parts, and reads what a start needs from the store and the chain. Raises TallyError."""
    escrow = Escrow(rpc, deployment)
    fees = FeeCheck(escrow, signer.address, config.fee_bps)
    await fees.check_at_start()
    bus, funds = InProcessBus(), EscrowCache(escrow, config.funds_ttl)
    tracer = None if export is None else export.tracer
    market = _market(config, deployment, signer, bus=bus, store=store, funds=funds, tracer=tracer)
    await market.start()
    settler = _settler(config, escrow, Sender(rpc, signer, confirmations=config.confirmations), store, market)
    rate_limiter = RateLimiter(config.intake_limits, time.monotonic)
    hub = NodeHub(
        market,
        bus,
        store,
        settler.accept_claim,
        per_address=config.max_nodes_per_address,
        rate_limiter=rate_limiter,
        endpoints=config.endpoints,
    )
    replication = Replication(config, store.replica, market, store.load_totals)
    health = health_checks(config, deployment, signer.address, store, {**replication.checks, "claims": settler.check})
    metrics = _metrics(store, settler, health, export)
    context = ApiContext(
        *(market, lambda: hub.connected, store, store, store, _info(config, deployment, signer), health.monitor, metrics),
        _accounts(config, deployment, signer, rpc, store),
        replicas=replication.view,
    )
    app = App(
        *(context, hub, store),
        retention=config.retention,
        intake=config.intake_limits,
        rate_limiter=rate_limiter,
        load=replication.load,
        wallet=WalletPage(escrow, WALLET_PATH),
    )
    loops = (
        *(fees.run, partial(_sweep, market, app.pages), market.match_log.run, store.guard, health.monitor.run),
        *(partial(store.roles.run, _roles(config, settler, store)), *replication.loops),
        *((settler.watch, market.follow) if store.replica else ()),
    )
    return _Parts(market, hub, app, replication, funds, health, loops)


def _metrics(store: Store, settler: Settler, health: HealthChecks, export: SpanExport | None) -> CoordinatorMetrics:
    metrics = CoordinatorMetrics(lambda: health.monitor.last)
    settler.on_settled, store.database.on_commit = metrics.settled, metrics.committed
    if export is not None:
        metrics.registry.register(SpanCollector(PREFIX, export.counts.by_outcome))
    metrics.watch_writes(lambda: store.queued)
    return metrics


def _market(
    config: CoordinatorConfig,
    deployment: Deployment,
    signer: Signer,
    *,
    bus: InProcessBus,
    store: Store,
    funds: EscrowCache,
    tracer: Tracer | None,
) -> Market:
    return Market(
        domain=deployment.domain,
        signer=signer,
        bus=bus,
        store=store,
        log_store=store.match_log,
        report_store=store.reports,
        funds=funds,
        limits=config.job_limits,
        shared=store.shared,
        tracer=tracer,
    )


def _settler(config: CoordinatorConfig, escrow: Escrow, sender: Sender, store: Store, market: Market) -> Settler:
    return Settler(
        escrow=escrow,
        sender=sender,
        store=store,
        exposure=market.exposure,
        interval=config.settle_interval,
        min_claim=config.min_claim,
        min_claim_row=config.min_claim_row,
        confirmations=config.confirmations,
    )


def _accounts(config: CoordinatorConfig, deployment: Deployment, signer: Signer, rpc: Rpc, store: Store) -> Accounts:
    sign_in = WalletSignIn(
        origins=config.public_urls,
        chain_id=deployment.chain_id,
        key=signer.secret,
        statement=SIGN_IN_STATEMENT,
        store=store.sessions,
        check_contract=partial(is_contract_signature, rpc),
    )
    settled = SettledAmounts(store.accounts, time.monotonic)
    tiers = AccessTiers(config.access, settled, time.monotonic) if config.tiers else None
    return Accounts(sign_in, store.accounts, settled, tiers=tiers)


def _roles(config: CoordinatorConfig, settler: Settler, store: Store) -> Mapping[str, Loop]:
    """Returns what one replica does for all, by role. A lone coordinator does all of it."""
    retention = JobRetention(store, config.job_keep_seconds, time.time)
    return {"settler": settler.run, "retention": retention.run, "recovery": store.recover}


@contextlib.asynccontextmanager
async def _background(*loops: Loop) -> AsyncIterator[None]:
    """Runs endless loops while the context lasts. A loop that fails ends the context with its error."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop()) for loop in loops]
            yield
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as failures:
        expected, bugs = failures.split(TallyError)
        if expected is not None and bugs is None:
            raise expected.exceptions[0] from None
        raise


def _deployment(config: CoordinatorConfig) -> Deployment:
    try:
        return Deployment.load(config.deployment)
    except OSError as error:
        raise BadMessage(f"deployment {config.deployment}: {error.strerror}; `tally deploy` writes one") from error


async def _sweep(market: Market, pages: MarketPages) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        market.sweep()
        pages.sample()


def _info(config: CoordinatorConfig, deployment: Deployment, signer: Signer) -> Info:
    rpc = config.rpc or deployment.rpc
    return Info(
        name=config.name,
        version=__version__,
        coordinator=signer.address,
        chainId=deployment.chain_id,
        contract=deployment.escrow,
        token=deployment.token,
        tokenDecimals=deployment.token_decimals,
        feeBps=config.fee_bps,
        block=deployment.block,
        rpc=rpc if is_loopback(urlsplit(rpc).hostname or "") else None,
    )
