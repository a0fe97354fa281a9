"""The node's composition root: makes its parts, wires them, runs them until SIGTERM, and takes them down in order."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from node.answers import UpstreamModel
from node.chainview import EscrowView
from node.collector import Collector
from node.config import EngineConfig, NodeConfig
from node.courier import Courier
from node.engines.discover import Finding, discover, look
from node.engines.kinds import Kind as EngineKind
from node.engines.openai_http import OpenAIEngine
from node.job import Pool
from node.link import NodeLink
from node.monitor import Monitor
from node.offers import AskBook, Offer, Seller
from node.ports import Link
from node.runner import Runner
from node.slots import Slots
from node.store import SqlStore
from node.storefront import Storefront
from node.tabs import Tabs
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError, Unavailable, from_public
from tallystick.protocol.messages import UNKNOWN
from tallystick.protocol.sealing import SealingKey
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import CancelReason, Kind, loads
from tallystick.runtime.keys import random_secret_file
from tallystick.runtime.logs import configure
from tallystick.runtime.serving import serving, until_stopped

log = structlog.get_logger()
_CLAIM_SECONDS = 10.0


async def run(config: NodeConfig, signer: Signer) -> None:
    """Runs a node until SIGTERM or SIGINT; then it takes nothing new, finishes what runs within `config.grace` seconds, hands in
    its claims and returns. Raises TallyError if it cannot start: a bad config, a state of another key, no engine.
    """
    configure(json=config.log_json, level=config.log_level)
    async with AsyncExitStack() as stack:
        node = await build(config, signer, stack)
        if config.monitor_port is not None:
            port = await stack.enter_async_context(
                serving(node.monitor.app(node.health), config.monitor_host, config.monitor_port)
            )
            log.info("metrics and health", host=config.monitor_host, port=port)
        await node.work()


@dataclass(frozen=True, slots=True)
class Ground:
    """What the parts stand on: who this node is, its store, its view of the chain, its engines."""

    domain: Domain
    store: SqlStore
    chain: EscrowView
    engines: Mapping[str, EngineConfig]
    pools: Mapping[str, Pool]
    sealing_key: SealingKey


async def _ground(config: NodeConfig, signer: Signer, stack: AsyncExitStack) -> Ground:
    deployment = _deployment(config.deployment)
    _lock(config.state, stack)
    store = SqlStore(config.database, signer.address, deployment.domain)
    await store.start()
    stack.push_async_callback(store.close)
    engines = {engine.label: engine for engine in config.engines or await _find_engines(os.environ)}
    rpc = Rpc(config.rpc or deployment.rpc)
    stack.push_async_callback(rpc.close)
    chain = EscrowView(Escrow(rpc, deployment), signer.address)
    stack.push_async_callback(chain.close)
    return Ground(deployment.domain, store, chain, engines, _pools(engines, stack), _sealing_key(config))


async def build(config: NodeConfig, signer: Signer, stack: AsyncExitStack) -> Node:
    """Makes and wires the parts of a node. What must be closed is left on the stack. Raises TallyError."""
    ground = await _ground(config, signer, stack)
    domain, store, chain, pools = ground.domain, ground.store, ground.chain, ground.pools
    slots_changed, suspicion = asyncio.Event(), asyncio.Event()
    now = int(time.time())
    tabs = Tabs(config.exposure, await store.tabs(now))
    seller = Seller(signer.address, config.sealing_suite, ground.sealing_key.public, config.ask_validity)
    book = AskBook(seller, lambda ask: signer.sign(ask, domain))
    monitor = Monitor(lambda: int(tabs.unsecured), suspicion.set)
    runner = Runner(
        signer=signer,
        domain=domain,
        sealing_key=ground.sealing_key,
        book=book,
        pools=pools,
        tabs=tabs,
        store=store,
        chain=chain,
        observer=monitor,
        rules=config.rules,
        deadlines=config.deadlines,
        taken=dict(await store.taken(now)),
        changed=slots_changed.set,
    )
    courier = Courier(store, config.receipt_resend)
    link = NodeLink(
        config.coordinator,
        signer=signer,
        domain=domain,
        handler=Desk(runner, courier),
        asks=lambda: book.current,
        capacity=runner.capacity,
        slots_changed=slots_changed,
        settings=config.link,
        coordinator=config.coordinator_address,
    )

    def asks_changed() -> None:
        link.announce()
        slots_changed.set()

    storefront = Storefront(
        book=book,
        pools=pools,
        offers=Shelf(ground.engines, pools),
        changed=asks_changed,
        suspicion=suspicion,
        seconds=config.engine_check,
    )
    collector = Collector(
        signer=signer,
        domain=domain,
        store=store,
        chain=chain,
        link=lambda: link.session,
        policy=config.claims,
        observed=tabs.observe,
    )
    return Node(config, runner, courier, link, collector, storefront, monitor, book, pools, chain)


@dataclass(frozen=True, slots=True)
class Desk:
    """Passes what the link brings to who deals with it (link.Handler)."""

    runner: Runner
    courier: Courier

    def welcomed(self, link: Link) -> None:
        """See link.Handler."""
        self.courier.welcomed(link)

    def frame(self, link: Link, kind: Kind, job: JobId, payload: bytes) -> None:
        """See link.Handler."""
        if kind is Kind.DISPATCH:
            self.runner.dispatch(link, job, payload)
        elif kind is Kind.CANCEL:
            self.runner.cancel(link, job, CancelReason.loads(payload))
        elif kind is Kind.CREDIT:
            self.runner.credit(link, job, payload)
        elif kind is Kind.RECEIPT_REFUSED:
            self.courier.refused(link, job, from_public(loads(payload, "refusal"), 502))
        else:
            self.courier.acknowledged(link, job)

    def lost(self, link: Link) -> None:
        """See link.Handler."""
        self.courier.lost(link)
        self.runner.lost(link)


class Shelf:
    """What is sold of each engine (storefront.OfferModels): what the config names, or all that the engine lists."""

    def __init__(self, engines: Mapping[str, EngineConfig], pools: Mapping[str, Pool]) -> None:
        self._engines, self._pools = engines, pools
        self._identified: dict[str, Finding] = {}
        self._missing: set[str] = set()

    async def __call__(self, name: str, models: tuple[UpstreamModel, ...]) -> Sequence[Offer]:
        """The offers of one engine."""
        engine = self._engines[name]
        if name not in self._identified:
            self._identified[name] = await _identify(engine)
        found = self._identified[name]
        contexts = {model.name: model.context_tokens for model in models}
        contexts |= {
            model.name: model.context_tokens for model in found.models if model.context_tokens and model.name in contexts
        }
        listed = engine.models or tuple(engine.listed(model.name) for model in models)
        missing = {model.name for model in listed if contexts and model.name not in contexts}
        if missing - self._missing:
            log.warning("the engine does not list configured models", engine=name, models=sorted(missing))
        self._missing |= missing
        when, load = datetime.now(UTC), self._pools[name].load
        return [engine.offer(model, contexts.get(model.name), found.spec(model.name), when, load) for model in listed]


@dataclass(frozen=True, slots=True)
class Node:
    """A node, ready to work."""

    config: NodeConfig
    runner: Runner
    courier: Courier
    link: NodeLink
    collector: Collector
    storefront: Storefront
    monitor: Monitor
    book: AskBook
    pools: Mapping[str, Pool]
    chain: EscrowView

    async def work(self) -> None:
        """Works until SIGTERM or SIGINT, then stops in order."""
        await self.storefront.look(first=True)
        if not self.book.current:
            log.warning("nothing to offer yet: no engine answers with a model", engines=sorted(self.pools))
        async with asyncio.TaskGroup() as group:
            parts = (self.link.run(), self.storefront.run(), self.courier.run(), self.collector.run())
            tasks = [group.create_task(part) for part in parts]
            await until_stopped()
            log.info("stopping", running=self.runner.running, grace_seconds=self.config.grace)
            await self._drain()
            for task in tasks:
                task.cancel()
        log.info("stopped")

    def health(self) -> dict[str, Any]:
        """What /healthz says. `ok`: it is connected and has something to offer."""
        session, capacity = self.link.session, self.runner.capacity()
        return {
            "ok": session is not None and bool(self.book.current),
            "coordinator": session.coordinator if session is not None else None,
            "trouble": self.link.trouble,
            "chain_reachable": self.chain.reachable,
            "models": sorted({offer.model for offer in self.book.offers}),
            "engines": {name: "up" if pool.up else "down" for name, pool in self.pools.items()},
            "running": self.runner.running,
            "free_slots": capacity.free,
            "tokens_per_second": capacity.tokens_per_second,
            "first_token_ms": capacity.first_token_ms,
        }

    async def _drain(self) -> None:
        await self.runner.drain(self.config.grace)
        try:
            async with asyncio.timeout(_CLAIM_SECONDS):
                await self.collector.sweep(everything=True)
        except (TallyError, TimeoutError) as error:
            log.warning("claims not handed in; they will be after the next start", error=str(error) or "timed out")
        await self.courier.note()
        await self.link.close()


def _deployment(path: Path) -> Deployment:
    try:
        return Deployment.load(path)
    except OSError as error:
        raise BadMessage(f"deployment file {path}: {error.strerror}; `tally deploy` writes one") from None


def _lock(state: Path, stack: AsyncExitStack) -> None:
    """One process a state: two would give the same receipt numbers twice, which costs the stake."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = stack.enter_context((state / "lock").open("w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadMessage(f"{state}: another node is running on this state") from None


def _sealing_key(config: NodeConfig) -> SealingKey:
    suite = config.sealing_suite
    return SealingKey(suite, random_secret_file(config.state / f"sealing-{suite}.key", SealingKey.secret_bytes(suite)))


def _pools(engines: Mapping[str, EngineConfig], stack: AsyncExitStack) -> dict[str, Pool]:
    pools = {}
    for name, config in engines.items():
        engine = OpenAIEngine(config.settings(os.environ))
        stack.push_async_callback(engine.close)
        pools[name] = Pool(engine, Slots(config.slots, config.max_slots))
    return pools


async def _find_engines(environment: Mapping[str, str]) -> tuple[EngineConfig, ...]:
    named = environment.get("OPENAI_BASE_URL", "").strip()
    if named:
        return (EngineConfig(url=named, api_key=environment.get("OPENAI_API_KEY") or None),)
    found = await discover(environment)
    for finding in found:
        log.info("engine found", kind=finding.kind.value, url=finding.url, models=[model.name for model in finding.models])
    if not found:
        raise Unavailable(
            Code.ENGINE_UNAVAILABLE,
            "no engine answers on the usual ports; start one, set OPENAI_BASE_URL, or name it in the config: [[engines]] url = …",
            fault=Fault.ENGINE,
        )
    return tuple(EngineConfig(url=finding.url) for finding in found)


async def _identify(engine: EngineConfig) -> Finding:
    """What kind of engine it is, as far as it says."""
    try:
        return await look(engine.url, engine.settings(os.environ).api_key)
    except Unavailable:
        return Finding(engine.url, EngineKind.OTHER, UNKNOWN, ())
