"""The node's composition root: makes its parts, wires them, runs them until SIGTERM, and takes them down in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from functools import partial

import structlog

from node.chain.collector import Collector
from node.chain.escrow_view import EscrowView
from node.chain.watcher import ChainWatcher
from node.coordinator.link import NodeLink, node_url
from node.coordinator.receipt_sender import ReceiptSender
from node.coordinator.router import LinkRouter
from node.coordinator.state_recovery import StateRecovery
from node.domain.published_asks import PublishedAsks, Seller
from node.domain.tabs import Tabs
from node.jobs.coordinator_credit import HOUR, HOURS, CoordinatorCredit
from node.jobs.receipt_signer import ReceiptSigner
from node.jobs.runner import JobRunner
from node.ports import Link
from node.service.ask_publisher import AskPublisher
from node.service.config import NodeConfig
from node.service.engine_pool import EnginePool
from node.service.metrics import NodeMetrics, count_gpus
from node.service.resources import Resources, open_resources
from node.service.status import health, status
from node.service.status_socket import serve_status
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.protocol.link import endpoint_of
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address
from tallystick.runtime.logs import configure
from tallystick.runtime.serving import serving, wait_for_stop_signal

log = structlog.get_logger()
_CLAIM_SECONDS = 10.0
Offered = Callable[[str, Address], tuple[Verified[Ask], ...]]
"""What is offered at an address, to the coordinator that is there."""


async def run(config: NodeConfig, signer: Signer, read_again: Callable[[], NodeConfig] | None = None) -> None:
    """Runs a node until SIGTERM or SIGINT; then it takes nothing new, finishes what runs within `config.grace` seconds, hands in
    its claims and returns. On SIGHUP it takes up what `read_again` gives, without a break.

    Raises TallyError if it cannot start: a bad config, a state of another key, no engine.
    """
    configure(json=config.log_json, level=config.log_level)
    async with AsyncExitStack() as stack:
        node = await build(config, signer, stack)
        if read_again is not None:
            stack.enter_context(_on_hangup(lambda: node.reload(read_again)))
        if config.metrics_port is not None:
            port = await stack.enter_async_context(
                serving(node.metrics.app(partial(health, node)), config.metrics_host, config.metrics_port)
            )
            log.info("metrics and health", host=config.metrics_host, port=port)
        await stack.enter_async_context(serve_status(config.state, partial(status, node)))
        await node.run()


async def build(config: NodeConfig, signer: Signer, stack: AsyncExitStack) -> Node:
    """Makes and wires the parts of a node. What must be closed is left on the stack. Raises TallyError."""
    ground = await open_resources(config, signer, stack)
    domain, store, chain = ground.domain, ground.store, ground.chain
    suspicion = asyncio.Event()
    now = int(time.time())
    tabs = Tabs(config.credit_limits, await store.tabs(now))
    tabs.expire(now)
    seller = Seller(signer.address, config.sealing_suite, ground.sealing_key.public, config.ask_validity)
    book = PublishedAsks(seller, lambda ask: signer.sign(ask, domain))
    monitor = _metrics(config, tabs, suspicion)
    links: list[NodeLink] = []
    recall = await _state_recovery(config, signer, ground, tabs, links)
    dealings = CoordinatorCredit(
        store, config.admission, await store.coordinator_hours(now // HOUR - HOURS), alarm=monitor.coordinator_suspended
    )
    books = ReceiptSigner(signer=signer, domain=domain, tabs=tabs, store=store, unfinished=await store.unfinished_orders(now))
    runner = JobRunner(
        provider=signer.address,
        domain=domain,
        sealing_key=ground.sealing_key,
        asks=book,
        engines=ground.engine_pool.engines,
        receipt_signer=books,
        tabs=tabs,
        store=store,
        chain=chain,
        observer=monitor,
        coordinator_credit=dealings,
        rules=config.admission_rules,
        deadlines=config.deadlines,
        consumed_orders=dict(await store.consumed_orders(now)),
        on_capacity_change=partial(_slots_changed, links),
        may_take_jobs=lambda link: recall.is_complete(link.coordinator),
    )
    courier = ReceiptSender(store, config.receipt_resend_interval)
    router = LinkRouter(runner, courier, recall)
    links += _links(config, signer, domain, router, _offered(book, recall, dealings))
    asks_changed = partial(_announce, links)
    recall.on_complete = partial(_recalled, links, router)
    tabs.on_stale_state, dealings.on_change = asks_changed, asks_changed
    node = Node(
        config=config,
        runner=runner,
        receipt_sender=courier,
        state_recovery=recall,
        chain_watcher=ChainWatcher(
            chain, chain, tabs, connected=partial(_connected, links), max_fee_bps=lambda: node.config.admission.max_fee_bps
        ),
        links=tuple(links),
        collector=_collector(config, ground, tabs, monitor, links),
        ask_publisher=_ask_publisher(config, ground.engine_pool, book, asks_changed, suspicion),
        metrics=monitor,
        asks=book,
        engine_pool=ground.engine_pool,
        chain=chain,
        tabs=tabs,
        engine_suspected=suspicion,
        coordinator_credit=dealings,
    )
    return node


def _metrics(config: NodeConfig, tabs: Tabs, suspicion: asyncio.Event) -> NodeMetrics:
    """What shows the node at work."""
    return NodeMetrics(
        tabs.unsecured_by_payer,
        suspicion.set,
        gpus=config.gpus or count_gpus(),
        gpu_hour_cost=config.gpu_hour_cost,
        credit_summary=lambda: tabs.credit_summary(int(time.time())),
    )


async def _state_recovery(
    config: NodeConfig, signer: Signer, ground: Resources, tabs: Tabs, links: Sequence[NodeLink]
) -> StateRecovery:
    """What asks each coordinator for the receipts that this key signed there last."""
    return StateRecovery(
        ground.store,
        tabs,
        domain=ground.domain,
        provider=signer.address,
        completed=await ground.store.completed_recoveries(),
        required=map(node_url, config.all_coordinators),
        skipped=map(node_url, config.skip_recovery),
        url_of=lambda session: next((link.url for link in links if link.session is session), ""),
    )


def _collector(config: NodeConfig, ground: Resources, tabs: Tabs, monitor: NodeMetrics, links: Sequence[NodeLink]) -> Collector:
    """What turns receipts into money."""
    return Collector(
        signer=ground.signer,
        domain=ground.domain,
        store=ground.store,
        chain=ground.chain,
        link=lambda coordinator: _session(links, coordinator),
        policy=config.claims,
        on_funds=tabs.observe,
        on_check=tabs.expire,
        settlement=ground.settlement,
        alarm=monitor.alarm,
    )


def _offered(book: PublishedAsks, recall: StateRecovery, dealings: CoordinatorCredit) -> Offered:
    """What is offered to a coordinator: nothing before it told what was signed there, nor once it left too much unpaid."""

    def asks(endpoint: str, coordinator: Address) -> tuple[Verified[Ask], ...]:
        return book.current if recall.is_complete(coordinator) and dealings.serves(endpoint) else ()

    return asks


def _slots_changed(links: Sequence[NodeLink]) -> None:
    """The free slots have changed: every coordinator is told."""
    for link in links:
        link.announce_capacity()


def _announce(links: Sequence[NodeLink]) -> None:
    """The asks have changed: every coordinator is told."""
    for link in links:
        link.announce_asks()
        link.announce_capacity()


def _recalled(links: Sequence[NodeLink], router: LinkRouter) -> None:
    """A coordinator has told what was signed there: it is offered something, and unfinished orders get their receipts."""
    _announce(links)
    router.close_unfinished()


def _connected(links: Sequence[NodeLink]) -> list[Address]:
    """The coordinators at the other ends of the open connections."""
    return [link.session.coordinator for link in links if link.session is not None]


def _ask_publisher(
    config: NodeConfig, fleet: EnginePool, book: PublishedAsks, changed: Callable[[], None], suspicion: asyncio.Event
) -> AskPublisher:
    """What looks after the engines, and sells what they can do."""
    return AskPublisher(
        asks=book,
        engines=fleet.engines,
        make_offers=fleet.make_offers,
        on_change=changed,
        engine_suspected=suspicion,
        check_interval=config.engine_check_interval,
    )


def _links(config: NodeConfig, signer: Signer, domain: Domain, router: LinkRouter, asks: Offered) -> list[NodeLink]:
    """One connection to each coordinator; the address that is configured is that of the first."""
    return [
        NodeLink(
            url,
            signer=signer,
            domain=domain,
            handler=router,
            asks=partial(asks, endpoint_of(node_url(url))),
            capacity=router.runner.capacity,
            settings=config.link,
            coordinator=config.coordinator_address if url == config.coordinator else None,
        )
        for url in config.all_coordinators
    ]


def _session(links: Sequence[NodeLink], coordinator: Address) -> Link | None:
    """The open connection to a coordinator."""
    return next((link.session for link in links if link.session is not None and link.session.coordinator == coordinator), None)


@contextlib.contextmanager
def _on_hangup(act: Callable[[], None]) -> Iterator[None]:
    """Acts on SIGHUP, where the system has it."""
    number = getattr(signal, "SIGHUP", None)
    loop = asyncio.get_running_loop()
    if number is not None:
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        if number is not None:
            loop.remove_signal_handler(number)


RELOADABLE = frozenset({"engines", "admission", "credit", "deadlines", "claims", "shutdown_grace", "log_json", "log_level"})
"""Settings that a node takes up while it works; all others when it starts."""


@dataclass(slots=True)
class Node:
    """A node, ready to work."""

    config: NodeConfig
    runner: JobRunner
    receipt_sender: ReceiptSender
    state_recovery: StateRecovery
    chain_watcher: ChainWatcher
    links: tuple[NodeLink, ...]
    collector: Collector
    ask_publisher: AskPublisher
    metrics: NodeMetrics
    asks: PublishedAsks
    engine_pool: EnginePool
    chain: EscrowView
    tabs: Tabs
    engine_suspected: asyncio.Event
    coordinator_credit: CoordinatorCredit

    async def run(self) -> None:
        """Works until SIGTERM or SIGINT, then stops in order."""
        await asyncio.gather(self.ask_publisher.check_engines(first=True), self.chain_watcher.compare_tabs())
        if self.state_recovery.problem:
            log.warning("nothing is offered yet", reason=self.state_recovery.problem)
        if not self.asks.current:
            log.warning("nothing to offer yet: no engine answers with a model", engines=sorted(self.engine_pool.engines))
        async with asyncio.TaskGroup() as group:
            rooms = (
                self.ask_publisher.run(),
                self.receipt_sender.run(),
                self.collector.run(),
                self.chain_watcher.run(),
                self.coordinator_credit.run(),
            )
            parts = (*(link.run() for link in self.links), *rooms)
            tasks = [group.create_task(part) for part in parts]
            await wait_for_stop_signal()
            log.info("stopping", running=self.runner.running, grace_seconds=self.config.shutdown_grace)
            await self._drain()
            for task in tasks:
                task.cancel()
        log.info("stopped")

    def reload(self, read: Callable[[], NodeConfig]) -> None:
        """Takes up another config: engines, models, prices, rules, limits, deadlines, claims, logs. One that is wrong changes
        nothing, and what only a start can change is said.
        """
        try:
            new = read()
            if not new.engines:
                raise BadMessage("config: engines: none is named, and they are looked for only at the start")
            self.engine_pool.reconfigure(new.engines)
        except (TallyError, OSError) as error:
            log.warning("config not taken up; going on as before", reason=str(error))
            return
        former = {one.name: getattr(self.config, one.name) for one in fields(new) if one.name not in RELOADABLE}
        fixed = [name for name, value in former.items() if getattr(new, name) != value]
        if fixed:
            log.warning("these settings need a restart", settings=fixed)
        self.runner.reconfigure(new.admission_rules, new.deadlines)
        self.tabs.set_limits(new.credit_limits)
        self.collector.policy = new.claims
        configure(json=new.log_json, level=new.log_level)
        self.config = replace(new, **former)
        self.engine_suspected.set()
        log.info("config taken up", engines=sorted(self.engine_pool.engines))

    async def _drain(self) -> None:
        await self.runner.drain(self.config.shutdown_grace)
        try:
            async with asyncio.timeout(_CLAIM_SECONDS):
                await self.collector.claim_due(everything=True)
        except (TallyError, TimeoutError) as error:
            log.warning("claims not handed in; they will be after the next start", error=str(error) or "timed out")
        await self.receipt_sender.save_acknowledgements()
        await asyncio.gather(*(link.close() for link in self.links))
