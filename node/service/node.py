"""The running node: its components, the order in which they start and stop, and the settings that change while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import structlog

from node.chain.collector import Collector
from node.chain.escrow_view import EscrowView
from node.chain.payouts import Payouts, check_policy
from node.chain.watcher import ChainWatcher
from node.coordinator.coordinator_links import CoordinatorLinks
from node.coordinator.match_watch import MatchWatch
from node.coordinator.ratings import Ratings
from node.coordinator.receipt_sender import ReceiptSender
from node.coordinator.state_recovery import StateRecovery
from node.domain.published_asks import PublishedAsks
from node.domain.tabs import Tabs
from node.domain.tier_prices import TierPrices
from node.jobs.coordinator_credit import CoordinatorCredit
from node.jobs.runner import JobRunner
from node.pages.provider_pages import ProviderPages
from node.service.ask_publisher import AskPublisher
from node.service.config import NodeConfig
from node.service.engine_pool import EnginePool
from node.service.metrics import NodeMetrics
from node.service.record_pruner import RecordPruner
from tallystick.protocol.errors import BadMessage, TallyError
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.runtime.logs import configure
from tallystick.runtime.serving import wait_for_stop_signal

log = structlog.get_logger()
_LAST_CLAIM_SECONDS = 10.0
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
