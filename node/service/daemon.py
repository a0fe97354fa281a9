"""The daemon: the node's composition root. It makes the components, wires them, runs them until SIGTERM, and stops them in
order.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import structlog

from node.chain.collector import Collector
from node.chain.escrow_view import EscrowView
from node.chain.payouts import Payouts, check_policy
from node.chain.watcher import ChainWatcher
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
from node.domain.tier_prices import TierPrices
from node.jobs.coordinator_credit import HOUR, HOURS, CoordinatorCredit
from node.jobs.receipt_signer import ReceiptSigner
from node.jobs.runner import JobRunner
from node.pages.provider_pages import ProviderPages
from node.service.ask_publisher import AskPublisher
from node.service.config import NodeConfig
from node.service.engine_pool import EnginePool
from node.service.job_tracing import job_tracing
from node.service.metrics import NodeMetrics
from node.service.observing import make_metrics, observe
from node.service.pages import make_pages
from node.service.record_pruner import RecordPruner
from node.service.resources import Resources, open_resources
from node.service.status import health, status
from node.service.status_socket import serve_status
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.link import Listing, endpoint_of
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import Address
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.runtime.logs import configure
from tallystick.runtime.serving import serving, wait_for_stop_signal
from tallystick.tracing.export import exporting
from tallystick.web.error_pages import ErrorPages

log = structlog.get_logger()
_LAST_CLAIM_SECONDS = 10.0
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
            port = await stack.enter_async_context(serving(app, config.metrics_host, config.metrics_port))
            log.info("metrics, health and pages", host=config.metrics_host, port=port)
        await stack.enter_async_context(serve_status(config.state, partial(status, node)))
        await node.run()


async def build(config: NodeConfig, signer: Signer, stack: AsyncExitStack, config_file: Path | None = None) -> Node:
    """Makes and wires the components of a node; the stack closes them. Raises TallyError."""
    export = await stack.enter_async_context(exporting(config.tracing, "tallystick-node", trusts_parent=False))
    resources = await open_resources(config, signer, stack, config_file)
    domain, store, chain = resources.domain, resources.store, resources.chain
    engine_suspected = asyncio.Event()
    now = int(time.time())
    tabs = Tabs(config.credit_limits, await store.tabs(now))
    tabs.expire(now)
    asks = _published_asks(config, resources)
    metrics = make_metrics(config, tabs, engine_suspected)
    tracing = job_tracing(export, config.tracing, resources.engine_pool, metrics)
    links = CoordinatorLinks(signer.address, config.all_coordinators, config.link)
    match_watch = MatchWatch(domain, config.state / "match-log", links.url_of)
    state_recovery = await _state_recovery(config, signer, resources, tabs, links)
    hours = await store.coordinator_hours(now // HOUR - HOURS)
    coordinator_credit = CoordinatorCredit(store, config.admission, hours, alarm=metrics.coordinator_suspended)
    unfinished = await store.unfinished_orders(now)
    receipt_signer = ReceiptSigner(signer=signer, domain=domain, tabs=tabs, store=store, unfinished=unfinished)
    receipt_sender = ReceiptSender(store, config.receipt_resend_interval)
    runner = JobRunner(
        provider=signer.address,
        domain=domain,
        sealing_key=resources.sealing_key,
        asks=asks,
        engines=resources.engine_pool.engines,
        receipt_signer=receipt_signer,
        tabs=tabs,
        store=store,
        chain=chain,
        observer=metrics,
        coordinator_credit=coordinator_credit,
        rules=config.admission_rules,
        deadlines=config.deadlines,
        consumed_orders=dict(await store.consumed_orders(now)),
        on_capacity_change=links.announce_capacity,
        may_take_jobs=lambda link: state_recovery.is_complete(link.coordinator),
        on_match=match_watch.on_match,
        on_client_head=match_watch.on_client_head,
        on_stranded_receipt=receipt_sender.resend_now,
        tracing=tracing,
        tiers=config.access,
    )
    router = LinkRouter(runner, receipt_sender, state_recovery, match_watch)
    listing = _listing_for(asks, resources.engine_pool, runner, state_recovery, coordinator_credit)
    links.make_link = _link_maker(config, signer, links, router, listing)
    resources.engine_pool.on_change = links.announce_capacity
    asks_changed = links.announce_asks
    state_recovery.on_complete = partial(_on_recovery_complete, links, router)
    tabs.on_stale_state, coordinator_credit.on_change = asks_changed, asks_changed
    node = Node(
        config=config,
        runner=runner,
        receipt_sender=receipt_sender,
        state_recovery=state_recovery,
        chain_watcher=ChainWatcher(
            chain, chain, tabs, connected=links.coordinators, max_fee_bps=lambda: node.config.admission.max_fee_bps
        ),
        links=links,
        collector=_collector(config, resources, tabs, metrics, links),
        payouts=resources.payouts,
        ask_publisher=_ask_publisher(config, resources.engine_pool, asks, asks_changed, engine_suspected),
        metrics=metrics,
        asks=asks,
        engine_pool=resources.engine_pool,
        chain=chain,
        tabs=tabs,
        engine_suspected=engine_suspected,
        coordinator_credit=coordinator_credit,
        match_watch=match_watch,
        ratings=_ratings(asks, links),
        record_pruner=RecordPruner(store, config.job_keep_seconds),
    )
    least = lambda: node.config.claims.direct_min_amount  # noqa: E731 - a reload changes it
    node.pages = make_pages(
        config,
        signer.address,
        resources.escrow,
        status=partial(status, node),
        store=store,
        least=least,
        ask=node.ratings.ask_decisions,
    )
    node.health = observe(node, store, resources.chain_health)
    stack.push_async_callback(node.health.close)
    return node


def _ratings(asks: PublishedAsks, links: CoordinatorLinks) -> Ratings:
    """Makes the component that watches how coordinators rate this node."""
    return Ratings(
        asks.provider,
        lambda: (link.url for link in links if link.session is not None),
        lambda: ((ask.message.model, precision_class(ask.message.spec.precision)) for ask in asks.current),
    )


def _published_asks(config: NodeConfig, resources: Resources) -> PublishedAsks:
    """Makes the asks of this node, none published yet."""
    signer, domain = resources.signer, resources.domain
    seller = Seller(signer.address, config.sealing_suite, resources.sealing_key.public, config.ask_validity)
    return PublishedAsks(seller, lambda ask: signer.sign(ask, domain))


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


def _collector(config: NodeConfig, resources: Resources, tabs: Tabs, metrics: NodeMetrics, links: CoordinatorLinks) -> Collector:
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
        settlement=resources.settlement,
        alarm=metrics.alarm,
    )


def _listing_for(
    asks: PublishedAsks,
    engine_pool: EnginePool,
    runner: JobRunner,
    state_recovery: StateRecovery,
    coordinator_credit: CoordinatorCredit,
) -> ListingFor:
    """Returns what decides the asks of a coordinator: none before its state recovery is complete, and none while it is
    suspended.
    """

    def listing_for(endpoint: str, coordinator: Address) -> Listing:
        if not (state_recovery.is_complete(coordinator) and coordinator_credit.serves(endpoint)):
            return Listing((), (), {})
        return engine_pool.listing(asks, runner.capacities())

    return listing_for


def _on_recovery_complete(links: CoordinatorLinks, router: LinkRouter) -> None:
    """Offers asks and closes unfinished orders, after the state recovery with a coordinator is complete."""
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


RELOADABLE = frozenset(
    {"engines", "tiers", "admission", "credit", "deadlines", "claims", "payout", "shutdown_grace", "log_json", "log_level"}
)
"""Settings that apply while the node runs; all others apply at the next start."""


@dataclass(slots=True)
class Node:
    """The components of a node."""

    config: NodeConfig
    runner: JobRunner
    receipt_sender: ReceiptSender
    state_recovery: StateRecovery
    chain_watcher: ChainWatcher
    links: CoordinatorLinks
    collector: Collector
    payouts: Payouts
    ask_publisher: AskPublisher
    metrics: NodeMetrics
    asks: PublishedAsks
    engine_pool: EnginePool
    chain: EscrowView
    tabs: Tabs
    engine_suspected: asyncio.Event
    coordinator_credit: CoordinatorCredit
    match_watch: MatchWatch
    ratings: Ratings
    record_pruner: RecordPruner
    health: HealthMonitor = field(init=False)
    pages: ProviderPages = field(init=False)
    config_problem: str = ""
    """Why the config that was read last is not applied; empty if it is."""
    settings_for_restart: tuple[str, ...] = ()
    """Settings whose change in the config waits for the next start."""

    async def run(self) -> None:
        """Runs until SIGTERM or SIGINT, then stops in order."""
        await asyncio.gather(self.ask_publisher.check_engines(first=True), self.chain_watcher.compare_tabs())
        if self.state_recovery.problem:
            log.warning("nothing is offered yet", reason=self.state_recovery.problem)
        if not self.asks.current:
            log.warning("nothing to offer yet: no engine lists a model", engines=sorted(self.engine_pool.engines))
        async with asyncio.TaskGroup() as group:
            services = (
                self.ask_publisher.run(),
                self.receipt_sender.run(),
                self.collector.run(),
                self.payouts.run(),
                self.chain_watcher.run(),
                self.coordinator_credit.run(),
                self.record_pruner.run(),
                self.health.run(),
            )
            tasks = [group.create_task(part) for part in (self.links.run(), *services)]
            await wait_for_stop_signal()
            log.info("stopping", running=self.runner.running, grace_seconds=self.config.shutdown_grace)
            await self._drain()
            for task in tasks:
                task.cancel()
        log.info("stopped")

    def reload(self, read: Callable[[], NodeConfig]) -> None:
        """Applies the RELOADABLE settings of another config. A wrong config changes nothing; settings that need a restart are
        logged.
        """
        try:
            new = read()
            if not new.engines:
                raise BadMessage("config: engines: expected at least one; engines are discovered only at the start")
            check_policy(new.payout, self.payouts.chain_id)
            self.engine_pool.reconfigure(new.engines)
        except (TallyError, OSError) as error:
            self.config_problem = str(error)
            log.warning("config not applied; the former config stays in effect", reason=self.config_problem)
            return
        self.config_problem = ""
        unchanged = {
            setting.name: getattr(self.config, setting.name) for setting in fields(new) if setting.name not in RELOADABLE
        }
        self.settings_for_restart = tuple(name for name, value in unchanged.items() if getattr(new, name) != value)
        if self.settings_for_restart:
            log.warning("these settings need a restart", settings=list(self.settings_for_restart))
        self.runner.reconfigure(new.admission_rules, new.deadlines, new.access)
        self.engine_pool.tier_prices = TierPrices(new.access)
        self.tabs.set_limits(new.credit_limits)
        self.collector.policy, self.payouts.policy = new.claims, new.payout
        configure(json=new.log_json, level=new.log_level)
        self.config = replace(new, **unchanged)
        self.engine_suspected.set()
        log.info("config applied", engines=sorted(self.engine_pool.engines))

    async def _drain(self) -> None:
        await self.runner.drain(self.config.shutdown_grace)
        try:
            async with asyncio.timeout(_LAST_CLAIM_SECONDS):
                await self.collector.claim_due(everything=True)
        except (TallyError, TimeoutError) as error:
            log.warning("claims not submitted; they will be after the next start", error=str(error) or "timed out")
        await self.receipt_sender.save_acknowledgements()
        await asyncio.gather(self.links.close(), self.match_watch.close())
