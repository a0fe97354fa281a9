"""The daemon: the node's composition root. It makes the components, wires them, and runs them until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import structlog

from node.chain.collector import Collector
from node.chain.watcher import ChainWatcher
from node.coordinator.coordinator_http import CoordinatorHttp
from node.coordinator.coordinator_links import CoordinatorLinks, LinkMaker
from node.coordinator.link import NodeLink
from node.coordinator.link_settings import node_url
from node.coordinator.match_watch import MatchWatch
from node.coordinator.ratings import Ratings
from node.coordinator.receipt_sender import ReceiptSender
from node.coordinator.router import LinkRouter
from node.coordinator.state_recovery import StateRecovery
from node.domain.published_asks import PublishedAsks, Seller
from node.domain.tabs import Tabs
from node.jobs.coordinator_credit import HOUR, HOURS, CoordinatorCredit
from node.jobs.doubtful_receipts import DoubtfulReceipts
from node.jobs.receipt_signer import ReceiptSigner
from node.jobs.runner import JobRunner
from node.pages.provider_pages import ProviderPages
from node.service.ask_publisher import AskPublisher
from node.service.config import NodeConfig
from node.service.engine_pool import EnginePool
from node.service.job_tracing import job_tracing
from node.service.metrics import NodeMetrics
from node.service.node import Node
from node.service.observing import make_metrics, observe
from node.service.pages import make_pages
from node.service.record_pruner import RecordPruner
from node.service.resources import Resources, open_resources
from node.service.status import health, status
from node.service.status_socket import serve_status
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.link import Listing, endpoint_of
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import Address
from tallystick.runtime.connection_limiter import ConnectionLimits
from tallystick.runtime.logs import configure
from tallystick.runtime.serving import serving
from tallystick.runtime.trusted_proxies import TrustedProxies
from tallystick.tracing.export import SpanExport, exporting
from tallystick.web.error_pages import ErrorPages

log = structlog.get_logger()
ListingFor = Callable[[str, Address], Listing]
"""Returns what is offered to a coordinator, given its dialled address and its account."""


async def run(
    config: NodeConfig,
    signer: Signer,
    read_config: Callable[[], NodeConfig] | None = None,
    config_file: Path | None = None,
) -> None:
    """Runs a node until SIGTERM or SIGINT.

    It then takes no new jobs, lets running ones finish within `config.shutdown_grace` seconds, submits its claims and returns. On
    SIGHUP it applies the config that `read_again` returns, without an interruption. Raises TallyError if it cannot start: a bad
    config, a state of another key, no engine.
    """
    configure(json=config.log_json, level=config.log_level)
    async with AsyncExitStack() as stack:
        node = await build(config, signer, stack, config_file)
        if read_config is not None:
            stack.enter_context(_on_hangup(lambda: node.reload(read_config)))
        if config.metrics_port is not None:
            app = ErrorPages(node.metrics.app(partial(health, node), node.health, node.pages.routes()), node.pages.pages)
            limits = ConnectionLimits(proxies=TrustedProxies.parse(config.trusted_proxies))
            port = await stack.enter_async_context(serving(app, config.metrics_host, config.metrics_port, limits=limits))
            log.info("metrics, health and pages", host=config.metrics_host, port=port)
        await stack.enter_async_context(serve_status(config.state, partial(status, node)))
        await node.run()


async def build(config: NodeConfig, signer: Signer, stack: AsyncExitStack, config_file: Path | None = None) -> Node:
    """Makes and wires the components of a node; the stack closes them. Raises TallyError."""
    export = await stack.enter_async_context(exporting(config.tracing, "tallystick-node", trusts_parent=False))
    resources = await open_resources(config, signer, stack, config_file)
    domain, store, chain = resources.domain, resources.store, resources.chain
    engine_suspected = asyncio.Event()
    tabs = await _tabs(config, resources)
    asks = _published_asks(config, resources)
    metrics = make_metrics(config, tabs, engine_suspected)
    links = CoordinatorLinks(signer.address, config.all_coordinators, config.link)
    http = CoordinatorHttp(links.limit_of)
    match_watch = MatchWatch(domain, config.state / "match-log", links.url_of, http)
    state_recovery = await _state_recovery(config, signer, resources, tabs, links)
    coordinator_credit = await _coordinator_credit(config, resources, metrics)
    receipt_sender = ReceiptSender(store, config.receipt_resend_interval)
    # A state that was restored may lack later receipts and claims, on which those that it has may rest.
    in_doubt = () if state_recovery.problem else await store.doubtful_receipts()
    doubtful_receipts = DoubtfulReceipts(store, tabs, in_doubt)

    def is_ready(coordinator: Address) -> bool:
        """Whether jobs of a coordinator may be taken: all receipts there are known, and none is in doubt."""
        return state_recovery.is_complete(coordinator) and doubtful_receipts.is_decided(coordinator)

    runner = await _job_runner(
        config,
        resources,
        asks=asks,
        tabs=tabs,
        metrics=metrics,
        links=links,
        match_watch=match_watch,
        is_ready=is_ready,
        coordinator_credit=coordinator_credit,
        receipt_sender=receipt_sender,
        export=export,
    )
    router = LinkRouter(runner, receipt_sender, doubtful_receipts, state_recovery, match_watch)
    listing = _listing_for(asks, resources.engine_pool, runner, is_ready, coordinator_credit)
    links.make_link = _link_maker(config, signer, links, router, listing)
    resources.engine_pool.on_change = links.announce_capacity
    state_recovery.on_complete = partial(_on_ready, links, router)
    tabs.on_stale_state, coordinator_credit.on_change = links.announce_asks, links.announce_asks
    doubtful_receipts.on_decided = partial(_on_ready, links, router)
    doubtful_receipts.start()
    doubtful_receipts.on_voided = router.close_voided
    doubtful_receipts.on_unpaid, doubtful_receipts.on_kept = coordinator_credit.record_unpaid, receipt_sender.refused
    watcher = ChainWatcher(
        chain, chain, tabs, connected=links.coordinators, max_fee_bps=lambda: node.config.admission.max_fee_bps
    )
    node = Node(
        config=config,
        runner=runner,
        receipt_sender=receipt_sender,
        state_recovery=state_recovery,
        chain_watcher=watcher,
        links=links,
        collector=_collector(config, resources, tabs, metrics, links, in_doubt=doubtful_receipts.concern),
        payouts=resources.payouts,
        ask_publisher=_ask_publisher(config, resources.engine_pool, asks, links.announce_asks, engine_suspected),
        metrics=metrics,
        asks=asks,
        engine_pool=resources.engine_pool,
        chain=chain,
        tabs=tabs,
        engine_suspected=engine_suspected,
        coordinator_credit=coordinator_credit,
        match_watch=match_watch,
        ratings=_ratings(asks, links, http),
        record_pruner=RecordPruner(store, config.job_keep_seconds),
    )
    node.pages = _pages(node, resources)
    node.health = observe(node, store, resources.chain_health)
    stack.push_async_callback(node.health.close)
    return node


async def _job_runner(
    config: NodeConfig,
    resources: Resources,
    *,
    asks: PublishedAsks,
    tabs: Tabs,
    metrics: NodeMetrics,
    links: CoordinatorLinks,
    match_watch: MatchWatch,
    is_ready: Callable[[Address], bool],
    coordinator_credit: CoordinatorCredit,
    receipt_sender: ReceiptSender,
    export: SpanExport | None,
) -> JobRunner:
    """Makes what runs jobs, with the orders that it has seen before and those that it left unfinished."""
    signer, domain, store, now = resources.signer, resources.domain, resources.store, int(time.time())
    unfinished = await store.unfinished_orders(now)
    return JobRunner(
        provider=signer.address,
        domain=domain,
        sealing_key=resources.sealing_key,
        asks=asks,
        engines=resources.engine_pool.engines,
        receipt_signer=ReceiptSigner(signer=signer, domain=domain, tabs=tabs, store=store, unfinished=unfinished),
        tabs=tabs,
        store=store,
        chain=resources.chain,
        observer=metrics,
        coordinator_credit=coordinator_credit,
        rules=config.admission_rules,
        deadlines=config.deadlines,
        consumed_orders=dict(await store.consumed_orders(now)),
        on_capacity_change=links.announce_capacity,
        may_take_jobs=lambda link: is_ready(link.coordinator),
        on_match=match_watch.on_match,
        on_client_head=match_watch.on_client_head,
        on_stranded_receipt=receipt_sender.resend_now,
        tracing=job_tracing(export, config.tracing, resources.engine_pool, metrics),
        tiers=config.access,
    )


def _pages(node: Node, resources: Resources) -> ProviderPages:
    """Makes the provider's pages."""
    return make_pages(
        node.config,
        resources.signer.address,
        resources.escrow,
        status=partial(status, node),
        store=resources.store,
        least=lambda: node.config.claims.direct_min_amount,
        ask=node.ratings.ask_decisions,
    )


def _ratings(asks: PublishedAsks, links: CoordinatorLinks, http: CoordinatorHttp) -> Ratings:
    """Makes the component that watches how coordinators rate this node."""
    return Ratings(
        asks.provider,
        lambda: (link.url for link in links if link.session is not None),
        lambda: ((ask.message.model, precision_class(ask.message.spec.precision)) for ask in asks.current),
        fetch=http.fetch_json,
    )


async def _tabs(config: NodeConfig, resources: Resources) -> Tabs:
    """Loads what each payer owes."""
    now = int(time.time())
    tabs = Tabs(config.credit_limits, await resources.store.tabs(now))
    tabs.expire(now)
    return tabs


def _published_asks(config: NodeConfig, resources: Resources) -> PublishedAsks:
    """Makes the asks of this node, none published yet."""
    signer, domain = resources.signer, resources.domain
    seller = Seller(signer.address, config.sealing_suite, resources.sealing_key.public, config.ask_validity)
    return PublishedAsks(seller, lambda ask: signer.sign(ask, domain))


async def _coordinator_credit(config: NodeConfig, resources: Resources, metrics: NodeMetrics) -> CoordinatorCredit:
    """Makes the component that bounds what each coordinator can have this node do for nothing."""
    hours = await resources.store.coordinator_hours(int(time.time()) // HOUR - HOURS)
    return CoordinatorCredit(resources.store, config.admission, hours, alarm=metrics.coordinator_suspended)


async def _state_recovery(
    config: NodeConfig, signer: Signer, resources: Resources, tabs: Tabs, links: CoordinatorLinks
) -> StateRecovery:
    """Makes the component that asks each coordinator for the receipts that this key signed there."""
    return StateRecovery(
        resources.store,
        tabs,
        domain=resources.domain,
        provider=signer.address,
        completed=await resources.store.completed_recoveries(),
        required=map(node_url, config.all_coordinators),
        skipped=map(node_url, config.skip_recovery),
        url_of=links.seed_of,
    )


def _collector(
    config: NodeConfig,
    resources: Resources,
    tabs: Tabs,
    metrics: NodeMetrics,
    links: CoordinatorLinks,
    *,
    in_doubt: Callable[[Address], bool],
) -> Collector:
    """Makes the component that turns receipts into money."""
    return Collector(
        signer=resources.signer,
        domain=resources.domain,
        store=resources.store,
        chain=resources.chain,
        link=links.session,
        policy=config.claims,
        on_funds=tabs.observe,
        on_check=tabs.expire,
        in_doubt=in_doubt,
        settlement=resources.settlement,
        alarm=metrics.alarm,
    )


def _listing_for(
    asks: PublishedAsks,
    engine_pool: EnginePool,
    runner: JobRunner,
    is_ready: Callable[[Address], bool],
    coordinator_credit: CoordinatorCredit,
) -> ListingFor:
    """Returns what decides the asks of a coordinator: none before its jobs may be taken, and none while it is suspended."""

    def listing_for(endpoint: str, coordinator: Address) -> Listing:
        if not (is_ready(coordinator) and coordinator_credit.serves(endpoint)):
            return Listing((), (), {})
        return engine_pool.listing(asks, runner.capacities())

    return listing_for


def _on_ready(links: CoordinatorLinks, router: LinkRouter) -> None:
    """Offers asks and closes unfinished orders, after a coordinator said which receipts it has."""
    links.announce_asks()
    router.close_unfinished()


def _ask_publisher(
    config: NodeConfig, engine_pool: EnginePool, asks: PublishedAsks, changed: Callable[[], None], engine_suspected: asyncio.Event
) -> AskPublisher:
    """Makes the component that checks the engines and publishes the asks."""
    return AskPublisher(
        asks=asks,
        engines=engine_pool.engines,
        make_offers=engine_pool.make_offers,
        on_change=changed,
        engine_suspected=engine_suspected,
        check_interval=config.engine_check_interval,
    )


def _link_maker(
    config: NodeConfig, signer: Signer, links: CoordinatorLinks, router: LinkRouter, listing: ListingFor
) -> LinkMaker:
    """Returns what makes a link; `coordinator_address` is the account of the first configured coordinator."""

    def make_link(url: str, *, seed: str | None, coordinator: Address | None) -> NodeLink:
        pinned = config.coordinator_address if url == node_url(config.coordinator) else None
        return NodeLink(
            url,
            signer=signer,
            domain=router.runner.domain,
            handler=router,
            listing=partial(listing, endpoint_of(seed or url)),
            capacities=router.runner.capacities,
            settings=config.link,
            coordinator=coordinator or pinned,
            log_head=router.match_watch.head_of,
            observer=links,
            seed=seed,
            takes_trace=router.runner.traces.enabled,
        )

    return make_link


@contextlib.contextmanager
def _on_hangup(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` on SIGHUP, where the system has that signal."""
    number = getattr(signal, "SIGHUP", None)
    loop = asyncio.get_running_loop()
    if number is not None:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        if number is not None:
            loop.remove_signal_handler(number)
