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
from typing import Any

import structlog

from node.chain.collector import Collector
from node.chain.escrow_view import EscrowView
from node.chain.watcher import ChainWatch
from node.coordinator.link import NodeLink, node_url
from node.coordinator.receipt_sender import Courier
from node.coordinator.router import LinkRouter
from node.coordinator.state_recovery import Recall
from node.domain.offers import AskBook, Seller
from node.domain.tabs import Tabs
from node.jobs.coordinator_credit import HOUR, HOURS, Dealings
from node.jobs.receipt_signer import Books
from node.jobs.runner import Runner
from node.ports import Link
from node.service.ask_publisher import Storefront
from node.service.config import NodeConfig
from node.service.engine_pool import Fleet
from node.service.metrics import Monitor, count_gpus
from node.service.resources import Ground, lay_ground
from node.service.status_socket import window
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
        if config.monitor_port is not None:
            port = await stack.enter_async_context(
                serving(node.monitor.app(node.health), config.monitor_host, config.monitor_port)
            )
            log.info("metrics and health", host=config.monitor_host, port=port)
        await stack.enter_async_context(window(config.state, node.status))
        await node.work()


async def build(config: NodeConfig, signer: Signer, stack: AsyncExitStack) -> Node:
    """Makes and wires the parts of a node. What must be closed is left on the stack. Raises TallyError."""
    ground = await lay_ground(config, signer, stack)
    domain, store, chain = ground.domain, ground.store, ground.chain
    suspicion = asyncio.Event()
    now = int(time.time())
    tabs = Tabs(config.limits, await store.tabs(now))
    tabs.expire(now)
    seller = Seller(signer.address, config.sealing_suite, ground.sealing_key.public, config.ask_validity)
    book = AskBook(seller, lambda ask: signer.sign(ask, domain))
    monitor = _monitor(config, tabs, suspicion)
    links: list[NodeLink] = []
    recall = await _recall(config, signer, ground, tabs, links)
    dealings = Dealings(store, config.rules, await store.dealings(now // HOUR - HOURS), alarm=monitor.shunned)
    books = Books(signer=signer, domain=domain, tabs=tabs, store=store, unfinished=await store.unfinished(now))
    runner = Runner(
        provider=signer.address,
        domain=domain,
        sealing_key=ground.sealing_key,
        book=book,
        pools=ground.fleet.pools,
        books=books,
        tabs=tabs,
        store=store,
        chain=chain,
        observer=monitor,
        dealings=dealings,
        rules=config.order_rules,
        deadlines=config.deadlines,
        taken=dict(await store.taken(now)),
        changed=partial(_slots_changed, links),
        ready=lambda link: recall.done(link.coordinator),
    )
    courier = Courier(store, config.receipt_resend)
    router = LinkRouter(runner, courier, recall)
    links += _links(config, signer, domain, router, _offered(book, recall, dealings))
    asks_changed = partial(_announce, links)
    recall.finished = partial(_recalled, links, router)
    tabs.on_lost_state, dealings.changed = asks_changed, asks_changed
    node = Node(
        config=config,
        runner=runner,
        courier=courier,
        recall=recall,
        watch=ChainWatch(
            chain, chain, tabs, connected=partial(_connected, links), most_bps=lambda: node.config.rules.max_fee_bps
        ),
        links=tuple(links),
        collector=_collector(config, ground, tabs, monitor, links),
        storefront=_storefront(config, ground.fleet, book, asks_changed, suspicion),
        monitor=monitor,
        book=book,
        fleet=ground.fleet,
        chain=chain,
        tabs=tabs,
        suspicion=suspicion,
        dealings=dealings,
    )
    return node


def _monitor(config: NodeConfig, tabs: Tabs, suspicion: asyncio.Event) -> Monitor:
    """What shows the node at work."""
    return Monitor(
        tabs.exposed,
        suspicion.set,
        gpus=config.gpus or count_gpus(),
        gpu_hour_cost=config.gpu_hour_cost,
        trust=lambda: tabs.trust(int(time.time())),
    )


def _watch(chain: EscrowView, tabs: Tabs, links: Sequence[NodeLink], most_bps: Callable[[], int]) -> ChainWatch:
    """What compares this node's record with the chain, and reads the fees of its coordinators."""
    return ChainWatch(chain, chain, tabs, connected=partial(_connected, links), most_bps=most_bps)


async def _recall(config: NodeConfig, signer: Signer, ground: Ground, tabs: Tabs, links: Sequence[NodeLink]) -> Recall:
    """What asks each coordinator for the receipts that this key signed there last."""
    return Recall(
        ground.store,
        tabs,
        domain=ground.domain,
        provider=signer.address,
        known=await ground.store.recalled(),
        required=map(node_url, config.all_coordinators),
        without=map(node_url, config.without_recall),
        url_of=lambda session: next((link.url for link in links if link.session is session), ""),
    )


def _collector(config: NodeConfig, ground: Ground, tabs: Tabs, monitor: Monitor, links: Sequence[NodeLink]) -> Collector:
    """What turns receipts into money."""
    return Collector(
        signer=ground.signer,
        domain=ground.domain,
        store=ground.store,
        chain=ground.chain,
        link=lambda coordinator: _session(links, coordinator),
        policy=config.claims,
        observed=tabs.observe,
        passed=tabs.expire,
        settlement=ground.settlement,
        alarm=monitor.alarm,
    )


def _offered(book: AskBook, recall: Recall, dealings: Dealings) -> Offered:
    """What is offered to a coordinator: nothing before it told what was signed there, nor once it left too much unpaid."""

    def asks(endpoint: str, coordinator: Address) -> tuple[Verified[Ask], ...]:
        return book.current if recall.done(coordinator) and dealings.serves(endpoint) else ()

    return asks


def _slots_changed(links: Sequence[NodeLink]) -> None:
    """The free slots have changed: every coordinator is told."""
    for link in links:
        link.slots_changed()


def _announce(links: Sequence[NodeLink]) -> None:
    """The asks have changed: every coordinator is told."""
    for link in links:
        link.announce()
        link.slots_changed()


def _recalled(links: Sequence[NodeLink], router: LinkRouter) -> None:
    """A coordinator has told what was signed there: it is offered something, and unfinished orders get their receipts."""
    _announce(links)
    router.close_unfinished()


def _connected(links: Sequence[NodeLink]) -> list[Address]:
    """The coordinators at the other ends of the open connections."""
    return [link.session.coordinator for link in links if link.session is not None]


def _storefront(
    config: NodeConfig, fleet: Fleet, book: AskBook, changed: Callable[[], None], suspicion: asyncio.Event
) -> Storefront:
    """What looks after the engines, and sells what they can do."""
    return Storefront(
        book=book,
        pools=fleet.pools,
        offers=fleet.offers,
        changed=changed,
        suspicion=suspicion,
        seconds=config.engine_check,
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


TAKEN_UP = frozenset({"engines", "rules", "exposure", "deadlines", "claims", "grace", "log_json", "log_level"})
"""Settings that a node takes up while it works; all others when it starts."""


@dataclass(slots=True)
class Node:
    """A node, ready to work."""

    config: NodeConfig
    runner: Runner
    courier: Courier
    recall: Recall
    watch: ChainWatch
    links: tuple[NodeLink, ...]
    collector: Collector
    storefront: Storefront
    monitor: Monitor
    book: AskBook
    fleet: Fleet
    chain: EscrowView
    tabs: Tabs
    suspicion: asyncio.Event
    dealings: Dealings

    async def work(self) -> None:
        """Works until SIGTERM or SIGINT, then stops in order."""
        await asyncio.gather(self.storefront.look(first=True), self.watch.compare())
        if self.recall.trouble:
            log.warning("nothing is offered yet", reason=self.recall.trouble)
        if not self.book.current:
            log.warning("nothing to offer yet: no engine answers with a model", engines=sorted(self.fleet.pools))
        async with asyncio.TaskGroup() as group:
            rooms = (self.storefront.run(), self.courier.run(), self.collector.run(), self.watch.run(), self.dealings.run())
            parts = (*(link.run() for link in self.links), *rooms)
            tasks = [group.create_task(part) for part in parts]
            await wait_for_stop_signal()
            log.info("stopping", running=self.runner.running, grace_seconds=self.config.grace)
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
            self.fleet.adopt(new.engines)
        except (TallyError, OSError) as error:
            log.warning("config not taken up; going on as before", reason=str(error))
            return
        former = {one.name: getattr(self.config, one.name) for one in fields(new) if one.name not in TAKEN_UP}
        fixed = [name for name, value in former.items() if getattr(new, name) != value]
        if fixed:
            log.warning("these settings need a restart", settings=fixed)
        self.runner.adjust(new.order_rules, new.deadlines)
        self.tabs.adjust(new.limits)
        self.collector.policy = new.claims
        configure(json=new.log_json, level=new.log_level)
        self.config = replace(new, **former)
        self.suspicion.set()
        log.info("config taken up", engines=sorted(self.fleet.pools))

    def health(self) -> dict[str, Any]:
        """What /healthz says. `ok`: it is connected, to a coordinator that it serves, and has something to offer."""
        trust = self.tabs.trust(int(time.time()))
        sessions, capacity = [link.session for link in self.links], self.runner.capacity()
        connected = [session.coordinator for session in sessions if session is not None]
        served = any(self.dealings.serves(session.endpoint) for session in sessions if session)
        troubles = (self.recall.trouble, *(link.trouble for link in self.links), *self.dealings.troubles())
        return {
            "ok": served and bool(self.book.current) and not self.recall.trouble,
            "coordinator": connected[0] if connected else None,
            "coordinators": {link.url: link.session.coordinator if link.session else None for link in self.links},
            "trouble": "; ".join(filter(None, troubles)),
            "chain_reachable": self.chain.reachable,
            "models": sorted({offer.model for offer in self.book.offers}),
            "engines": {name: "up" if pool.up else "down" for name, pool in self.fleet.pools.items()},
            "slots": {name: {"taken": pool.taken, "of": pool.slots} for name, pool in self.fleet.pools.items()},
            "running": self.runner.running,
            "free_slots": capacity.free,
            "tokens_per_second": capacity.tokens_per_second,
            "first_token_ms": capacity.first_token_ms,
            "unsecured": str(int(self.tabs.unsecured)),
            **{name: str(amount) for name, amount in trust.items()},
            "fees_bps": {coordinator: self.watch.rates.get(coordinator) for coordinator in connected},
            "max_fee_bps": self.config.rules.max_fee_bps,
            "dealings": self.dealings.status(),
            "alarms": self.monitor.alarms,
        }

    def status(self) -> dict[str, Any]:
        """All that `tally node status` shows."""
        asks = [
            {
                "model": offer.model,
                "engine": offer.engine,
                "inputPrice": str(offer.prices.input),
                "outputPrice": str(offer.prices.output),
                "contextTokens": offer.context_tokens,
            }
            for offer in self.book.offers
        ]
        return self.health() | {"asks": asks} | self.monitor.since_start()

    async def _drain(self) -> None:
        await self.runner.drain(self.config.grace)
        try:
            async with asyncio.timeout(_CLAIM_SECONDS):
                await self.collector.sweep(everything=True)
        except (TallyError, TimeoutError) as error:
            log.warning("claims not handed in; they will be after the next start", error=str(error) or "timed out")
        await self.courier.note()
        await asyncio.gather(*(link.close() for link in self.links))
